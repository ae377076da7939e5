"""What tells a backbone from others: its networks' classes, shapes and weights, its noise levels.

Of every weight a norm and the sum under fixed random signs are kept. Rounding to half precision
moves both by less than a thousandth of the norm; another training moves them by more, whichever of
the weights it changed.
"""

import hashlib
import json
import math

import torch
from torch import Tensor, nn

from guidekit.backbones.denoiser import Denoiser

SAMPLE = 2**16  # numbers of a weight that are read, spread over all of it
# bfloat16 keeps 8 bits: its rounding moves a sum by 0.0011 of the norm, a norm by at most 0.002.
MOST, TYPICAL = 0.01, 0.003  # of one weight, and the root of the mean square over all
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
LEVELS = range(0, 1000, 100)


def fingerprint(denoiser: Denoiser) -> dict:
    """Class, dtype, a hash of all shapes, norms and sums of all weights, and noise levels."""
    weights = dict(_weights(denoiser))
    shapes = json.dumps([(name, list(w.shape)) for name, w in weights.items()])
    with torch.no_grad():
        measured = [_measured(w) for w in weights.values()]
    table = getattr(denoiser.pipeline.scheduler, "alphas_cumprod", None)
    return {
        "class": type(denoiser.model).__name__,
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "shapes": hashlib.sha256(shapes.encode()).hexdigest(),
        "norms": [norm for norm, _ in measured],
        "sums": [total for _, total in measured],
        "levels": [] if table is None else [round(float(table[i]), 6) for i in LEVELS],
    }


def same_backbone(one: dict, two: dict, levels: bool = False) -> bool:
    """Whether two fingerprints are of one backbone, in whatever precision.

    levels: whether its noise levels count too, as they do where images are noised.
    """
    if any(one.get(k) != two.get(k) for k in ("class", "shapes")):
        return False
    if levels and one.get("levels") != two.get("levels"):
        return False
    try:  # one of them is from a file
        norms, sums = (
            torch.tensor([x[k] for x in (one, two)], dtype=torch.float64) for k in ("norms", "sums")
        )
    except (KeyError, TypeError, ValueError, RuntimeError):
        return False
    away = (sums[0] - sums[1]).abs()
    close = torch.isclose(norms[0], norms[1], rtol=MOST / 2, atol=1e-5)
    return bool(close.all() and away.max() <= MOST and away.square().mean().sqrt() <= TYPICAL)


def _weights(denoiser: Denoiser):
    """Names and floating-point weights of all networks that a head's features go through."""
    parts = [getattr(denoiser.pipeline, name, None) for name in TEXT_ENCODERS]
    for place, model in enumerate([*denoiser.models, *filter(None, parts)]):
        if isinstance(model, nn.Module):
            for name, weight in sorted(model.state_dict().items()):
                if weight.is_floating_point():
                    yield f"{place}.{name}", weight


def _measured(weight: Tensor) -> tuple[float, float]:
    """Root mean square of a weight, and its sum under random signs over its norm."""
    x = weight.detach().flatten()
    x = x[:: max(1, math.ceil(len(x) / SAMPLE))].double()
    norm = float(x.norm())
    if norm == 0:
        return 0.0, 0.0
    signs = _signs()[: len(x)].to(x.device)
    return float(f"{norm / math.sqrt(len(x)):.6g}"), round(float(signs @ x) / norm, 6)


def _signs() -> Tensor:
    """SAMPLE numbers -1 or 1, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, (SAMPLE,), generator=generator).double() * 2 - 1
