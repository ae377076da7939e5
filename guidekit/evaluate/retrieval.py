"""Retrieval: is an image found by its text among real ones?

Of semantic diffusion guidance (SDG), Liu et al. 2021 (arXiv:2112.05744).
"""

import numpy as np


def ranks(
    images: np.ndarray,
    queries: np.ndarray,
    real: np.ndarray,
    among: int = 99,
    seed: int = 0,
    own: np.ndarray | None = None,
) -> np.ndarray:
    """Place of each image (n, d) among `among` real ones (m, d) by its query (n, d); 0 is first.

    own: where the images are real ones themselves, their numbers (n,), to be compared with others.
    """
    rng = np.random.default_rng(seed)
    scores = (images * queries).sum(1)
    places = []
    for i, (query, score) in enumerate(zip(queries, scores, strict=True)):
        chosen = rng.choice(len(real) - (own is not None), among, replace=False)
        if own is not None:
            chosen += chosen >= own[i]
        places.append(int((real[chosen] @ query > score).sum()))
    return np.array(places)
