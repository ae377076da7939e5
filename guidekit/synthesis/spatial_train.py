"""Training of a text-to-image model that reads a map of segments, after SpaText.

Avrahami et al., CVPR 2023, arXiv:2211.14305: the first layer is widened by the channels of an image
embedding, which begin at zero, and the whole denoiser is trained on. Segments are those of exact
masks here, the paper's those of a panoptic segmenter.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from guidekit.backbones.controls import Control
from guidekit.backbones.loading import quiet
from guidekit.backbones.segment_map import SegmentMap, painted, pooled, scaled, widened
from guidekit.conditions import Condition, Segment
from guidekit.errors import GuidekitError
from guidekit.images import sheet
from guidekit.labels import VOID
from guidekit.noisy_clip.files import load_clip
from guidekit.sampler import Sampling
from guidekit.synthesis.control_train import (
    CONTROL,
    LEVELS,
    ControlTask,
    halved,
    load_backbone,
)
from guidekit.synthesis.data import Examples, make_examples
from guidekit.train.beside import Backbone, BesideLoss, with_words

SHOWN = 8
MARGIN = 0.1  # of a segment's box that is seen around it
Embed = Callable[[Tensor], Tensor]  # crops (B, 3, S, S) in [-1, 1] to embeddings (B, d)


@dataclass(kw_only=True)
class SpatialOptions:
    """The backbone, what embeds segments, and the data."""

    backbone: str = "scenes"  # a Stable Diffusion pipeline, as for guidekit sample --model
    embedder: str = "scenes-clip"  # CLIP whose image embeddings a map holds, as load_clip names it
    source: str = "dense"  # dense (scenes, grounds as classes too) | prints | shots
    data: str = ""  # folder of the shots: images/, masks/, classes.json; they have no captions
    held_out: int = 0  # shots that are not trained on, but choose the checkpoint
    flips: bool = False  # mirrors shots at random
    segments: int = 3  # most segments of an image that its map shows
    wordless: float = 0.1  # share of the captions replaced by the empty prompt
    mapless: float = 0.1  # share of the maps replaced by zeros
    pairs: int = 512  # images whose segments the prior is fitted on
    ridge: float = 1.0  # of the prior, on standardised states

    def __post_init__(self):
        for name in ("segments", "pairs"):
            if getattr(self, name) < 1:
                raise GuidekitError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("wordless", "mapless"):
            if not 0 <= getattr(self, name) <= 1:
                raise GuidekitError(f"{name} must be from 0 to 1, not {getattr(self, name):g}")
        if not self.ridge > 0:
            raise GuidekitError(f"ridge must be above 0, not {self.ridge:g}")


class SpatialLoss(BesideLoss):
    """The widened UNet's loss."""

    def __init__(self, unet: nn.Module):
        super().__init__(unet)
        self.joined = unet  # a part of the module, and so trained

    def forward(
        self, z: Tensor, timestep: Tensor, states: Tensor, maps: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        """Error at latents z (B, C, h, w) with maps (B, d, h, w) beside them."""
        return self.error(torch.cat([z, maps], 1), timestep, states, target)


def segments_of(labels_map: Tensor, things: list[int]) -> list[tuple[int, Tensor]]:
    """Classes and masks (H, W) of the things in a one-hot map (N, H, W)."""
    present = [i for i in things if bool(labels_map[i].any())]
    return [(i, labels_map[i]) for i in present]


def crop(pixels: Tensor, mask: Tensor, side: int) -> Tensor:
    """A segment (3, side, side) of an image (3, H, W) in its box, on grey."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    length = max(bottom - top, right - left)
    length += 2 * max(1, round(MARGIN * length))
    alone = F.pad(pixels * mask, (length,) * 4)
    y, x = (top + bottom) // 2 + length, (left + right) // 2 + length
    half = length // 2
    window = alone[None, :, y - half : y - half + length, x - half : x - half + length]
    return F.interpolate(window, (side, side), mode="bilinear", antialias=True)[0]


def fitted_prior(states: Tensor, embeddings: Tensor, ridge: float) -> SegmentMap:
    """The ridge regression from states (n, D) to embeddings (n, d), as a layer."""
    x, y = states.double(), embeddings.double()
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    u, middle = (x - mean) / std, y.mean(0)
    gram = u.T @ u + ridge * torch.eye(u.shape[1], dtype=u.dtype)
    weight = torch.linalg.solve(gram, u.T @ (y - middle)).T / std
    found = SegmentMap(text_channels=x.shape[1], channels=y.shape[1])
    found.prior.weight.data = weight.float()
    found.prior.bias.data = (middle - weight @ mean).float()
    return found.eval().requires_grad_(False)


class SpatialTask(ControlTask):
    """Trains the widened UNet of a Stable Diffusion pipeline."""

    def __init__(
        self,
        options: SpatialOptions,
        examples: Examples,
        pipeline: StableDiffusionPipeline,
        embed: Embed,
        side: int,
    ):
        """embed, side: what embeds crops of segments, and their side."""
        self.options, self.examples, self.embed, self.side = options, examples, embed, side
        labels = examples.labels
        self.things = [i for i, name in enumerate(labels.classes) if name in (labels.things or ())]
        if not self.things:
            raise GuidekitError(
                f"label set {labels.name!r} names no things, whose segments are shown; add `things`"
            )
        self.pipeline, self.backbone = pipeline, Backbone(pipeline)
        self.prior = self._prior().to(pipeline.device)
        unet = widened(pipeline.unet, self.prior.config.channels).train().requires_grad_(True)
        pipeline.unet = unet
        self.net = SpatialLoss(unet)

    def _prior(self) -> SegmentMap:
        """The prior, fitted on segments of the first examples."""
        classes, found, step = [], [], 32
        for first in range(0, self.options.pairs, step):
            numbers = range(first, min(first + step, self.options.pairs))
            x0, maps = self.examples.pairs(numbers, torch.Generator().manual_seed(first))
            own = [(i, k, m) for i in range(len(x0)) for k, m in segments_of(maps[i], self.things)]
            if own:
                classes += [k for _, k, _ in own]
                found.append(self._embeddings([(x0[i], m) for i, _, m in own]))
        if not classes:
            raise GuidekitError("the examples show no things; label some, or raise `pairs`")
        names = self.examples.labels.classes
        kinds = sorted(set(classes))
        states = pooled(self.pipeline, [names[k] for k in kinds]).float().cpu()
        rows = states[[kinds.index(k) for k in classes]]
        return fitted_prior(rows, torch.cat(found), self.options.ridge)

    def _embeddings(self, segments: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Embeddings (S, d) of segments, each an image (3, H, W) and a mask (H, W)."""
        crops = torch.stack([crop(pixels, mask, self.side) for pixels, mask in segments])
        return scaled(self.embed(crops).float())

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Noisy latents of the images, their captions, and maps of some of their segments."""
        x0, labels = self.examples.pairs(numbers, generator)
        captions = self.examples.captions(numbers)
        texts = with_words(captions, self.options.wordless, generator)
        kept = torch.rand(len(x0), 1, 1, 1, generator=generator) >= self.options.mapless
        return self._noisy(x0, self._maps(x0, labels, generator) * kept, texts, generator)

    def _maps(self, x0: Tensor, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Maps (B, d, h, w) of a random choice of the segments of images (B, 3, H, W).

        Without a generator of all of them.
        """
        chosen, counts = [], []
        for pixels, own in zip(x0, labels, strict=True):
            there = segments_of(own, self.things)
            if generator is not None:
                most = max(min(len(there), self.options.segments), 1)
                count = 1 + int(torch.randint(most, (), generator=generator))
                order = torch.randperm(len(there), generator=generator)[:count]
                there = [there[i] for i in order.tolist()]
            chosen += [(pixels, mask) for _, mask in there]
            counts.append(len(there))
        channels, factor = self.prior.config.channels, self.pipeline.vae_scale_factor
        grid = (x0.shape[-2] // factor, x0.shape[-1] // factor)
        if not chosen:
            return torch.zeros(len(x0), channels, *grid)
        embeddings = self._embeddings(chosen).split(counts)
        masks = torch.stack([mask for _, mask in chosen])[:, None]
        masks = F.interpolate(masks, grid, mode="area")[:, 0].split(counts)
        return torch.stack([painted(e, m) for e, m in zip(embeddings, masks, strict=True)])

    def held_out(self) -> float | None:
        """Loss on the shots that are held out with all that their maps show; None without any."""
        pairs = self.examples.held_out()
        if pairs is None:
            return None
        x0, labels = (x.repeat(LEVELS, 1, 1, 1) for x in pairs)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            batch = self._noisy(x0, self._maps(x0, labels, None), [""] * len(x0), generator)
            device = self.net.unet.device
            return float(self.net(**{k: v.to(device) for k, v in batch.items()})["mse"])

    def preview(self) -> Image.Image:
        """Images above what is drawn from the phrases of their segments, without a prompt."""
        real, maps = self.examples.shown(SHOWN)
        names, conditions = self.examples.labels.classes, []
        for own in maps:
            present = [i for i in self.things if bool((own.ids == i).any())]
            masks = [(own.ids == i).float() for i in present] or [(own.ids != VOID).float()]
            words = [names[i] for i in present] or [names[0]]
            segments = tuple(map(Segment, words, masks))
            conditions.append(Condition(segments=segments))
        drawn = Sampling(
            self.pipeline,
            conditions,
            seeds=range(len(conditions)),
            steps=20,
            cfg=1.0,
            height=real.shape[-2],
            width=real.shape[-1],
            controls=[Control(self.prior)],
        )
        images = drawn.finish().images.cpu().float() * 2 - 1
        return sheet(torch.cat([real, images]), len(conditions))

    def export(self, folder: Path) -> None:
        """Saves the pipeline in half precision, and in it the control that makes the maps."""
        with quiet():
            halved(self.pipeline).save_pretrained(folder)
        copy.deepcopy(self.prior).half().save_pretrained(Path(folder) / CONTROL)


def make(options: SpatialOptions, folder: Path, size: int, silent: bool = True) -> SpatialTask:
    """The task of a recipe's stage. Raises GuidekitError for a backbone of another kind."""
    given = (options.source, options.data, size, options.held_out, options.flips)
    clip = load_clip(options.embedder)
    looks = clip.config["preprocess_cfg"]
    mean, std = (torch.tensor(looks[name]).view(3, 1, 1) for name in ("mean", "std"))

    @torch.no_grad()
    def embed(crops: Tensor) -> Tensor:
        found = clip.model.encode_image(((crops + 1) / 2 - mean) / std)
        return found[0] if isinstance(found, tuple) else found  # beside its tokens, if it has any

    pipeline = load_backbone(options.backbone)
    return SpatialTask(options, make_examples(*given), pipeline, embed, clip.size[0])


OPTIONS = SpatialOptions  # of a recipe's stage
