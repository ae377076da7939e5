"""Features of a frozen denoiser at named sites and noise levels, streamed through a disk cache.

The paper feeds the clean image with a fixed timestep (Graikos et al. 2023, section 3.1); noising
it to that timestep first is what Baranchuk et al. 2022 (arXiv:2112.03126) do.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit.backbones.denoiser import Denoiser, frozen
from guidekit.backbones.records import site_features
from guidekit.blocks import BlockCall
from guidekit.conditions import Condition
from guidekit.engine.capture import StopForward
from guidekit.errors import GuidekitError
from guidekit.heads.fingerprint import fingerprint
from guidekit.taps import find_sites, tap_blocks

Maps = dict[str, Tensor]  # features (B, C, h, w) by site

# Random numbers that noise the images of a fit come from here.
NOISE_SEED = 0x5EED


@dataclass(frozen=True)
class Reading:
    """Which features a head reads.

    sites: blocks, in the order in which their channels are joined. timesteps: in the model's own
    units, 0 to 1000. noised: the input is noised to the timestep, else it is clean. pool: side of
    the grid that features are averaged to for a head of whole images; 0 keeps the maps. prompt:
    what a model that reads text is told.
    """

    sites: tuple[str, ...]
    timesteps: tuple[int, ...]
    noised: bool = False
    pool: int = 1
    prompt: str = ""


def default_sites(denoiser: Denoiser, kind: str) -> tuple[str, ...]:
    """Sites where nobody named any: all decoder blocks for masks, the middle for whole images.

    Transformers have no decoder: the blocks at half and three quarters of the depth.
    """
    blocks = find_sites(denoiser.model, "*", kind="block")
    decoder = [b for b in blocks if b.startswith("up_blocks.") and b.count(".") == 1]
    if decoder:
        return tuple(decoder) if kind == "masks" else ("mid_block", decoder[0])
    top = [b for b in blocks if b.count(".") == 1]
    return tuple(dict.fromkeys(top[int(len(top) * share)] for share in (0.5, 0.75)))


def resolve_sites(denoiser: Denoiser, patterns: Sequence[str], kind: str) -> tuple[str, ...]:
    """Blocks that the wildcards match, in the model's order; ValueError if one matches none."""
    if not patterns:
        return default_sites(denoiser, kind)
    return tuple(find_sites(denoiser.model, list(patterns), kind="block"))


def noise_level(denoiser: Denoiser, timestep: int) -> tuple[float, float]:
    """(a, s) of z = a x0 + s eps at a timestep of the model."""
    table = getattr(denoiser.pipeline.scheduler, "alphas_cumprod", None)
    if table is None:  # flow models: t / 1000 of noise
        return 1 - timestep / 1000, timestep / 1000
    if not 0 <= timestep < len(table):
        raise GuidekitError(f"timestep {timestep} lies outside of 0 to {len(table) - 1}")
    alpha_bar = float(table[timestep])
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def noised(denoiser: Denoiser, x0: Tensor, timestep: int, eps: Tensor) -> Tensor:
    """x0 (B, C, h, w) with as much of eps as the model expects at the timestep."""
    a, s = noise_level(denoiser, timestep)
    return a * x0 + s * eps.to(x0)


def told(denoiser: Denoiser, prompt: str) -> tuple[str | int, bool]:
    """Content and null flag of what a head's calls tell the model: the prompt, or its null."""
    null = denoiser.cfg > 1 or denoiser.reads_image
    return Condition(prompt).content, not prompt and null


def read_features(
    denoiser: Denoiser, x: Tensor, timestep: int, sites: Sequence[str], prompt: str = ""
) -> Maps:
    """Features of one call on model input x (B, C, h, w), which ends after the last site.

    With gradient if x has one and gradients are on.
    """
    found: Maps = {}

    def keep(call: BlockCall) -> None:
        grid = tuple(x.shape[-2:])
        found[call.site] = site_features(denoiser.model, call.site, call.run(), grid).float()
        if len(found) == len(sites):
            raise StopForward

    content, null = told(denoiser, prompt)
    size = tuple(side * denoiser.factor for side in x.shape[-2:])
    text = denoiser.text([content] * len(x), size, null)
    step = torch.as_tensor(timestep, device=x.device)
    with tap_blocks(denoiser.model, keep, list(sites)), suppress(StopForward):
        denoiser(x.to(denoiser.dtype), step, text)
    return found


