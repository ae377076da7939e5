"""Image encoders that read noisy pictures: an open_clip model made to know the noise level."""
