"""Heads: small predictors on the features of a frozen denoiser, fitted on a handful of labels.

Graikos, Yellapragada, Samaras: Conditional generation from unconditional diffusion models using
denoiser representations, BMVC 2023, arXiv:2306.01900.
"""

from guidekit.heads.augment import accepted_images
from guidekit.heads.data import Examples, read_examples
from guidekit.heads.features import Reading
from guidekit.heads.fit import FitOptions, fit
from guidekit.heads.head import Head, load_head

__all__ = [
    "Examples",
    "FitOptions",
    "Head",
    "Reading",
    "accepted_images",
    "fit",
    "load_head",
    "read_examples",
]
