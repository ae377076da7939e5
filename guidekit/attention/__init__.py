"""Attention calls of a denoiser: their maps, and which implementation runs them."""
