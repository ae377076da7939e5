"""A fitted head: a torch module on denoiser features, saved as safetensors and JSON.

The file says what the features were (sites, timesteps, clean or noised, pooling, normalisation) and
which backbone they came from; loading it with another backbone is refused, since a head whose
training and test features differ is worthless without any sign of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guidekit.backbones.denoiser import Denoiser
from guidekit.errors import GuidekitError
from guidekit.heads.data import KINDS
from guidekit.heads.features import (
    Maps,
    Reading,
    fixed_noise,
    joined,
    observe,
    pooled,
)
from guidekit.heads.files import CONFIG, WEIGHTS, write_head
from guidekit.heads.fingerprint import fingerprint, same_backbone
from guidekit.system.untrusted import MOST_LAYERS, read_fields, read_object, read_weights
from guidekit.taps import find_sites

FORMAT = 2
RANDOM = "random"  # the name of a head that nobody fitted


@dataclass(frozen=True)
class HeadConfig:
    """What a head reads and says. `backbone` is its fingerprint, `scores` what fitting found."""

    kind: str  # classes | labels | masks
    classes: tuple[str, ...]
    reading: Reading
    channels: int  # of the joined features
    hidden: tuple[int, ...] = ()  # widths of the layers before the last; none: linear
    grid: tuple[int, int] | None = None  # of a mask head's output
    values: tuple[int, ...] = ()  # of the classes in the files of masks
    backbone: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)


class Readout(nn.Module):
    """Normalisation, 1x1 convolutions with ReLU between them, temperature."""

    def __init__(self, channels: int, hidden: tuple[int, ...], classes: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("temperature", torch.ones(()))
        layers, width = [], channels
        for next_width in hidden:
            layers += [nn.Conv2d(width, next_width, 1), nn.ReLU()]
            width = next_width
        self.net = nn.Sequential(*layers, nn.Conv2d(width, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes, h, w) of joined features (B, C, h, w)."""
        x = (x - self.mean[:, None, None]) / self.std[:, None, None]
        return self.net(x) / self.temperature