def observe(denoiser: Denoiser, x0: Tensor, reading: Reading, eps: Tensor | None = None) -> list:
    """Features by site at every timestep of the reading, for clean latents x0 (B, C, h, w)."""
    rows = []
    for timestep in reading.timesteps:
        x = noised(denoiser, x0, timestep, eps) if reading.noised else x0
        rows.append(read_features(denoiser, x, timestep, reading.sites, reading.prompt))
    return rows


def fixed_noise(numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Noise (B, *shape) of numbered images, the same whatever their batch."""
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(NOISE_SEED + n))
            for n in numbers
        ]
    )


def pooled(maps: Maps, sites: Sequence[str], side: int) -> Tensor:
    """Features averaged to side x side cells and joined over sites: (B, D)."""
    return torch.cat([F.adaptive_avg_pool2d(maps[s], side).flatten(1) for s in sites], 1)


def joined(maps: Maps, sites: Sequence[str], grid: tuple[int, int]) -> Tensor:
    """Features at one grid, nearest as in the paper, joined over sites: (B, sum of C, h, w)."""
    return torch.cat([F.interpolate(maps[s], grid, mode="nearest") for s in sites], 1)


class FeatureCache:
    """Features of all examples as arrays on disk; memory holds a batch at a time.

    A complete array is used again for the same backbone, images and reading.
    """

    def __init__(self, folder: Path, key: dict):
        text = json.dumps(key, sort_keys=True, default=str)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:24]
        self.folder.mkdir(parents=True, exist_ok=True)

    def arrays(self, count: int, rows: Callable[[range], dict[str, Tensor]], batch: int) -> dict:
        """Memory-mapped arrays (count, ...) by name, computed batch by batch if not there."""
        done = self.folder / "names.json"
        if not done.exists():
            names = self._fill(count, rows, batch)
            done.write_text(json.dumps(names))
        names = json.loads(done.read_text())
        return {name: np.load(self._file(name), mmap_mode="r") for name in names}

    def _fill(self, count: int, rows: Callable[[range], dict[str, Tensor]], batch: int) -> list:
        arrays: dict[str, np.memmap] = {}
        for first in range(0, count, batch):
            part = range(first, min(first + batch, count))
            for name, values in rows(part).items():
                if name not in arrays:
                    shape = (count, *values.shape[1:])
                    arrays[name] = np.lib.format.open_memmap(
                        self._file(name), "w+", np.float32, shape
                    )
                arrays[name][part.start : part.stop] = values.cpu().numpy()
        for array in arrays.values():
            array.flush()
        return list(arrays)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


@contextmanager
def cache_folder(folder: Path | None) -> Iterator[Path]:
    """The folder that the user named, or one that goes when the fit is done."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="guidekit-features-") as made:
        yield Path(made)


def collect(
    denoiser: Denoiser,
    pictures: Callable[[Sequence[int]], Tensor],
    count: int,
    reading: Reading,
    folder: Path,
    key: str,
    batch: int = 16,
) -> dict[str, np.ndarray]:
    """Features of `count` images, on disk: "t.site" to (count, D), or (count, C, h, w).

    images: (B, C, H, W) in [-1, 1] by index. With `pool` 0 the maps themselves.
    """

    def rows(part: range) -> dict[str, Tensor]:
        x0 = denoiser.latents(pictures(list(part)).to(denoiser.device))
        eps = fixed_noise(part, tuple(x0.shape[1:]))
        found = {}
        for t, maps in zip(reading.timesteps, observe(denoiser, x0, reading, eps), strict=True):
            for site in reading.sites:
                values = maps[site] if reading.pool == 0 else pooled(maps, [site], reading.pool)
                found[f"{t}.{site}"] = values
        return found

    identity = asdict(reading) | {"backbone": fingerprint(denoiser), "key": key, "count": count}
    with torch.no_grad(), frozen(*denoiser.models):
        return FeatureCache(folder, identity).arrays(count, rows, batch)
