"""Built-in worlds: images drawn from a seed, with captions and masks."""