class Head(nn.Module):
    """Logits of classes, labels or masks from denoiser features.

    A head of clean features reads all its timesteps at once; one of noised features has a readout
    for each timestep, so that it can also read the sampler's own call at any noise level.
    """

    def __init__(self, config: HeadConfig):
        super().__init__()
        if config.kind not in KINDS:
            raise GuidekitError(f"no kind of head {config.kind!r}; there are {', '.join(KINDS)}")
        self.config = config
        count = len(config.reading.timesteps) if config.reading.noised else 1
        with torch.random.fork_rng(devices=[]):  # first weights leave the global generator alone
            self.readouts = nn.ModuleList(
                Readout(config.channels, config.hidden, len(config.classes)) for _ in range(count)
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes or labels."""
        return self.config.classes

    def index(self, name: str) -> int:
        """The index of a class; ValueError, naming them all, for one that does not exist."""
        if name not in self.classes:
            raise GuidekitError(f"the head has no class {name!r}; it has {', '.join(self.classes)}")
        return self.classes.index(name)

    def assembled(self, rows: Sequence[Maps]) -> Tensor:
        """Features of one readout (B, C, h, w) out of the maps of its timesteps."""
        reading = self.config.reading
        if self.config.kind == "masks":
            return torch.cat([joined(m, reading.sites, self.config.grid) for m in rows], 1)
        return torch.cat([pooled(m, reading.sites, reading.pool) for m in rows], 1)[..., None, None]

    def forward(self, rows: Sequence[Maps]) -> Tensor:
        """Logits (B, classes), or (B, classes, h, w) of masks, from the maps of every timestep.

        Those of several readouts are averaged.
        """
        if not self.config.reading.noised:
            return self._shaped(self.readouts[0](self.assembled(rows)))
        parts = [r(self.assembled([m])) for r, m in zip(self.readouts, rows, strict=True)]
        return self._shaped(torch.stack(parts).mean(0))

    def at_timestep(self, maps: Maps, timestep: float) -> Tensor:
        """Logits by the readout of noised features whose timestep is nearest."""
        known = self.config.reading.timesteps
        nearest = min(range(len(known)), key=lambda i: abs(known[i] - timestep))
        return self._shaped(self.readouts[nearest](self.assembled([maps])))

    def _shaped(self, logits: Tensor) -> Tensor:
        return logits if self.config.kind == "masks" else logits[..., 0, 0]

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (B,), in masks the mean over all pixels (Graikos et al. 2023).

        target: (B, classes) shares that sum to 1, or 0/1 of labels with NaN where it does not
        matter, or (B, classes, h, w) shares of masks, all zero where unlabelled.
        """
        if self.config.kind == "labels":
            wanted = torch.nan_to_num(target)
            each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
            asked = ~target.isnan()
            return (each * asked).sum(1) / asked.sum(1).clamp(min=1)
        each = -(target * logits.log_softmax(1)).sum(1)
        return each if self.config.kind == "classes" else each.mean((1, 2))

    def confidence(self, logits: Tensor, target: Tensor) -> Tensor:
        """Probability of the target (B,): of all wanted labels, in masks the mean over pixels."""
        if self.config.kind == "labels":
            p = torch.where(target > 0.5, logits.sigmoid(), (-logits).sigmoid())
            return torch.where(target.isnan(), 1.0, p).prod(1)
        p = (target * logits.softmax(1)).sum(1)
        if self.config.kind == "classes":
            return p
        return p.sum((1, 2)) / target.sum((1, 2, 3)).clamp(min=1e-6)

    @torch.no_grad()
    def predict(self, denoiser: Denoiser, images: Tensor) -> Tensor:
        """Logits of real or finished images (B, C, H, W) in [-1, 1]."""
        x0 = denoiser.latents(images.to(denoiser.device))
        eps = fixed_noise(range(len(x0)), tuple(x0.shape[1:]))
        return self(observe(denoiser, x0, self.config.reading, eps[:1].expand_as(eps)))

    def check(self, denoiser: Denoiser) -> None:
        """Raises GuidekitError for another backbone than the head was fitted on."""
        found = fingerprint(denoiser)
        if not same_backbone(found, self.config.backbone, self.config.reading.noised):
            raise GuidekitError(
                f"the head was fitted on another backbone ({self.config.backbone['class']}, hash "
                f"{self.config.backbone['shapes'][:8]}; this is {found['class']}, hash "
                f"{found['shapes'][:8]}, or has other weights or noise levels); fit it again with "
                "guidekit fit"
            )

    def save(self, folder: str | Path) -> Path:
        """Writes head.safetensors and head.json into a new folder."""
        return write_head(folder, self, self.config, FORMAT)


def load_head(folder: str | Path, denoiser: Denoiser | None = None) -> Head:
    """The head of a folder, checked against the denoiser if one is given.

    Raises GuidekitError for a folder that is no head, is damaged, or belongs to another backbone.
    """
    folder = Path(folder)
    try:
        table, weights = read_object(folder / CONFIG), read_weights(folder / WEIGHTS)
    except FileNotFoundError:
        raise GuidekitError(
            f"{folder} is no head ({CONFIG} and {WEIGHTS}); make one with guidekit fit"
        ) from None
    except (OSError, ValueError) as error:
        raise GuidekitError(f"the head {folder} is damaged ({error}); fit it again") from None
    if table.get("kind") == "readout":
        raise GuidekitError(f"the head {folder} reads out a map; it goes with the plugin readout")
    if table.pop("format", None) != FORMAT:
        raise GuidekitError(f"the head {folder} has another format; fit it again")
    try:
        config = _config(table)
        _check_shapes(config, weights)
        head = Head(config)
        head.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        raise GuidekitError(f"the head {folder} is damaged ({error}); fit it again") from None
    if denoiser is not None:
        head.check(denoiser)
        find_sites(denoiser.model, list(head.config.reading.sites), kind="block")
    return head.eval().requires_grad_(False)


def _config(table: dict) -> HeadConfig:
    """What head.json says; ValueError for keys or values that no head has."""
    reading = Reading(**read_fields(Reading, table.get("reading"), "`reading`"))
    config = HeadConfig(**read_fields(HeadConfig, table | {"reading": reading}, CONFIG))
    if not all(isinstance(config.backbone.get(k), str) for k in ("class", "shapes")):
        raise ValueError("`backbone` lacks `class` and `shapes`, which say what it was fitted on")
    if max(len(config.hidden), len(reading.timesteps)) > MOST_LAYERS:
        raise ValueError(f"it has more than {MOST_LAYERS} layers or timesteps")
    return config


def _check_shapes(config: HeadConfig, weights: dict[str, Tensor]) -> None:
    """Raises ValueError for weights of other shapes, before memory is taken for the head's own."""
    with torch.device("meta"):
        wanted = {k: v.shape for k, v in Head(config).state_dict().items()}
    if wanted != (found := {k: v.shape for k, v in weights.items()}):
        wrong = min(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        raise ValueError(f"{wrong} is {found.get(wrong)}, not {wanted.get(wrong)}")


def random_head(denoiser: Denoiser) -> Head:
    """A head of two classes on the middle of any backbone that nobody fitted.

    Random but fixed weights; what it steers to has no meaning. For tests, and as the row of
    benchmarks that shows what labels add.
    """
    from guidekit.heads.features import default_sites

    sites = default_sites(denoiser, "classes")[:1]
    reading = Reading(sites, (500,))
    _, h, w = denoiser.latent_shape(None, None)
    z = torch.zeros(1, denoiser.latent_shape(None, None)[0], h, w, device=denoiser.device)
    with torch.no_grad():
        (maps,) = observe(denoiser, z, reading)
    channels = maps[sites[0]].shape[1]
    head = Head(
        HeadConfig("classes", ("a", "b"), reading, channels, backbone=fingerprint(denoiser))
    )
    generator = torch.Generator().manual_seed(0)
    for readout in head.readouts:
        last = readout.net[-1]
        last.weight.data = torch.randn(last.weight.shape, generator=generator)
        last.bias.data.zero_()
    return head.eval().requires_grad_(False)
