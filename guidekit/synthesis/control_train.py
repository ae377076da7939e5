"""Training of a ControlNet or T2I-Adapter that reads one-hot label maps; the backbone stays frozen.

Zhang, Rao, Agrawala 2023 (arXiv:2302.05543) and Mou et al. 2023 (arXiv:2302.08453), by diffusers'
own classes. One of other classes begins with an affinity folded into its first layer, also one that
was trained on a palette: colours are linear in the one-hot map.
"""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, T2IAdapter
from PIL import Image
from torch import Tensor, nn

from guidekit.affinity.fold import Host, fold_state
from guidekit.affinity.matrix import VOTE, Affinity, load_affinity
from guidekit.backbones.controls import Control, load_control
from guidekit.backbones.loading import load
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError
from guidekit.evaluate.restoration import psnr
from guidekit.images import sheet
from guidekit.labels import LabelSet, load_label_set
from guidekit.sampler import Sampling
from guidekit.synthesis.data import Examples, make_examples
from guidekit.synthesis.pipeline import LABELS
from guidekit.synthesis.train import check_affinity
from guidekit.train.beside import Backbone, BesideLoss, with_words
from guidekit.train.processes import processes

KINDS = ("adapter", "controlnet")
SHOWN, LEVELS = 8, 4
FAITHFUL = 24.0  # dB below which an autoencoder loses what the images are of; ours
Net = T2IAdapter | ControlNetModel


@dataclass(kw_only=True)
class ControlOptions:
    """The backbone, the kind of control and its data."""

    kind: str = "adapter"  # adapter | controlnet
    backbone: str = "scenes"  # a Stable Diffusion pipeline, as for guidekit sample --model
    source: str = "dense"  # dense (scenes, grounds as classes too) | prints | shots
    data: str = ""  # folder of the shots: images/, masks/, classes.json; they have no captions
    held_out: int = 0  # shots that are not trained on, but choose the checkpoint
    flips: bool = False  # mirrors shots at random
    start: str = ""  # folder of a control of the kind to go on from
    affinity: str = ""  # folder of an affinity from the start's classes to these
    by: str = VOTE  # the estimate of it that is folded
    wordless: float = 0.5  # share of the captions replaced by the empty prompt
    blocks: int = 1  # residual blocks of an adapter per resolution
    embedding: tuple[int, ...] = (16, 32, 64)  # channels of a ControlNet's first layers; halvings

    def __post_init__(self):
        if self.kind not in KINDS:
            raise GuidekitError(f"kind must be {' or '.join(KINDS)}, not {self.kind!r}")
        if bool(self.affinity) != bool(self.start):
            raise GuidekitError(
                "start and affinity go together: a control, and what it is turned by"
            )


