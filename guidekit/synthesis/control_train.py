"""Training of a control that reads one-hot label maps, beside a frozen backbone or with it.

ControlNets and T2I-Adapters: Zhang, Rao, Agrawala 2023 (arXiv:2302.05543) and Mou et al. 2023
(arXiv:2302.08453), by diffusers' own classes. Encoders of maps into tokens: Wang et al. 2022 (PITI,
arXiv:2205.12952), who train the encoder first, then the denoiser with it. A control of other
classes begins with an affinity folded into its first layer, also one that was trained on a palette:
colours are linear in the one-hot map.
"""

import copy
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, T2IAdapter
from PIL import Image
from torch import Tensor, nn

from guidekit.affinity.fold import Host, fold_state
from guidekit.affinity.matrix import VOTE, Affinity, load_affinity
from guidekit.backbones.controls import Control, check_adapter, load_control
from guidekit.backbones.loading import load, quiet
from guidekit.backbones.map_encoder import MapEncoder
from guidekit.backbones.remade import remade
from guidekit.backbones.residuals import with_controls
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError
from guidekit.evaluate.restoration import psnr
from guidekit.images import sheet
from guidekit.inputs.given import as_denoiser
from guidekit.labels import LABELS, LabelSet, load_label_set
from guidekit.sampler import Sampling
from guidekit.synthesis.data import Examples, make_examples
from guidekit.synthesis.train import check_affinity
from guidekit.train.beside import Backbone, BesideLoss, with_words
from guidekit.train.processes import processes

KINDS: dict[str, type[nn.Module]] = {
    "adapter": T2IAdapter,
    "controlnet": ControlNetModel,
    "encoder": MapEncoder,
}
SHOWN, LEVELS = 8, 4
FAITHFUL = 24.0  # dB below which an autoencoder loses what the images are of; ours
#: The weight of each kind's first layer.
FIRST = {
    "adapter": "adapter.conv_in.weight",
    "controlnet": "controlnet_cond_embedding.conv_in.weight",
    "encoder": "conv_in.weight",
}
ORDER = "controlnet_conditioning_channel_order"  # in which a ControlNet takes an image's colours
MOST_CHANNELS = 256  # of such layers by default
TOKENS = 8  # a side, of an encoder's tokens by default
CONTROL = "control"  # where a control lies in the folder of the backbone that was trained with it
Net = T2IAdapter | ControlNetModel | MapEncoder


