"""The denoiser of a pipeline: conditions in, model outputs and images out, one class per kind.

`Denoiser(pipeline)` makes an instance of the subclass that has the pipeline's family. The
pipeline's own `encode_prompt`, VAE and image processor do the work, so what they do stays what they
do in diffusers.
"""

import contextlib
import copy
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from guidekit.backbones.forks import fork_blocks
from guidekit.backbones.records import Family, family_of, layout_sites
from guidekit.backbones.storage import casts
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError


@dataclass(frozen=True)
class Text:
    """What the model is told of B images: arguments of its forward, one row per image."""

    given: dict[str, Any] = field(default_factory=dict)

    @property
    def states(self) -> Tensor:
        """The encoded prompts (B, T, D)."""
        return self.given["encoder_hidden_states"]

    def kwargs(self) -> dict[str, Any]:
        """Arguments of the model's forward, in containers of their own."""
        return {k: dict(v) if isinstance(v, dict) else v for k, v in self.given.items()}

    def windowed(self, view: tuple[int, int, int, int] | None) -> "Text":
        """What a branch is told that sees a window (top, left, height, width) of the latents."""
        return self

    def rows(self, index: Tensor) -> "Text":
        """The text of some images, by their numbers."""
        return Text(_selected(self.given, index))

    @staticmethod
    def cat(texts: list["Text"]) -> "Text":
        """The texts one after the other along the batch."""
        return texts[0] if len(texts) == 1 else Text(_joined([t.given for t in texts]))


def _selected(value: Any, index: Tensor) -> Any:
    """Rows of tensors, also inside dicts; what is None stays it."""
    if isinstance(value, dict):
        return {key: _selected(inner, index) for key, inner in value.items()}
    return None if value is None else value[index.to(value.device)]


def _joined(values: list[Any]) -> Any:
    """Tensors after one another, also inside dicts; what is None stays it."""
    if isinstance(values[0], dict):
        return {key: _joined([value[key] for value in values]) for key in values[0]}
    return None if values[0] is None else torch.cat(values)


