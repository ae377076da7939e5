"""Image encoders that read noisy images: an open_clip model made to know the noise level."""
