"""What differs between kinds of pipelines, one file each: conditions, latents, calls, pictures."""
