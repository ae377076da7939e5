"""CLIP guidance: texts and reference images steer any diffusion model through a CLIP.

Liu, Park, Azadi, Zhang, Chopikyan, Hu, Shi, Rohrbach, Darrell: More Control for Free! Image
Synthesis with Semantic Diffusion Guidance, WACV 2023, arXiv:2112.05744. A noise-aware image encoder
reads the noisy sample itself, so the backbone needs no gradient. Departures from the released code:
structure guidance (Eq. 8) is there, and Gram matrices (Eq. 9) are of one image each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit import Guidance, GuidekitError, Run, Step, hookimpl
from guidekit.noisy_clip.files import load_clip
from guidekit.noisy_clip.miniature import random_encoder
from guidekit.noisy_clip.model import CleanClip, NoisyClip, Seen, is_noisy
from guidekit.toolbox import read_references

RANDOM = "random"  # the name of a tiny encoder that nobody trained


@dataclass(kw_only=True)
class Clip(Guidance):
    """Pulls images towards texts, and towards content, structure or style of references (Eq. 10).

    The energy is minus the weighted sum of cosines (content, texts), plus weighted distances of
    maps (structure, Eq. 8) and of Gram matrices (style, Eq. 9). on: "z" reads the noisy sample, by
    a noise-aware encoder; "x0" reads the decoded clean estimate, by any CLIP, through the backbone.
    fit: what is seen of a reference whose shape is not the drawing's: its largest middle part of
    that shape, the whole on white, or three parts along its longer side, which count a third each.
    units: "paper" shifts the mean of the next sample by scale * variance * gradient, as the paper
    does; "noise" gives the change of the noise estimate the length scale * |noise|, whatever the
    gradient's is, which means the same on every model.
    """

    scale: float = 1.0  # factor on all weights; with units=noise the length of the change
    # paper: the mean moves by scale * variance * gradient; noise: a share of the noise's length.
    units: Literal["paper", "noise"] = "paper"
    on: Literal["z", "x0"] = "z"  # what the encoder reads: the sample, or the clean estimate
    # Built-in, folder, or ARCHITECTURE/TAG of open_clip (x0).
    encoder: str | Path = "scenes-clip-noisy"
    text: str = ""  # texts, separated by |, each with @WEIGHT; without any, or an image, the prompt
    negative: str = ""  # texts to move away from
    image: tuple[Path, ...] = ()  # reference images; scene-3 is a built-in one
    fit: Literal["crop", "pad", "crops"] = "crop"  # what is seen of one of another shape
    text_weight: float = 120.0  # weight of the cosines of z and texts
    content: float = 100.0  # weight of the cosine of embeddings of z and reference
    structure: float = 0.0  # weight of the distance of their maps
    style: float = 0.0  # weight of the distance of their Gram matrices
    stages: tuple[int, ...] = ()  # maps of structure and style, 0 the first; () all
    views: int = 2  # shifted and mirrored views whose cosines are averaged; 0 is the whole
    cutouts: int = 0  # random squares of the clean estimate in their place, with on=x0
    usage: ClassVar[str] = (
        "--model scenes-ddpm --scheduler ddpm --steps 100 --set clip.units=noise "
        "--set clip.scale=0.3 --set clip.text='a red circle on a white background'"
    )

    own_texts: list[list[str]] | None = field(default=None, init=False, repr=False, compare=False)
    own_images: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        if min(self.views, self.cutouts) < 0:
            raise GuidekitError(f"{self.name}.views and {self.name}.cutouts are at least 0")
        if self.cutouts and self.on == "z":
            raise GuidekitError(f"{self.name}.cutouts needs {self.name}.on=x0")

    @property
    def graph(self) -> str:
        """What the energy reads: z by itself, or the clean estimate."""
        return {"z": "input", "x0": "x0"}[self.on]

    @property
    def rule(self) -> tuple:
        """Its push is its own: two of them are two backwards, through encoders only."""
        return (type(self), id(self))

    def towards(self, texts: list[list[str]] | None = None, images: Tensor | None = None) -> "Clip":
        """Itself, with texts and references of each image of the run, for runs from Python.

        texts: a list per image. images: (B, R, 3, H, W) in [-1, 1]. In place of `text`, `image`.
        For one batch; `Condition(targets={"clip": {"texts": [...], "images": (R, 3, H, W)}})` gives
        each image its own, whatever the batch.
        """
        self.own_texts, self.own_images = texts, images
        return self

    def prepare(self, run: Run) -> None:
        """Loads the encoder, reads texts and references; raises GuidekitError for nothing to do."""
        dtype = torch.promote_types(run.denoiser.dtype, torch.float32)
        if own := run.targets(self.name):
            texts, images = ([row.get(k) for row in own] for k in ("texts", "images"))
            self.towards(
                texts if all(t is not None for t in texts) else None,
                torch.stack(images) if all(i is not None for i in images) else None,
            )
        self._encoder = self._open(run).to(run.device, dtype)
        self._references = self._read_references(run, dtype)
        self._texts, self._weights = self._read_texts(run)
        if not self._references and (self.structure or self.style):
            raise GuidekitError(f"{self.name}.structure and style need {self.name}.image=FILE")
        texts = bool(self.text_weight and self._weights.any())
        self._cosines = texts or bool(self.content and self._references)
        if not (self._references or texts):
            raise GuidekitError(
                f"{self.name} has nothing to pull to: give {self.name}.text, {self.name}.image or "
                "a prompt"
            )
        if self._references and not (self.content or self.structure or self.style):
            raise GuidekitError(f"{self.name}.image is there, and content, structure, style are 0")
        self._stages = self._chosen_stages()

    def _open(self, run: Run) -> CleanClip:
        """The encoder by name, checked against what it is to read."""
        channels = run.denoiser.channels if self.on == "z" else 3
        if self.encoder == RANDOM:
            return random_encoder(channels, noisy=self.on == "z")
        if self.on == "x0" and not is_noisy(self.encoder):
            return CleanClip(load_clip(self.encoder))
        encoder = NoisyClip.from_pretrained(self.encoder)
        latents = self.on == "z" and run.denoiser.vae is not None
        reads, given = (
            f"{'latents' if is_latent else 'pixels'} of {count} channels"
            for is_latent, count in ((encoder.reads_latents, encoder.channels), (latents, channels))
        )
        if reads != given:
            other = f"use {self.name}.on=x0" if self.on == "z" else "take a clean CLIP"
            raise GuidekitError(
                f"the encoder {self.encoder} reads {reads}, and here are {given}; train one for "
                f"them (task noisy-clip), or {other}"
            )
        side = encoder.trained_size
        if self.on == "z" and side and tuple(run.size) != (side, side):
            raise GuidekitError(
                f"the encoder {self.encoder} was trained on noise in images of {side}x{side}, "
                f"here are {run.size[0]}x{run.size[1]}; train one for them (task noisy-clip), or "
                f"use {self.name}.on=x0"
            )
        return encoder

    def _read_references(self, run: Run, dtype: torch.dtype) -> list[Tensor]:
        """References, each (B, C, h, w): clean latents, or images where x0 is read."""
        if self.own_images is None:
            if not self.image:
                return []
            images = read_references(self.image, run.size, self.fit)
            images = images.expand(len(run.seeds), *images.shape)
        else:
            images = self.own_images
        if len(images) != len(run.seeds):
            raise GuidekitError(f"references of {len(images)} images for {len(run.seeds)} images")
        parts = images.to(run.device, dtype).unbind(1)
        if self.on == "x0":
            return list(parts)
        with torch.no_grad():
            return [run.denoiser.latents(part).to(dtype) for part in parts]

    def _read_texts(self, run: Run) -> tuple[Tensor, Tensor]:
        """Embeddings (B, J, D) of texts and negative ones, and their weights (B, J)."""
        texts = self.own_texts or [split(self.text)] * len(run.seeds)
        if self.own_texts is None and not self.text and not self._references:
            texts = [[c.prompt] if c.prompt else [] for c in run.conditions]
        if len(texts) != len(run.seeds):
            raise GuidekitError(f"texts of {len(texts)} images for {len(run.seeds)} images")
        away = [(text, -weight) for text, weight in map(weighted, split(self.negative))]
        rows = [[weighted(text) for text in row] + away for row in texts]
        words = sorted({text for row in rows for text, _ in row})
        most = max(map(len, rows))
        weights = torch.zeros(len(rows), most)
        index = torch.zeros(len(rows), most, dtype=torch.long)
        for b, row in enumerate(rows):
            for j, (text, weight) in enumerate(row):
                weights[b, j], index[b, j] = weight, words.index(text)
        found = self._encoder.texts(words)[index.to(run.device)] if words else weights[..., None]
        return found.to(run.device), weights.to(found)

    def _chosen_stages(self) -> tuple[int, ...]:
        """Maps that are compared; all of them if none is named."""
        if not (self.structure or self.style):
            return ()
        count = self._encoder.stage_count
        if not all(0 <= i < count for i in self.stages):
            raise GuidekitError(f"{self.name}.stages: the encoder has 0 to {count - 1}")
        return self.stages or tuple(range(count))

    def energy(self, step: Step) -> Tensor:
        """Minus the weighted cosines plus the weighted distances (B,)."""
        views, maps = self._look(step)
        total = -self.text_weight * sum(map(self._toward_texts, views)) / len(views)
        three = self.fit == "crops" and self.own_images is None
        for reference in self._look_at_references(step):
            pull = self._toward_reference(reference, views, maps)
            total = total + (pull / 3 if three else pull)
        return total

    def _toward_reference(self, seen: Seen, views: list[Tensor], maps: list[Tensor]) -> Tensor:
        """Minus the weighted cosine with a reference plus the weighted distances (B,)."""
        cosines = sum(F.cosine_similarity(view, seen.embedding) for view in views)
        total = -self.content * cosines / len(views)
        if self.structure:
            total = total + self.structure * structure(maps, seen.stages)
        if self.style:
            total = total + self.style * style(maps, seen.stages)
        return total

    def _look(self, step: Step) -> tuple[list[Tensor], list[Tensor]]:
        """Embeddings (B, D) of the whole or of every view, and maps of the whole."""
        x = step.z if self.on == "z" else step.decode(step.x0)
        views = self._views(x, step)
        whole = None if views and not self._stages else self._see(x, step, self._stages)
        embeddings = [self._see(view, step).embedding for view in views]
        return embeddings or [whole.embedding], whole.stages if whole else []

    def _see(self, x: Tensor, step: Step, stages: Sequence[int] = ()) -> Seen:
        """What the encoder sees in samples of this step, or in images."""
        if self.on == "z":
            return self._encoder.at(x, step.level, stages)
        return self._encoder.sees(x, stages)

    def _views(self, x: Tensor, step: Step) -> list[Tensor]:
        """Views of x (B, C, h, w), drawn from the images' seeds; none without cosines."""
        count, view = (self.cutouts, cutout) if self.cutouts else (self.views, shifted)
        if not (count and self._cosines):
            return []
        where = step.run.noise((count, 3), step.index, step.repeat, f"{self.name}.views")
        places = torch.special.ndtr(where).to(x).unbind(1)
        return [view(x, place) for place in places]

    def _look_at_references(self, step: Step) -> list[Seen]:
        """What it sees of the references, re-noised at this step with noise of each image."""
        with torch.no_grad():
            if self.on == "x0":
                return [self._encoder.sees(r, self._stages) for r in self._references]
            a, s = step.level.a, step.level.s
            noisy = [
                a * r + s * step.noise(f"{self.name}.{i}").to(r)
                for i, r in enumerate(self._references)
            ]
            return [self._encoder.at(z, step.level, self._stages) for z in noisy]

    def _toward_texts(self, embedding: Tensor) -> Tensor:
        """Weighted sum of cosines with the texts (B,)."""
        if not self._weights.numel():
            return embedding.new_zeros(len(embedding))
        cosines = F.cosine_similarity(embedding[:, None], self._texts, dim=-1)
        return (self._weights * cosines).sum(1)

    def push(self, step: Step, grad: Tensor) -> Tensor:
        """The paper's shift of the mean (Algorithm 1), or a change of a given length."""
        if self.units == "paper":
            change = step.move.mean(-self.scale * grad)
            if step.move.fallback:
                step.run.account.note(f"{self.name}: a step without noise is pushed by the score")
            return change
        # eps' = eps - s * score, and the noise of n numbers has the length sqrt(n).
        # Without a gradient nothing moves: zero over any length is zero.
        length = grad.flatten(1).norm(dim=1).clamp(min=torch.finfo(grad.dtype).tiny)
        unit = grad / length[:, None, None, None]
        return step.move.score(-unit * (self.scale * math.sqrt(grad[0].numel()) / step.level.s))

    @classmethod
    def example(cls) -> "Clip":
        """A random encoder, the prompt, and a built-in reference."""
        return cls(encoder=RANDOM, image=(Path("scene-3"),), text="a red circle", structure=1.0)


