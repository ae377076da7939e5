"""A small CLIP of worlds that draw themselves, in open_clip's format: a ViT and a text transformer.

Radford et al. 2021 (arXiv:2103.00020). Scenes with the same caption are no negatives of one
another: a third of them show one object, of which `scenes` has 192.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from guidekit.errors import GuidekitError
from guidekit.images import heat_map
from guidekit.noisy_clip.data import turned
from guidekit.noisy_clip.files import Clip, build
from guidekit.noisy_clip.loss import info_nce
from guidekit.seeds import derived_seed
from guidekit.train.text import READ, TextOptions, tokenize, train_tokenizer
from guidekit.train.worlds import COLOURED
from guidekit.worlds import scenes

SHOWN = 24  # images of a preview
# Images in [-1, 1]: half of the range as mean and spread leaves them as they are.
PREPROCESS = {
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "mode": "RGB",
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


@dataclass(kw_only=True)
class ClipOptions:
    """Sizes of both encoders, and the worlds that they learn from.

    Raises GuidekitError for a world that there is not, one that comes twice, and none.
    """

    patch: int = 4
    width: int = 128
    layers: int = 5
    heads: int = 4
    embedding: int = 128
    text_width: int = 96
    text_layers: int = 2
    text_heads: int = 3
    length: int = 32  # tokens of a text
    vocabulary: int = 700
    alike: int = 4  # scenes that differ in shapes only, next to one another in a batch
    sources: tuple[str, ...] = ("scenes",)  # scenes, prints; as many images of each

    def __post_init__(self):
        known = set(self.sources) <= set(COLOURED)
        if not self.sources or not known or len(set(self.sources)) < len(self.sources):
            raise GuidekitError(
                f"sources is {list(self.sources)}; give one or more of {', '.join(COLOURED)}, each "
                "once"
            )


class Contrast(nn.Module):
    """InfoNCE of images and captions."""

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.clip = clip

    def forward(self, pixels: Tensor, ids: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """Loss of images `(B, 3, H, W)` and ids `(B, T)`; equal keys `(B,)` are one caption."""
        pictures, _ = self.clip.visual(pixels)
        texts = self.clip.encode_text(ids)
        return {
            "contrastive": info_nce(
                pictures, texts, self.clip.logit_scale.exp().clamp(max=100), keys
            )
        }


class ClipTask:
    """Trains both encoders on scenes and captions in many wordings."""

    def __init__(self, options: ClipOptions, size: int):
        self.size, self.alike = size, options.alike
        self.worlds = {name: COLOURED[name] for name in options.sources}
        rng, worlds = np.random.default_rng(0), self.worlds.values()
        self.tokenizer = train_tokenizer(
            TextOptions(length=options.length, vocabulary=options.vocabulary),
            [world.varied_caption(world.scene(i), rng) for world in worlds for i in range(READ)],
        )
        vision = {
            "image_size": size,
            "patch_size": options.patch,
            "width": options.width,
            "layers": options.layers,
            "head_width": options.width // options.heads,
            "output_tokens": True,
        }
        text = {
            "context_length": options.length,
            "vocab_size": len(self.tokenizer),
            "hf_tokenizer_name": "scenes",
            "width": options.text_width,
            "heads": options.text_heads,
            "layers": options.text_layers,
        }
        model = {"embed_dim": options.embedding, "vision_cfg": vision, "text_cfg": text}
        self.config = {"model_cfg": model, "preprocess_cfg": PREPROCESS | {"size": [size, size]}}
        self.net = self.whole_net()

    def whole_net(self) -> nn.Module:
        """A net of this form."""
        return Contrast(build(self.config).train().requires_grad_(True))

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Images, token ids of a wording of their captions, and what tells captions apart."""
        plans: dict[str, list[scenes.Scene]] = {}
        for number in numbers:
            name, plan = self.plan(number)
            plans.setdefault(name, []).append(plan)
        pixels, texts = [], []
        for name, own in plans.items():
            world = self.worlds[name]
            pixels.append(world.images(own, self.size))
            texts += [world.varied_caption(p, np.random.default_rng(p.number)) for p in own]
        return {
            "pixels": torch.cat(pixels),
            "ids": tokenize(self.tokenizer, texts),
            "keys": torch.tensor([_key(plan) for own in plans.values() for plan in own]),
        }

    def plan(self, number: int) -> tuple[str, scenes.Scene]:
        """The world of an image, which neighbours share, and its scene."""
        group, turn = divmod(number, self.alike)
        place, own = divmod(group, len(self.worlds))
        name, world = [*self.worlds.items()][own]
        return name, turned(world.scene(place), world.shapes, number, turn)

    def preview(self) -> Image.Image:
        """Cosines of held-out images (rows) and their captions (columns), a world after another."""
        pixels, texts = self.shown()
        model, device = self.net.clip, self.net.clip.logit_scale.device
        seen = nn.functional.normalize(model.visual(pixels.to(device))[0], dim=-1)
        read = model.encode_text(tokenize(self.tokenizer, texts).to(device), normalize=True)
        return heat_map((seen @ read.T).clamp(min=0))

    def shown(self) -> tuple[Tensor, list[str]]:
        """Held-out images (B, 3, H, W) and their captions, as many of every world."""
        pixels, texts = [], []
        for world in self.worlds.values():
            plans = [world.scene(i, "test") for i in range(SHOWN // len(self.worlds))]
            pixels.append(world.images(plans, self.size))
            texts += [plan.caption for plan in plans]
        return torch.cat(pixels), texts

    def export(self, folder: Path) -> None:
        """Saves model and tokenizer as open_clip's `local-dir:` reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        Clip(copy.deepcopy(self.net.clip).eval(), _Saved(self.tokenizer), self.config).save(folder)


class _Saved:
    """What a folder needs of the tokenizer; open_clip makes its own HFTokenizer of it."""

    def __init__(self, tokenizer):
        self.save_pretrained = tokenizer.save_pretrained


def _key(plan: scenes.Scene) -> int:
    """A number that scenes with the same objects and background share."""
    return derived_seed(plan.background, *sorted(thing.phrase for thing in plan.things))


def make(options: ClipOptions, folder: Path, size: int, quiet: bool = True) -> ClipTask:
    """The task of a recipe's stage, which needs nothing of earlier ones."""
    return ClipTask(options, size)


OPTIONS = ClipOptions  # of a recipe's stage
