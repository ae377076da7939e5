"""A CLIP whose image encoder reads noisy images or latents at any noise level.

Liu et al.: More Control for Free! Image Synthesis with Semantic Diffusion Guidance, WACV 2023,
arXiv:2112.05744, section 3.2. The input is z / sqrt(a^2 + s^2) and the level its log
signal-to-noise ratio, so that one encoder serves every scheduler.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import guidekit
from guidekit.backbones.loading import LOAD_ERRORS
from guidekit.errors import GuidekitError
from guidekit.noise import Level
from guidekit.noisy_clip.files import (
    NOISY_CONFIG,
    NOISY_WEIGHTS,
    Clip,
    build,
    built_in,
    find_folder,
    folder_config,
    folder_tokenizer,
    halved,
    write_config,
)
from guidekit.noisy_clip.norms import LevelEmbedding, at_level, make_adaptive
from guidekit.system.untrusted import read_fields, read_object, read_weights


@dataclass(frozen=True)
class Seen:
    """What the encoder sees in B inputs: an embedding (B, D) and maps of stages (B, C, h, w)."""

    embedding: Tensor
    stages: list[Tensor]


@dataclass(frozen=True)
class Own:
    """What noisy_clip.json says of a `NoisyClip`: its arguments, and guidekit's version."""

    width: int
    channels: int
    factor: int
    size: int
    guidekit: str

    def __post_init__(self):
        if not (0 < self.width <= 2**16 and 0 <= self.channels <= 2**10 and 0 < self.factor <= 64):
            raise GuidekitError(f"{NOISY_CONFIG} has sizes that no encoder has; train it again")