def split(texts: str) -> list[str]:
    """Texts that | separates."""
    return [part.strip() for part in texts.split("|") if part.strip()]


def weighted(text: str) -> tuple[str, float]:
    """`a red circle@0.7` as ("a red circle", 0.7); the weight is 1 where none is given."""
    words, at, number = text.rpartition("@")
    try:
        return (words.strip(), float(number)) if at else (text, 1.0)
    except ValueError:
        return text, 1.0


def structure(maps: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Sum (B,) over stages of the mean squared difference of maps (Eq. 8)."""
    return sum(((m - t) ** 2).mean((1, 2, 3)) for m, t in zip(maps, targets, strict=True))


def style(maps: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Sum (B,) over stages of the squared Frobenius distance of Gram matrices (Eq. 9)."""
    pairs = zip(maps, targets, strict=True)
    return sum(((gram(m) - gram(t)) ** 2).sum((1, 2)) for m, t in pairs)


def gram(maps: Tensor) -> Tensor:
    """Gram matrix (B, C, C) of each image's map (B, C, h, w), over C h w, float32 or better."""
    flat = maps.flatten(2).to(torch.promote_types(maps.dtype, torch.float32))
    return flat @ flat.mT / maps[0].numel()


def shifted(x: Tensor, place: Tensor) -> Tensor:
    """Samples (B, C, h, w) moved by up to an eighth of their sides, half of them mirrored.

    place: (B, 3) in [0, 1]. It moves by whole pixels, so that noise stays noise of its level.
    """
    h, w = x.shape[-2:]
    padded = F.pad(x, (w // 8, w // 8, h // 8, h // 8), mode="reflect")
    rows = []
    for sample, (down, right, side) in zip(padded, place.tolist(), strict=True):
        top, left = round(down * 2 * (h // 8)), round(right * 2 * (w // 8))
        view = sample[:, top : top + h, left : left + w]
        rows.append(view.flip(-1) if side < 0.5 else view)
    return torch.stack(rows)


def cutout(pixels: Tensor, place: Tensor) -> Tensor:
    """A square of each image (B, 3, H, W), half to all of its side; place (B, 3) in [0, 1]."""
    share = 0.5 + 0.5 * place[:, 0]
    x, y = ((2 * place[:, i] - 1) * (1 - share) for i in (1, 2))
    zero = torch.zeros_like(share)
    theta = torch.stack([share, zero, x, zero, share, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False, padding_mode="border")


@hookimpl
def register_guidance(register):
    """Offers `clip`."""
    register("clip", Clip)
