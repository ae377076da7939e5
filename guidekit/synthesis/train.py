"""Training of models of label maps, from nothing or from one of another label set.

A model of other classes begins with an affinity folded into its first layer, after Class Affinity
Transfer (Careil, Verbeek, Lathuiliere, CVPR 2023, arXiv:2304.02321); then all weights are trained.
The checkpoint with the lowest loss on shots that are held out is the one that is exported.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor

from guidekit.affinity.fold import fold_state
from guidekit.affinity.matrix import VOTE, Affinity, load_affinity
from guidekit.backbones.loading import load
from guidekit.backbones.remade import remade
from guidekit.errors import GuidekitError
from guidekit.images import sheet
from guidekit.labels import LabelSet
from guidekit.synthesis.data import Examples, make_examples
from guidekit.synthesis.pipeline import MapsPipeline
from guidekit.train.pixels import VelocityLoss, cosine_scheduler, pixel_unet, velocity_batch
from guidekit.zoo.shipped import ZOO

SHOWN = 8  # of a preview
LEVELS = 8  # noise levels at which every held-out image is judged


@dataclass(kw_only=True)
class MapsOptions:
    """Architecture and data of a model of label maps."""

    source: str = "dense"  # dense (scenes, grounds as classes too) | prints | shots
    data: str = ""  # folder of the shots: images/, masks/, classes.json
    held_out: int = 0  # shots that are not trained on, but choose the checkpoint
    flips: bool = False  # mirrors shots at random
    start: str = ""  # model of label maps to go on from; earlier stage, built-in or folder
    affinity: str = ""  # folder of an affinity from the start's classes to these
    by: str = VOTE  # the estimate of it that is folded; vote, segmentation, features, text
    soft: bool = False  # folds shares, not the one class that stands for each
    null: float = 0.1  # share of the maps replaced by zeros, for classifier-free guidance
    channels: tuple[int, ...] = (32, 64, 128)  # of a model without start; halvings between
    layers: int = 1  # residual blocks per resolution
    attention: int = 1  # resolutions with self-attention, counted from the smallest
    head: int = 32  # channels of an attention head
    groups: int = 16  # of the normalisation
    dropout: float = 0.0

    def __post_init__(self):
        if not 0 <= self.null <= 1:
            raise GuidekitError(f"null must be from 0 to 1, not {self.null:g}")
        if self.affinity and not self.start:
            raise GuidekitError("an affinity is for the model that is named by `start`; name it")


class MapsTask:
    """Trains a UNet that reads one-hot label maps beside noisy images."""

    def __init__(
        self,
        options: MapsOptions,
        examples: Examples,
        size: int,
        start: MapsPipeline | None = None,
        matrix: Tensor | None = None,
    ):
        """start, matrix: what to go on from, and what stands for what; see `transferred`."""
        self.options, self.examples, self.size = options, examples, size
        self.labels = examples.labels
        if start is None:
            unet = pixel_unet(options, size, 3 + len(self.labels), 3)
            self.scheduler = cosine_scheduler()
        else:
            unet = transferred(start, self.labels, matrix)
            self.scheduler = start.scheduler
        self.net = VelocityLoss(unet.train())

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Noisy images with their maps as further channels, timesteps, velocities."""
        x0, maps = self.examples.pairs(numbers, generator)
        keep = torch.rand(len(x0), 1, 1, 1, generator=generator) >= self.options.null
        return self._noisy(x0, maps * keep, generator)

    def _noisy(self, x0: Tensor, maps: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        found = velocity_batch(x0, self.scheduler, generator)
        return found | {"z": torch.cat([found["z"], maps], 1)}

    @torch.no_grad()
    def held_out(self) -> float | None:
        """Loss on the shots that are held out, always at the same noise; None without any."""
        pairs = self.examples.held_out()
        if pairs is None:
            return None
        unet = self.net.unet
        x0, maps = (x.repeat(LEVELS, 1, 1, 1) for x in pairs)
        batch = self._noisy(x0, maps, torch.Generator().manual_seed(0))
        training = unet.training
        unet.eval()
        try:
            losses = self.net(**{k: v.to(unet.device) for k, v in batch.items()})
        finally:
            unet.train(training)
        return float(losses["mse"])

    def pipeline(self) -> MapsPipeline:
        """The trained parts as the pipeline that users load."""
        return MapsPipeline(self.net.unet, self.scheduler, self.labels)

    def preview(self) -> Image.Image:
        """Images above what is drawn from their maps."""
        real, maps = self.examples.shown(SHOWN)
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(i) for i in range(len(maps))]
        drawn = pipeline(maps, generator=generators, output_type="pt").images
        return sheet(torch.cat([real, drawn.cpu().float() * 2 - 1]), len(maps))

    def export(self, folder: Path) -> None:
        """Saves the pipeline in half precision."""
        unet = copy.deepcopy(self.net.unet).eval().half()
        MapsPipeline(unet, self.scheduler, self.labels).save_pretrained(folder)