class CleanClip(nn.Module):
    """An open_clip model as it is: what it sees in clean images, and its texts."""

    def __init__(self, clip: Clip):
        super().__init__()
        self.clip, self.tokenizer, self.config = clip.model, clip.tokenizer, clip.config
        self.size = clip.size
        for name in ("mean", "std"):
            value = torch.tensor(clip.config["preprocess_cfg"][name]).view(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    @property
    def visual(self) -> nn.Module:
        """The image encoder."""
        return self.clip.visual

    def sees(self, pixels: Tensor, stages: Sequence[int] = ()) -> Seen:
        """What it sees in clean images (B, 3, H, W) in [-1, 1] of any size."""
        return look(self.visual, self.normalised(pixels), stages)

    @property
    def stage_count(self) -> int:
        """Number of maps that the encoder can show."""
        blank = self.mean.new_zeros(1, 3, *self.size)
        with torch.no_grad():
            return len(self.visual.forward_intermediates(blank)["image_intermediates"])

    def normalised(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] at the encoder's size, with its mean and spread."""
        return ((resized(pixels, self.size) + 1) / 2 - self.mean) / self.std

    def texts(self, texts: list[str]) -> Tensor:
        """Embeddings (len(texts), D) of length 1."""
        ids = self.tokenizer(texts).to(self.mean.device)
        with torch.no_grad():
            return self.clip.encode_text(ids, normalize=True)


class NoisyClip(CleanClip):
    """An open_clip model whose image encoder knows the noise level; its texts stay as they were.

    clip: any open_clip model, ResNet, ViT or timm's; it is copied. width: of the level's embedding.
    channels: 0 for pixels, else the channels of latents, which a small stem turns into an image
    `factor` times as large. size: side of the images that it is trained on, 0 for any; a smaller
    or larger one has other noise once it is resized. Without a stem it begins as the frozen encoder
    at every level.
    """

    def __init__(
        self, clip: Clip, width: int = 256, channels: int = 0, factor: int = 1, size: int = 0
    ):
        super().__init__(replace(clip, model=copy.deepcopy(clip.model)))
        self.own = {"width": width, "channels": channels, "factor": factor, "size": size}
        self.norms = make_adaptive(self.visual, width)
        self.level = LevelEmbedding(width)
        self.stem = stem(channels, factor) if channels else nn.Identity()

    @property
    def channels(self) -> int:
        """Channels of the input: 3 of pixels, or those of latents."""
        return self.own["channels"] or 3

    @property
    def trained_size(self) -> int:
        """Side of the images that it was trained on; 0 for any."""
        return self.own["size"]

    @property
    def reads_latents(self) -> bool:
        """Whether the input is latents."""
        return bool(self.own["channels"])

    def trained(self) -> list[nn.Parameter]:
        """The weights that training moves: the image encoder's, not the text encoder's."""
        parts = (self.visual, self.level, self.stem)
        return [weight for part in parts for weight in part.parameters()]

    def train(self, mode: bool = True) -> "NoisyClip":
        """Training mode; the BatchNorms keep the statistics of clean images."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def at(self, z: Tensor, level: Level, stages: Sequence[int] = ()) -> Seen:
        """What it sees in a carried sample z (B, C, h, w) of a scheduler's level."""
        logsnr = z.new_full((len(z),), level.logsnr)
        return self(z / (level.a**2 + level.s**2) ** 0.5, logsnr, stages)

    def forward(self, x: Tensor, logsnr: Tensor, stages: Sequence[int] = ()) -> Seen:
        """x (B, C, h, w) = a x0 + s eps with a^2 + s^2 = 1, x0 in [-1, 1] or latents; logsnr (B,).

        stages: which maps are kept, the first being 0; none by default.
        """
        with at_level(self.norms, self.level(logsnr)):
            return look(self.visual, self.normalised(self.stem(x)), stages)

    def sees(self, pixels: Tensor, stages: Sequence[int] = ()) -> Seen:
        """What it sees in clean images (B, 3, H, W) in [-1, 1]: its view at the clean end."""
        return self(pixels, pixels.new_full((len(pixels),), torch.inf), stages)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes configuration, weights in half precision and tokenizer."""
        folder = Path(folder)
        write_config(folder, self.config, self.tokenizer)
        own = self.own | {"guidekit": guidekit.__version__}
        (folder / NOISY_CONFIG).write_text(json.dumps(own, indent=1) + "\n")
        save_file(halved(self), folder / NOISY_WEIGHTS)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "NoisyClip":
        """A noise-aware CLIP from a folder or a built-in's name, in float32, ready to use.

        Raises GuidekitError for what is none.
        """
        folder = find_folder(name)
        if folder is None or not (folder / NOISY_CONFIG).exists():
            raise GuidekitError(
                f"no noise-aware CLIP {str(name)!r}: not a folder with {NOISY_CONFIG} and not a "
                f"built-in ({', '.join(built_in(noisy=True))}); train one with guidekit train, "
                "task noisy-clip"
            )
        config, own = folder_config(folder), read_object(folder / NOISY_CONFIG)
        own = asdict(Own(**read_fields(Own, own, str(folder / NOISY_CONFIG))))
        del own["guidekit"]
        weights = read_weights(folder / NOISY_WEIGHTS)
        try:
            with torch.random.fork_rng(devices=[]):
                made = cls(Clip(build(config), folder_tokenizer(folder), config), **own)
            made.load_state_dict(weights)
        except LOAD_ERRORS as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise GuidekitError(f"{folder} cannot be loaded: {first}; train it again") from None
        return made.eval().requires_grad_(False)


def is_noisy(name: str | Path) -> bool:
    """Whether a name or folder holds a noise-aware CLIP."""
    folder = find_folder(name)
    return folder is not None and (folder / NOISY_CONFIG).exists()


def look(visual: nn.Module, pictures: Tensor, stages: Sequence[int] = ()) -> Seen:
    """Embedding and chosen maps of normalised images, by open_clip's own reader.

    Raises GuidekitError for a stage that the encoder does not have.
    """
    if not stages:
        found = visual(pictures)
        return Seen(found[0] if isinstance(found, tuple) else found, [])
    found = visual.forward_intermediates(pictures, indices=None)
    maps = found["image_intermediates"]
    if not all(0 <= i < len(maps) for i in stages):
        raise GuidekitError(f"stages {list(stages)}: the encoder has 0 to {len(maps) - 1}")
    return Seen(found["image_features"], [maps[i] for i in stages])


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Images of another size; they are themselves where the size fits."""
    if pixels.shape[-2:] == size:
        return pixels
    return F.interpolate(pixels, size, mode="bilinear", antialias=True)


def stem(channels: int, factor: int, width: int = 64) -> nn.Sequential:
    """Latents (B, channels, h, w) to an image (B, 3, factor h, factor w)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(width, 3 * factor**2, 3, padding=1),
        nn.PixelShuffle(factor),
    )