class Denoiser:
    """The model of a live pipeline, what it is told, and its images: `Denoiser(pipeline)`.

    Raises GuidekitError for a pipeline whose denoiser is of no family that is known.
    """

    # What a subclass says of its kind of pipeline.
    cfg: ClassVar[float] = 1.0  # guidance scale where the user names none
    reads_text: ClassVar[bool] = False  # whether phrases have tokens that pixels attend to
    reads_image: ClassVar[bool] = False  # whether it follows `Condition.image`
    takes_controls: ClassVar[bool] = False  # whether ControlNets and T2I-Adapters go beside it

    #: The controls beside it, of `with_controls`.
    controls: Any = None

    _kinds: ClassVar[dict[str, type["Denoiser"]]] = {}

    def __init_subclass__(cls, families: tuple[str, ...] = (), **options):
        super().__init_subclass__(**options)
        Denoiser._kinds |= dict.fromkeys(families, cls)

    def __new__(cls, pipeline: DiffusionPipeline | None = None):
        """An instance of the subclass for the pipeline's family."""
        kind = Denoiser._kind(pipeline) if cls is Denoiser else cls
        return super().__new__(kind)

    @staticmethod
    def _kind(pipeline: DiffusionPipeline) -> type["Denoiser"]:
        """The subclass for the pipeline's family; ValueError, naming the families, for none."""
        model = denoiser_of(pipeline)
        family = None if model is None else family_of(uncompiled(model)).name
        if family not in Denoiser._kinds:
            raise GuidekitError(
                f"{type(pipeline).__name__} cannot be used; this takes pipelines of the families "
                f"{', '.join(Denoiser._kinds)}"
            )
        return Denoiser._kinds[family]

    def __init__(self, pipeline: DiffusionPipeline):
        # diffusers' base classes declare neither parts of pipelines nor attributes of models.
        self.pipeline: Any = pipeline
        # The network is what is called; it may be compiled, and then `model` is the module in it.
        self.network: Any = denoiser_of(pipeline)
        self.model: Any = uncompiled(self.network)
        self.family: Family = family_of(self.model)
        self.vae: nn.Module | None = getattr(pipeline, "vae", None)
        self._place: tuple | None = None  # of the model, when it was asked where it runs

    @property
    def dtype(self) -> torch.dtype:
        """Type of the latents, as the pipeline has it."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where the denoiser runs; diffusers walks all modules for it, so once a place of it."""
        hooks = (getattr(self.model, name, None) for name in ("_hf_hook", "_diffusers_hook"))
        place = (self.model.device, *hooks)
        if self._place != place:
            self._place, self._device = place, self.pipeline._execution_device
        return self._device

    @property
    def models(self) -> list[nn.Module]:
        """The networks of a run that must not ask for gradients of their weights."""
        own = [self.model] if self.vae is None else [self.model, self.vae]
        return own if self.controls is None else [*own, *self.controls.models]

    @property
    def reads_map(self) -> bool:
        """Whether it, or a control beside it, follows `Condition.map`."""
        return self.controls is not None and self.controls.reads_map

    @property
    def tokenizers(self) -> list:
        """One tokenizer per text encoder that has columns among the keys, over all columns."""
        return []

    @property
    def text_length(self) -> int:
        """Number of text tokens that pixels attend to."""
        return self.tokenizers[0].model_max_length if self.tokenizers else 0

    def text_lengths(self, prompts: list) -> list[int]:
        """Number of text tokens that the pixels of each image attend to in a call for `prompts`.

        It differs between images only where a model packs text and pixels without padding.
        """
        return [self.text_length] * len(prompts)

    @property
    def fork_blocks(self) -> list[str]:
        """Blocks of the model, as they run, at whose entry rows can join a call of it."""
        return fork_blocks(self.model)

    @property
    def controlled(self) -> bool:
        """Whether controls add something between the blocks of a call."""
        return self.controls is not None

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along a side."""
        return 1

    @property
    def channels(self) -> int:
        """Channels of the latents; what controls make for the model to read comes beside them."""
        further = 0 if self.controls is None else self.controls.further
        return self.model.config.in_channels - further

    @property
    def multiple(self) -> int:
        """What height and width of an image must be multiples of."""
        return max(8, self.factor)

    @property
    def own_size(self) -> tuple[int, int] | None:
        """Height and width of the latents that the model was trained on; None if it says none."""
        own = self.model.config.sample_size
        return (own, own) if isinstance(own, int) else own and tuple(own)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image; None stands for the model's own size.

        Raises GuidekitError for a size that the model or the autoencoder cannot have.
        """
        if None in (height, width) and not self.own_size:
            raise GuidekitError("the model has no size of its own; give height and width")
        own = self.own_size or (0, 0)
        size = [side or o * self.factor for side, o in zip((height, width), own, strict=True)]
        if any(side <= 0 or side % self.multiple for side in size):
            raise GuidekitError(
                f"height and width must be multiples of {self.multiple}, not {size[0]}x{size[1]}"
            )
        return (self.channels, size[0] // self.factor, size[1] // self.factor)

    def layout_grids(self, height: int | None = None, width: int | None = None) -> list[tuple]:
        """Grids (h, w) of the default layout sites, for an image of that size."""
        _, h, w = self.latent_shape(height, width)
        return sorted(set(layout_sites(self.model, h, w).values()))

    def set_timesteps(
        self, scheduler, steps: int, shape: tuple[int, int, int], **own: list[float]
    ) -> None:
        """Lays out the scheduler's steps for latents of `shape` (C, h, w) as the pipeline does.

        own: `timesteps` or `sigmas` in place of the number of steps.
        """
        scheduler.set_timesteps(**(own or {"num_inference_steps": steps}), device=self.device)

    def with_embedded_cfg(self, scale: float) -> "Denoiser":
        """A view of this denoiser with another guidance scale as an input of the model.

        Raises GuidekitError for a model that has no such input.
        """
        raise GuidekitError(
            f"{type(self.model).__name__} takes no guidance scale as an input (embedded_cfg); "
            "use cfg"
        )

    def prepared(self, condition: Condition) -> Condition:
        """The condition with its texts as the text encoder reads them."""
        return condition

    def content(self, condition: Condition) -> Any:
        """What a branch is told of the condition: prompt, class or image; it is hashable."""
        return condition.content

    def check_cfg(self, cfg: float) -> None:
        """Raises GuidekitError for a guidance scale that the model cannot have."""

    def check_own_loop(self) -> None:
        """Raises GuidekitError for a pipeline whose model reads more than `text` tells it."""

    def check(self, conditions: list[Condition]) -> None:
        """Raises GuidekitError for what the model does not read."""
        if any(c.label is not None for c in conditions):
            name = type(self.pipeline).__name__
            raise GuidekitError(f"{name} has no class labels; leave label out")

    def asserted(self, prompts: list[str]) -> contextlib.AbstractContextManager:
        """A context in which the text encoders must get the tokens that `tokenizers` find."""
        return contextlib.nullcontext()

    def text(self, prompts: list, size: tuple[int, int], null: bool = False) -> Text:
        """What the model is told for `prompts`, one per image of `size` (height, width).

        prompts: `content` of each. null: they are the negative ones.
        """
        raise NotImplementedError

    def __call__(self, z: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """The model's output for scaled latents z (B, C, h, w).

        (B, C, h, w), or (B, 2C, h, w) where the model learned the variance.
        """
        given = text.kwargs()
        if self.controls is not None:
            z, given = self.controls.added(z, timestep, given)
        return self.network(z, timestep=timestep, return_dict=False, **given)[0]

    def rescaled(self, combined: Tensor, cond: Tensor) -> Tensor:
        """What the pipeline makes of classifier-free guidance's combination (B, C, h, w)."""
        return combined

    def unpack(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latents (B, C, h, w) with `grid` (h, w) out of what the pipeline carries."""
        return x

    def pack(self, z: Tensor) -> Tensor:
        """What the pipeline carries out of latents (B, C, h, w)."""
        return z

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of finished latents, exactly as the pipeline does it."""
        raise NotImplementedError

    def pixels(self, x0: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of clean latents x0, in float32 and with gradient."""
        raise NotImplementedError

    def latents(self, pixels: Tensor) -> Tensor:
        """Clean latents x0 of images (B, 3, H, W) in [-1, 1], in float32 and with gradient."""
        raise NotImplementedError

    def drawn_latents(self, pixels: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Clean latents (B, C, h, w) to begin with, of images (B, 3, H, W) in [-1, 1]."""
        with torch.no_grad():
            return self.latents(pixels)


def denoiser_of(pipeline: DiffusionPipeline) -> nn.Module | None:
    """The pipeline's denoising network, None if it has none under the usual names."""
    # A compiled module's truth is asked of its length.
    found = getattr(pipeline, "unet", None)
    return getattr(pipeline, "transformer", None) if found is None else found


def uncompiled(model: nn.Module | None) -> nn.Module | None:
    """The module inside what `torch.compile(model)` gave; any other module as it is."""
    return getattr(model, "_orig_mod", model)


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """The model in float32 for a while; half precision overflows in SDXL's decoder."""
    before = model.dtype
    if before in (torch.float32, torch.float64):
        yield
        return
    model.to(torch.float32)
    try:
        yield
    finally:
        model.to(before)


_WIDE: "weakref.WeakKeyDictionary[nn.Module, tuple]" = weakref.WeakKeyDictionary()


def wide(model: nn.Module) -> nn.Module:
    """The model in float32 or better: itself, or a copy of a half one, whose backward needs it.

    One that widens its weights layer by layer is taken as it is. The copy is made once for a model,
    and again only after its weights were changed or moved.
    """
    if model.dtype in (torch.float32, torch.float64) or casts(model):
        return model
    marks = [(p.data_ptr(), p._version) for p in model.parameters()]
    if model not in _WIDE or _WIDE[model][0] != marks:
        copied = copy.deepcopy(model).float().eval().requires_grad_(False)
        _WIDE[model] = (marks, copied)
    return _WIDE[model][1]


@dataclass
class _Thaw:
    """What was on before a model was frozen, and how many runs hold it."""

    weights: list[nn.Parameter]
    training: list[nn.Module]
    holders: int = 0


_FROZEN: "WeakKeyDictionary[nn.Module, _Thaw]" = WeakKeyDictionary()
_FREEZING = threading.Lock()


@contextlib.contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient and no layer drops out for a while.

    It is counted: several runs may hold a model, one after the other or in threads, and the last
    that ends gives its flags back.
    """
    for model in models:
        _freeze(model)
    try:
        yield
    finally:
        for model in models:
            _thaw(model)


def _freeze(model: nn.Module) -> None:
    with _FREEZING:
        if model not in _FROZEN:
            weights = [p for p in model.parameters() if p.requires_grad]
            _FROZEN[model] = _Thaw(weights, [m for m in model.modules() if m.training])
        held = _FROZEN[model]
        held.holders += 1
        for p in held.weights:
            p.requires_grad_(False)
        for m in held.training:
            m.training = False


def _thaw(model: nn.Module) -> None:
    with _FREEZING:
        held = _FROZEN[model]
        held.holders -= 1
        if held.holders:
            return
        del _FROZEN[model]
        for p in held.weights:
            p.requires_grad_(True)
        for m in held.training:
            m.training = True