@dataclass(kw_only=True)
class ControlOptions:
    """The backbone, the kind of control and its data."""

    kind: str = "adapter"  # adapter | controlnet | encoder
    backbone: str = "scenes"  # a Stable Diffusion pipeline, as for guidekit sample --model
    source: str = "dense"  # dense (scenes, grounds as classes too) | prints | shots
    data: str = ""  # folder of the shots: images/, masks/, classes.json; they have no captions
    held_out: int = 0  # shots that are not trained on, but choose the checkpoint
    flips: bool = False  # mirrors shots at random
    start: str = ""  # folder of a control of the kind to go on from
    affinity: str = ""  # folder of an affinity from the start's classes to these
    by: str = VOTE  # the estimate of it that is folded
    wordless: float = 0.5  # share of the captions replaced by the empty prompt
    null: float = 0.0  # share of the maps replaced by zeros, which an encoder's null branch sees
    joint: bool = False  # trains the backbone's denoiser too, and exports both; for an encoder
    blocks: int = 1  # residual blocks of an adapter per resolution, or layers of an encoder
    # Channels of the first layers of a ControlNet or encoder. By default 16, then twice as many
    # after each halving: down to the latents' size for a ControlNet, to 8x8 tokens for an encoder.
    embedding: tuple[int, ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise GuidekitError(f"kind must be {' or '.join(KINDS)}, not {self.kind!r}")
        if self.affinity and not self.start:
            raise GuidekitError("an affinity is for the control that is named by `start`; name it")
        if self.joint and self.kind != "encoder":
            raise GuidekitError(
                f"joint is for the kind encoder; a backbone beside the kind {self.kind} is frozen"
            )
        for name in ("wordless", "null"):
            if not 0 <= getattr(self, name) <= 1:
                raise GuidekitError(f"{name} must be from 0 to 1, not {getattr(self, name):g}")


class ControlLoss(BesideLoss):
    """The backbone's own loss, the control being what is trained, jointly with it or not."""

    def __init__(self, control: Net, unet: nn.Module, joint: bool = False):
        super().__init__(unet)
        self.control = control
        if joint:
            self.joined = unet  # a part of the module, and so trained

    def forward(
        self, z: Tensor, timestep: Tensor, states: Tensor, maps: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        """Error at latents z (B, C, h, w), text states (B, T, D), one-hot maps (B, N, H, W)."""
        given: dict[str, object] = {}
        if isinstance(self.control, MapEncoder):
            states = torch.cat([states, self.control(maps)], 1)
        elif isinstance(self.control, T2IAdapter):
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
        pipeline.unet.train(options.joint).requires_grad_(options.joint)
        control.train().requires_grad_(True)
        self.net = ControlLoss(control, pipeline.unet, options.joint)

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Noisy latents of the images, their maps and captions."""
        x0, maps = self.examples.pairs(numbers, generator)
        captions = self.examples.captions(numbers)
        texts = with_words(captions, self.options.wordless, generator)
        keep = torch.rand(len(x0), 1, 1, 1, generator=generator) >= self.options.null
        return self._noisy(x0, maps * keep, texts, generator)

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
            height=real.shape[-2],
            width=real.shape[-1],
            controls=[Control(self.net.control)],
        )
        images = drawn.finish().images.cpu().float() * 2 - 1
        return sheet(torch.cat([real, images]), len(maps))

    def export(self, folder: Path) -> None:
        """Saves the control in half precision, and its label set beside.

        A backbone that was trained with it is saved as a pipeline, in which the control lies.
        """
        own = Path(folder)
        if self.options.joint:
            with quiet():
                halved(self.pipeline).save_pretrained(own)
            own = own / CONTROL
        copy.deepcopy(self.net.control).eval().half().save_pretrained(own)
        self.examples.labels.save(own / LABELS)


def halved(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A copy of the pipeline in half precision."""
    parts = {
        name: copy.deepcopy(part).eval().half() if isinstance(part, nn.Module) else part
        for name, part in pipeline.components.items()
    }
    return type(pipeline)(**parts, requires_safety_checker=False)


def kind_of(control: nn.Module) -> str:
    """The kind of a control by its name in KINDS. Raises GuidekitError for those not trained."""
    found = next((kind for kind, own in KINDS.items() if isinstance(control, own)), None)
    if found is None:
        raise GuidekitError(
            f"a {type(control).__name__} reads no label maps; the kinds are {', '.join(KINDS)}"
        )
    return found


def layers_of(options: ControlOptions, factor: int, size: int) -> tuple[int, ...]:
    """Channels of the first layers, beside an autoencoder of that factor, for maps of size x size.

    An encoder halves the side after each of them, a ControlNet after all but the last.
    """
    if options.embedding:
        return options.embedding
    count = round(math.log2(factor)) + 1
    if options.kind == "encoder":
        count = max(round(math.log2(size / TOKENS)), 1)
    return tuple(min(16 * 2**i, MOST_CHANNELS) for i in range(count))


def new_control(
    options: ControlOptions, pipeline: StableDiffusionPipeline, classes: int, size: int
) -> Net:
    """A control of so many classes that changes nothing much yet, for maps of size x size."""
    unet = pipeline.unet
    layers = layers_of(options, pipeline.vae_scale_factor, size)
    if options.kind == "encoder":
        return MapEncoder(
            conditioning_channels=classes,
            width=unet.config.cross_attention_dim,
            grid=size // 2 ** len(layers),
            channels=layers,
            layers=options.blocks,
        )
    if options.kind == "controlnet":
        return ControlNetModel.from_unet(
            unet, conditioning_channels=classes, conditioning_embedding_out_channels=layers
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
    fields: dict[str, object] = {size: len(affinity.target)}
    host = Host((FIRST[kind_of(start)],), unshuffle=start.config.downscale_factor if adapter else 1)
    palette = None
    if start.config[size] == 3:
        host, palette = replace(host, colours="unit"), affinity.source.colours
        if start.config.get(ORDER) == "bgr":  # classes have no such order
            palette, fields[ORDER] = palette.flip(0), "rgb"
    made = remade(start, **fields)
    made.load_state_dict(fold_state(start.state_dict(), host, affinity.matrix(by), palette))
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
            "Diffusion pipelines: name one (--model, or `backbone` in a recipe)"
        )
    return pipeline


def _start(options: ControlOptions, labels: LabelSet, folder: Path) -> Net:
    """The control that the options go on from, folded if there is an affinity."""
    there = folder / options.start
    place = there if there.is_dir() else Path(options.start)
    control = load_control(place if there.is_dir() else options.start, "cpu", torch.float32)
    if (kind := kind_of(control)) != options.kind:
        raise GuidekitError(f"{options.start} is of the kind {kind}, not {options.kind}; set kind")
    own = load_label_set(place / LABELS) if (place / LABELS).is_file() else None
    if options.affinity:
        affinity = load_affinity(options.affinity)
        check_affinity(affinity, own or affinity.source, labels)
        return folded_control(control, affinity, options.by)
    if own is None or own.classes != labels.classes:
        raise GuidekitError(
            f"{options.start} is of other classes than {labels.name!r}, or does not say of which "
            f"({LABELS}); give an affinity (guidekit affinity)"
        )
    return control


def check_beside(pipeline: StableDiffusionPipeline, control: Net, size: int) -> None:
    """Raises GuidekitError for a control of another family, or of another size than the latents."""
    denoiser = with_controls(as_denoiser(pipeline), [Control(control)])
    if isinstance(control, T2IAdapter):
        check_adapter(control, denoiser, (size, size))


def make(options: ControlOptions, folder: Path, size: int, silent: bool = True) -> ControlTask:
    """The task of a recipe's stage.

    Raises GuidekitError for a backbone of another kind, and for a control that does not fit it.
    """
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
        control = new_control(options, pipeline, len(examples.labels), size)
    check_beside(pipeline, control, size)
    warn_of_reconstruction(pipeline, examples.shown(SHOWN)[0])
    return ControlTask(options, examples, pipeline, control)


OPTIONS = ControlOptions  # of a recipe's stage
