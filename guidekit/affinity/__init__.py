"""Class affinity: which classes of a source label set stand for the classes of a target set.

After Careil, Verbeek, Lathuiliere, "Few-shot Semantic Image Synthesis with Class Affinity
Transfer", CVPR 2023, arXiv:2304.02321: a source model takes target maps through a matrix of class
affinities, which is estimated from a few labelled images. What the paper leaves open is said where
it is decided here.
"""

from guidekit.affinity.estimate import by_features, by_segmentation, by_text, estimate
from guidekit.affinity.fold import HOSTS, fold, fold_state
from guidekit.affinity.matrix import Affinity, Estimate, load_affinity, parse_hand
from guidekit.affinity.segmenters import Segmenter, load_segmenter
from guidekit.affinity.shots import Shot, read_shots

__all__ = [
    "HOSTS",
    "Affinity",
    "Estimate",
    "Segmenter",
    "Shot",
    "by_features",
    "by_segmentation",
    "by_text",
    "estimate",
    "fold",
    "fold_state",
    "load_affinity",
    "load_segmenter",
    "parse_hand",
    "read_shots",
]