class ControlLoss(BesideLoss):
    """The backbone's own loss, the control being what is trained."""

    def __init__(self, control: Net, unet: nn.Module):
        super().__init__(unet)
        self.control = control

    def forward(
        self, z: Tensor, timestep: Tensor, states: Tensor, maps: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        """Error at latents z (B, C, h, w), text states (B, T, D), one-hot maps (B, N, H, W)."""
        if isinstance(self.control, T2IAdapter):
            given = {"down_intrablock_additional_residuals": list(self.control(maps))}
        else:
            downs, mid = self.control(z, timestep, states, maps, return_dict=False)
            given = {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid}
        return self.error(z, timestep, states, target, **given)


class ControlTask:
    """Trains a control of a Stable Diffusion pipeline on images with their maps."""

    encodes = True  # its batches, by the backbone's autoencoder and text encoder

    def __init__(
        self,
        options: ControlOptions,
        examples: Examples,
        pipeline: StableDiffusionPipeline,
        control: Net,
    ):
        self.options, self.examples = options, examples
        self.pipeline, self.backbone = pipeline, Backbone(pipeline)
        self.net = ControlLoss(control.train().requires_grad_(True), pipeline.unet)

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Noisy latents of the images, their maps and captions."""
        x0, maps = self.examples.pairs(numbers, generator)
        captions = self.examples.captions(numbers)
        texts = with_words(captions, self.options.wordless, generator)
        return self._noisy(x0, maps, texts, generator)

    def _noisy(
        self, x0: Tensor, maps: Tensor, texts: list[str], generator: torch.Generator
    ) -> dict[str, Tensor]:
        latents, states = self.backbone.encoded(x0, texts)
        eps = torch.randn(latents.shape, generator=generator)
        spread = torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)
        timestep = (spread / len(x0) * self.backbone.timesteps).long()
        return self.backbone.noisy(latents, eps, timestep) | {"states": states, "maps": maps}

    @torch.no_grad()
    def held_out(self) -> float | None:
        """Loss on the shots that are held out, always at the same noise; None without any."""
        pairs = self.examples.held_out()
        if pairs is None:
            return None
        x0, maps = (x.repeat(LEVELS, 1, 1, 1) for x in pairs)
        batch = self._noisy(x0, maps, [""] * len(x0), torch.Generator().manual_seed(0))
        device = self.net.control.device
        return float(self.net(**{k: v.to(device) for k, v in batch.items()})["mse"])

    def preview(self) -> Image.Image:
        """Images above what is drawn from their maps without words."""
        real, maps = self.examples.shown(SHOWN)
        drawn = Sampling(
            self.pipeline,
            [Condition(map=own) for own in maps],
            seeds=range(len(maps)),
            steps=20,
            cfg=1.0,
            controls=[Control(self.net.control)],
        )
        images = drawn.finish().images.cpu().float() * 2 - 1
        return sheet(torch.cat([real, images]), len(maps))

    def export(self, folder: Path) -> None:
        """Saves the control in half precision, and its label set beside."""
        copy.deepcopy(self.net.control).eval().half().save_pretrained(folder)
        self.examples.labels.save(Path(folder) / LABELS)


def new_control(options: ControlOptions, pipeline: StableDiffusionPipeline, classes: int) -> Net:
    """A control of so many classes that changes nothing much yet, at the backbone's sizes."""
    unet = pipeline.unet
    if options.kind == "controlnet":
        return ControlNetModel.from_unet(
            unet,
            conditioning_channels=classes,
            conditioning_embedding_out_channels=options.embedding,
        )
    return T2IAdapter(
        in_channels=classes,
        channels=list(unet.config.block_out_channels),
        num_res_blocks=options.blocks,
        downscale_factor=pipeline.vae_scale_factor,
    )


def folded_control(start: Net, affinity: Affinity, by: str = VOTE) -> Net:
    """The control for maps of the affinity's target classes.

    Raises GuidekitError for one that reads neither the source's classes nor its colours.
    """
    adapter = isinstance(start, T2IAdapter)
    size = "in_channels" if adapter else "conditioning_channels"
    coloured = start.config[size] == 3 and len(affinity.source) != 3
    host = Host(
        ("adapter.conv_in.weight" if adapter else "controlnet_cond_embedding.conv_in.weight",),
        colours="unit" if coloured else "",
        unshuffle=start.config.downscale_factor if adapter else 1,
    )
    palette = affinity.source.colours if coloured else None
    state = fold_state(start.state_dict(), host, affinity.matrix(by), palette)
    config = dict(start.config) | {size: len(affinity.target)}
    made = type(start).from_config(config)
    made.load_state_dict(state)
    return made


def warn_of_reconstruction(pipeline: StableDiffusionPipeline, pixels: Tensor) -> float:
    """PSNR in dB of images (B, 3, H, W) in [-1, 1] after the autoencoder; warns of a low one."""
    with torch.no_grad():
        coded = pipeline.vae.encode(pixels.to(pipeline.device)).latent_dist.mode()
        found = pipeline.vae.decode(coded, return_dict=False)[0].cpu().clamp(-1, 1)
    level = float(psnr(found / 2 + 0.5, pixels / 2 + 0.5).mean())
    if level < FAITHFUL:
        warnings.warn(
            f"the backbone's autoencoder gives these images back with {level:.1f} dB, so it cannot "
            "draw what they show; take a backbone whose autoencoder can, or a model of pixels "
            "(task maps)",
            stacklevel=2,
        )
    return level


def load_backbone(name: str) -> StableDiffusionPipeline:
    """The pipeline that a control is trained for. Raises GuidekitError for one of another kind."""
    pipeline = load(name, str(processes().device), torch.float32)
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise GuidekitError(
            f"backbone {name} is a {type(pipeline).__name__}; controls are trained for Stable "
            "Diffusion pipelines"
        )
    return pipeline


def _start(options: ControlOptions, labels: LabelSet, folder: Path) -> Net:
    """The control that the options go on from, folded."""
    affinity = load_affinity(options.affinity)
    there = folder / options.start
    control = load_control(there if there.is_dir() else options.start, "cpu", torch.float32)
    kind = KINDS[isinstance(control, ControlNetModel)]
    if kind != options.kind:
        raise GuidekitError(f"{options.start} is of the kind {kind}, not {options.kind}; set kind")
    own = (there if there.is_dir() else Path(options.start)) / LABELS
    check_affinity(affinity, load_label_set(own) if own.is_file() else affinity.source, labels)
    return folded_control(control, affinity, options.by)


def make(options: ControlOptions, folder: Path, size: int, quiet: bool = True) -> ControlTask:
    """The task of a recipe's stage. Raises GuidekitError for a backbone of another kind."""
    given = (options.source, options.data, size, options.held_out, options.flips)
    examples = make_examples(*given)
    if len(examples.labels) == 3:
        raise GuidekitError(
            f"label set {examples.labels.name!r} has 3 classes, and a control of 3 channels reads "
            "colours; add a class to it, or train a model of pixels (task maps)"
        )
    pipeline = load_backbone(options.backbone)
    if options.start:
        control = _start(options, examples.labels, folder)
    else:
        control = new_control(options, pipeline, len(examples.labels))
    warn_of_reconstruction(pipeline, examples.shown(SHOWN)[0])
    return ControlTask(options, examples, pipeline, control)


OPTIONS = ControlOptions  # of a recipe's stage
