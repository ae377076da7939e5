"""Retrieval: is an image found by its text among real ones?

Of semantic diffusion guidance (SDG), Liu et al. 2021 (arXiv:2112.05744).
"""

import numpy as np


def ranks(
    images: np.ndarray, queries: np.ndarray, real: np.ndarray, among: int = 99, seed: int = 0
) -> np.ndarray:
    """Place of each image (n, d) among `among` real ones (m, d) by its query (n, d); 0 is first."""
    rng = np.random.default_rng(seed)
    own = (images * queries).sum(1)
    places = []
    for query, score in zip(queries, own, strict=True):
        others = real[rng.choice(len(real), among, replace=False)]
        places.append(int((others @ query > score).sum()))
    return np.array(places)
