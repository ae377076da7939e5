"""Affinities folded into the first layers that read a label map: conv(W, A y) = conv(W A, y).

A palette is linear in the one-hot map, so layers that read a map in colours fold too: their new
filters have one column for each target class. Zero padding stays right, because a map's one-hot
channels sum to 1 inside of the image. Void pixels are zeros in every channel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from guidekit.errors import GuidekitError


@dataclass(frozen=True)
class Host:
    """Where a kind of model reads a label map.

    keys: patterns of the weights in its state dict. start: first channel of the map, or "last".
    further: most channels behind the map, which stay. colours: how the map is coloured, in [0, 1]
    ("unit") or [-1, 1] ("signed"); "" for a one-hot map. unshuffle: side of the blocks of pixels
    that were made channels before.
    """

    keys: tuple[str, ...]
    start: int | Literal["last"] = 0
    further: int = 0
    colours: Literal["", "unit", "signed"] = ""
    unshuffle: int = 1


#: By name: one-hot maps behind the image's channels; OASIS (arXiv:2012.04781) with 64 channels of
#: noise and one of what nobody labelled before the map, which its Cityscapes models, in that data
#: set's own 34 numbers, have behind it; SPADE (arXiv:1903.07291) and SDM
#: (arXiv:2207.00050), whose channels of what nobody labelled and of instance edges are behind it;
#: ControlNet (arXiv:2302.05543) and T2I-Adapter (arXiv:2302.08453) of diffusers; PITI
#: (arXiv:2205.12952), whose encoder sees colours.
HOSTS = {
    "one-hot": Host(("conv_in.weight",), start="last"),
    "oasis": Host(("*fc.weight", "*.mlp_shared.0.weight"), start=65),
    "oasis-cityscapes": Host(("*fc.weight", "*.mlp_shared.0.weight"), start=64, further=1),
    "spade": Host(("fc.weight", "*.mlp_shared.0.weight"), further=2),
    "controlnet": Host(("*controlnet_cond_embedding.conv_in.weight",), colours="unit"),
    "t2i-adapter": Host(("*adapter.conv_in.weight",), colours="unit", unshuffle=8),
    "piti": Host(("*encoder.cnn.conv1.weight",), colours="signed"),
}


def fold(
    weight: Tensor,
    matrix: Tensor,
    palette: Tensor | None = None,
    unshuffle: int = 1,
    start: int | Literal["last"] = 0,
    further: int = 0,
    signed: bool = False,
) -> Tensor:
    """The weight (O, C', kh, kw) of a convolution that reads target maps in place of source maps.

    weight: (O, C, kh, kw). matrix: (N_s, N_t), its columns sum to 1. palette: (3, N_s) in [0, 1]
    for a layer that reads colours, `signed` where it reads them in [-1, 1]; what results reads
    one-hot target maps. unshuffle: side of the blocks of pixels that `PixelUnshuffle` made
    channels. start: first channel of the map, or "last"; further: most channels behind it. Other
    channels stay as they are. Raises GuidekitError where the channels do not fit, and for mixed
    colours, which are those of other classes.
    """
    if palette is not None:
        _check_colours(weight, matrix, unshuffle)
        matrix = (2 * palette - 1 if signed else palette).to(matrix) @ matrix
    own, depth = len(matrix), unshuffle**2
    channels = weight.shape[1] // depth
    first = channels - own if start == "last" else start
    behind = channels - first - own
    if weight.ndim != 4 or weight.shape[1] % depth or first < 0 or not 0 <= behind <= further:
        raise GuidekitError(
            f"the layer reads {weight.shape[1]} channels, and a map of {own} from channel {first} "
            f"in blocks of {depth} does not fit; give the label set that the model was trained on, "
            "and where the map is if the layer reads more (start, further)"
        )
    # Channel c * r^2 + k is pixel k of a block in channel c.
    parts = weight.unflatten(1, (channels, depth))
    before, middle, after = parts.tensor_split((first, first + own), 1)
    folded = torch.einsum("ocdhw,ct->otdhw", middle, matrix.to(middle))
    return torch.cat([before, folded, after], 1).flatten(1, 2)


def _check_colours(weight: Tensor, matrix: Tensor, unshuffle: int) -> None:
    """Raises GuidekitError for a layer that reads no image, and for an affinity that mixes it."""
    if ((matrix != 0) & (matrix != 1)).any():
        raise GuidekitError(
            "a soft affinity mixes the colours of a palette into those of other classes; fold a "
            "hard one"
        )
    if weight.shape[1] != 3 * unshuffle**2:
        raise GuidekitError(
            f"the layer reads {weight.shape[1]} channels, which is no image in blocks of "
            f"{unshuffle}x{unshuffle} pixels; give the side of its blocks (unshuffle=16 for SDXL's "
            "T2I-Adapters), or no palette if it reads classes"
        )


def fold_state(
    state: Mapping[str, Tensor],
    host: str | Host,
    matrix: Tensor,
    palette: Tensor | None = None,
    unshuffle: int | None = None,
) -> dict[str, Tensor]:
    """A state dict whose layers of `host` read target maps; all other weights are the same.

    host: a name of HOSTS or one of your own. unshuffle: in place of the host's; SDXL's T2I-Adapters
    have 16. Raises GuidekitError for a name that there is not, for a state without such layers, and
    as `fold`.
    """
    if isinstance(host, str):
        if host not in HOSTS:
            raise GuidekitError(f"no host {host!r}; there are {', '.join(HOSTS)}")
        host = HOSTS[host]
    if bool(host.colours) != (palette is not None):
        kind = "reads colours: give the palette" if host.colours else "reads no colours"
        raise GuidekitError(f"this host {kind}")
    found = [name for name in state if any(fnmatchcase(name, key) for key in host.keys)]
    if not found:
        raise GuidekitError(
            f"no weight is called {' or '.join(host.keys)}; give the state dict of such a model"
        )
    side, signed = unshuffle or host.unshuffle, host.colours == "signed"
    place = (side, host.start, host.further, signed)
    return dict(state) | {name: fold(state[name], matrix, palette, *place) for name in found}
