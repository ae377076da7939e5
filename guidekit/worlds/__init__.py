"""Worlds whose scenes are drawn from a seed, with captions, masks and labels."""
