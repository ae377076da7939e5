"""Readout heads: a dense target (depth, edges, ...) from noisy features, at every noise level.

Luo, Darrell, Wang, Goldman, Holynski: Readout Guidance: Learning Control from Diffusion Features,
CVPR 2024, arXiv:2312.02150, section 3.1: features of several blocks are projected to one width and
mixed by learned weights (as in Diffusion Hyperfeatures, Luo et al. 2023, arXiv:2305.14334), the
timestep is told, and a few convolutions read the target out.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guidekit.backbones.denoiser import Denoiser
from guidekit.errors import GuidekitError
from guidekit.heads.features import Maps, read_features, resolve_sites
from guidekit.heads.files import CONFIG, WEIGHTS, write_head
from guidekit.heads.fingerprint import fingerprint, same_backbone
from guidekit.system.untrusted import MOST_LAYERS, read_fields, read_object, read_weights

FORMAT = 1
KIND = "readout"
WIDTH = 64


@dataclass(frozen=True)
class ReadoutConfig:
    """What a readout head reads and says. `backbone` is its fingerprint, `scores` what it got."""

    sites: tuple[str, ...]
    channels: tuple[int, ...]  # of each site
    targets: int  # channels of the target
    grid: tuple[int, int]  # of the target: the latents'
    width: int = WIDTH
    prompt: str = ""  # what a model that reads text was told
    kind: str = KIND
    backbone: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)


class ReadoutHead(nn.Module):
    """A dense target (B, D, h, w) from features by site, at a timestep from 0 to 1000."""

    def __init__(self, config: ReadoutConfig):
        super().__init__()
        self.config, width = config, config.width
        self.register_buffer("mean", torch.zeros(config.targets))
        self.register_buffer("std", torch.ones(config.targets))
        with torch.random.fork_rng(devices=[]):  # first weights leave the global generator alone
            torch.manual_seed(0)
            self.projections = nn.ModuleList(nn.Conv2d(c, width, 1) for c in config.channels)
            self.mixing = nn.Parameter(torch.zeros(len(config.sites)))
            self.time = nn.Linear(width, width)
            self.inner = nn.Conv2d(width, width, 3, padding=1)
            self.last = nn.Conv2d(width, config.targets, 3, padding=1)

    def forward(self, maps: Maps, timestep: float | Tensor) -> Tensor:
        """The target in units of its own deviation, from features (B, C, h, w) by site."""
        mixed = None
        for weight, project, site in zip(
            self.mixing.softmax(0), self.projections, self.config.sites, strict=True
        ):
            normed = F.layer_norm(maps[site].movedim(1, -1), maps[site].shape[1:2]).movedim(-1, 1)
            part = F.interpolate(project(normed), self.config.grid, mode="bilinear")
            mixed = weight * part if mixed is None else mixed + weight * part
        told = self.time(_waves(timestep, self.config.width, mixed))
        return self.last(F.silu(self.inner(F.silu(mixed + told[:, None, None]))))

    def standard(self, target: Tensor) -> Tensor:
        """A target (B, D, h, w) in the head's units."""
        return (target - self.mean[:, None, None]) / self.std[:, None, None]

    def loss(self, found: Tensor, target: Tensor) -> Tensor:
        """Mean squared difference (B,) to a target in the head's units; NaN is free."""
        asked = ~target.isnan()
        apart = (found - torch.nan_to_num(target)).square() * asked
        return apart.sum((1, 2, 3)) / asked.sum((1, 2, 3)).clamp(min=1)

    def check(self, denoiser: Denoiser) -> None:
        """Raises GuidekitError for another backbone than the head was fitted on."""
        if not same_backbone(fingerprint(denoiser), self.config.backbone, True):
            raise GuidekitError(
                "the readout head was fitted on another backbone, or one of other weights or noise "
                "levels; fit it again with guidekit fit --kind readout"
            )

    def save(self, folder: str | Path) -> Path:
        """Writes head.safetensors and head.json into a new folder."""
        return write_head(folder, self, self.config, FORMAT)


def _waves(timestep: float | Tensor, width: int, like: Tensor) -> Tensor:
    """Sines and cosines (width,) of a timestep from 0 to 1000, as transformers have positions."""
    rates = torch.exp(-math.log(1e4) * torch.arange(width // 2, device=like.device) / (width // 2))
    angles = torch.as_tensor(timestep, device=like.device).float() * rates
    return torch.cat([angles.sin(), angles.cos()]).to(like)


def load_readout(folder: str | Path, denoiser: Denoiser) -> ReadoutHead:
    """The readout head of a folder, checked against the denoiser.

    Raises GuidekitError for a folder that is none, is damaged, or belongs to another backbone.
    """
    folder = Path(folder)
    try:
        table = read_object(folder / CONFIG)
        kind, number = table.get("kind"), table.pop("format", None)
        if kind != KIND or number != FORMAT:
            raise GuidekitError(
                f"the head {folder} is one of {kind!r}, format {number}; a readout head is made by "
                "guidekit fit --kind readout, and others go with fewshot"
            )
        config = ReadoutConfig(**read_fields(ReadoutConfig, table, CONFIG))
        _check_config(config)
        weights = read_weights(folder / WEIGHTS)
        head = ReadoutHead(config)
        head.load_state_dict(weights)
    except FileNotFoundError:
        raise GuidekitError(
            f"{folder} is no head ({CONFIG} and {WEIGHTS}); make one with guidekit fit"
        ) from None
    except GuidekitError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise GuidekitError(f"the head {folder} is damaged ({error}); fit it again") from None
    head.check(denoiser)
    return head.eval().requires_grad_(False)


def _check_config(config: ReadoutConfig) -> None:
    """Raises ValueError for what no head has, before memory is taken for its weights."""
    counts = (config.targets, config.width, *config.channels, *config.grid)
    if not all(0 < n <= 2**14 for n in counts) or len(config.channels) != len(config.sites):
        raise ValueError("its channels, sites or grid are those of no head")
    if len(config.sites) > MOST_LAYERS:
        raise ValueError(f"it has more than {MOST_LAYERS} sites")


def new_readout(
    denoiser: Denoiser, targets: int, patterns: tuple[str, ...] = (), prompt: str = ""
) -> ReadoutHead:
    """A head of first weights, for targets of so many channels on the blocks of wildcards.

    None are a UNet's decoder, or two blocks of a transformer. Raises GuidekitError for a wildcard
    that matches nothing.
    """
    sites = resolve_sites(denoiser, patterns, "masks")
    shape = denoiser.latent_shape(None, None)
    z = torch.zeros(1, *shape, device=denoiser.device)
    with torch.no_grad():
        maps = read_features(denoiser, z, 500, sites, prompt)
    channels = tuple(maps[site].shape[1] for site in sites)
    own = {"prompt": prompt, "backbone": fingerprint(denoiser)}
    config = ReadoutConfig(sites, channels, targets, shape[1:], **own)
    return ReadoutHead(config).to(denoiser.device)