def transferred(start: MapsPipeline, labels: LabelSet, matrix: Tensor | None) -> UNet2DModel:
    """The start's UNet for maps of `labels`: conv(W, A y) = conv(W A, y) in its first layer.

    matrix: the affinity A (N_s, N_t). Without one the layer is the same where the classes are, else
    the map's filters are drawn anew.
    """
    unet = remade(start.unet, in_channels=start.unet.config.out_channels + len(labels))
    state = start.unet.state_dict()
    if matrix is not None:
        state = fold_state(state, "one-hot", matrix)
    elif start.labels.classes != labels.classes:
        pixels = start.unet.config.out_channels
        new = unet.conv_in.weight.detach().clone()
        new[:, :pixels] = state["conv_in.weight"][:, :pixels]
        state = state | {"conv_in.weight": new}
    unet.load_state_dict(state)
    return unet


def check_affinity(affinity: Affinity, source: LabelSet, target: LabelSet) -> None:
    """Raises GuidekitError unless the affinity leads from the target's classes to the source's."""
    for own, wanted, whose in (
        (affinity.source, source, "the model draws from"),
        (affinity.target, target, "the shots are of"),
    ):
        if own.classes != wanted.classes:
            raise GuidekitError(
                f"the affinity is from {affinity.target.name!r} to {affinity.source.name!r}, and "
                f"{whose} {wanted.name!r} with {len(wanted)} classes; estimate one for these sets "
                "(guidekit affinity)"
            )


def load_start(name: str, folder: Path | None = None) -> MapsPipeline:
    """A model of label maps by the names that recipes use. Raises GuidekitError for others."""
    places = [] if folder is None else [folder / name]
    there = next((str(p) for p in [*places, ZOO / name] if p.is_dir()), name)
    if there == name and not Path(name).is_dir() and (ZOO / f"{name}.toml").is_file():
        raise GuidekitError(
            f"the weights of {name} are not here; run guidekit train {name}, and give the folder "
            "that it writes"
        )
    found = load(there, "cpu", torch.float32)
    if not isinstance(found, MapsPipeline):
        raise GuidekitError(
            f"{name} is a {type(found).__name__}, which reads no label maps; start from a "
            "MapsPipeline, such as guidekit train scenes-maps makes"
        )
    return found


def make(options: MapsOptions, folder: Path, size: int, quiet: bool = True) -> MapsTask:
    """The task of a recipe's stage. Raises GuidekitError for a start of another size."""
    data = (options.source, options.data, size, options.held_out, options.flips)
    examples = make_examples(*data)
    start = load_start(options.start, folder) if options.start else None
    if start is not None and start.unet.config.sample_size != size:
        own = start.unet.config.sample_size
        raise GuidekitError(
            f"{options.start} draws images of {own}x{own}; give its recipe that size"
        )
    matrix = None
    if start is not None and options.affinity:
        affinity = load_affinity(options.affinity)
        check_affinity(affinity, start.labels, examples.labels)
        matrix = affinity.soft(by=options.by) if options.soft else affinity.matrix(options.by)
    return MapsTask(options, examples, size, start, matrix)


OPTIONS = MapsOptions  # of a recipe's stage
