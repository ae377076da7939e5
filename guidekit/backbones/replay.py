"""The denoiser of a pipeline that is running, called again with what the pipeline gives it.

Texts, image embeddings, ControlNet residuals, sizes and whatever else goes into the denoiser are
rows of the pipeline's own call, [null, cond] or [cond]; a branch gets the rows of its kind.
"""

import contextlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from guidekit.backbones.denoiser import Denoiser
from guidekit.backbones.records import Family
from guidekit.blocks import WHOLE
from guidekit.errors import GuidekitError


@dataclass(frozen=True)
class Rows:
    """Halves of the pipeline's own denoiser call, in place of encoded prompts: null or cond."""

    null: tuple[bool, ...]

    @staticmethod
    def cat(parts: list["Rows"]) -> "Rows":
        """The halves one after the other."""
        return Rows(tuple(null for part in parts for null in part.null))

    def windowed(self, view: tuple[int, int, int, int] | None) -> "Rows":
        """Themselves: what the pipeline tells its model has no place in the image."""
        return self


class Replay:
    """The denoiser of a live pipeline with the arguments of the pipeline's own latest call.

    `prompts` and `negatives` are the pipeline's own, one per image; a branch with other prompts
    raises GuidekitError, because the pipeline has not encoded them.
    """

    families = ("sd", "sdxl", "sd3", "flux", "pixart")
    #: Those of the pipeline are in its own call.
    controls = None

    def __init__(self, pipeline: DiffusionPipeline):
        own = Denoiser(pipeline)
        if own.family.name not in self.families:
            raise GuidekitError(
                f"{type(pipeline).__name__} cannot be attached to; this takes pipelines of the "
                f"families {', '.join(self.families)}"
            )
        self.own, self.pipeline, self.models = own, pipeline, own.models
        self.network, self.model, self.factor = own.network, own.model, own.factor
        self.reads_text = own.reads_text
        self.pixels, self.latents, self.check = own.pixels, own.latents, own.check
        self.rescaled, self.vae = own.rescaled, own.vae
        self.channels = own.vae.config.latent_channels  # an inpainting model's input has more
        self.content, self.reads_image = own.content, own.reads_image
        # The class's, because the instance's may be a wrapper of offloading.
        names = list(inspect.signature(type(self.model).forward).parameters)[1:]
        self.names, self.input_name = names, names[0]
        self.prompts: list[str] = []
        self.negatives: list[str] = []
        self._forward: Callable | None = None
        self._given: dict[str, Any] = {}
        self._timestep: Tensor | None = None
        self._channels = 0

    def start(self, prompts: list[str], negatives: list[str]) -> None:
        """A new call of the pipeline, with these prompts."""
        self.prompts, self.negatives, self._given = prompts, negatives, {}

    def asserted(self, prompts: list[str]) -> contextlib.AbstractContextManager:
        """Nothing is encoded here; the pipeline's own encoding has been compared."""
        return contextlib.nullcontext()

    @property
    def family(self) -> Family:
        """The record of the model, with what the pipeline's call has beside the image's pixels."""
        return self.own.family.beside(self._further)

    @property
    def _further(self) -> int:
        """Tokens of other images in the call, which stand after those of the image."""
        if not self._given or self.input.ndim == 4:
            return 0
        return self.input.shape[1] - math.prod(self._side) // 4

    @property
    def _side(self) -> tuple[int, int]:
        """Height and width of the latents of a call with packed ones."""
        ids = self._given["img_ids"].reshape(-1, 3)
        h, w = ids[ids[:, 0] == 0].amax(0)[1:]  # those of other images (Kontext) have another first
        return 2 * int(h) + 2, 2 * int(w) + 2

    def record(self, forward: Callable, args: tuple, kwargs: dict) -> None:
        """Keeps the arguments of the pipeline's call of `forward` for the calls of one step."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        given.pop("return_dict", None)
        self._forward, self._given = forward, _normal(given)

    def position(self, scheduler, n: int) -> int:
        """Where in the scheduler's timesteps the recorded call is, the pipeline's first of `n`."""
        for name in ("step_index", "begin_index"):
            if (known := getattr(scheduler, name, None)) is not None:
                return known
        # The model's own is the nearest: Flux's is divided by 1000, and rounded in half precision.
        near = torch.as_tensor(self._given["timestep"]).flatten()[0] / self._time_scale
        distances = (scheduler.timesteps - near).abs()
        found = (distances == distances.min()).nonzero().flatten().tolist()
        last = len(distances) - n  # PNDM has timesteps twice, and image to image begins at either
        return last if last in found else found[0]

    def begin(self, timestep: Tensor, z: Tensor) -> None:
        """The recorded call was at this timestep of the scheduler, for z (B, C, h, w)."""
        self._timestep, self._channels = timestep, z.shape[1]

    @property
    def input(self) -> Tensor:
        """The model input of the pipeline's own call, all its rows."""
        return self._given[self.input_name]

    @property
    def fork_blocks(self) -> list[str]:
        """The model's own."""
        return self.own.fork_blocks

    @property
    def controlled(self) -> bool:
        """Whether the pipeline's call has something to add between the model's blocks."""
        names = [name for name in self._given if "residual" in name or "control" in name]
        return any(self._given[name] is not None for name in names)

    @property
    def copies(self) -> int:
        """How many rows of the call each image has: 1, [cond], or 2, [null, cond].

        Raises GuidekitError for other numbers.
        """
        rows, pictures = len(self.input), len(self.prompts)
        if rows not in (pictures, 2 * pictures):
            raise GuidekitError(
                f"{type(self.pipeline).__name__} calls its denoiser with {rows} rows for "
                f"{pictures} images; attach knows [cond] and [null, cond] in one batch"
            )
        return rows // pictures

    @property
    def device(self) -> torch.device:
        """Where the denoiser runs."""
        return self.own.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the model's input."""
        return self.input.dtype

    @property
    def _time_scale(self) -> float:
        return 1e-3 if self.family.name == "flux" else 1.0

    @property
    def text_length(self) -> int:
        """Number of text tokens in the call; before it is made, more than there can be."""
        return self._given["encoder_hidden_states"].shape[1] if self._given else 10**6

    def text_lengths(self, prompts: list[str]) -> list[int]:
        """Number of text tokens that the pixels of each image attend to."""
        return [self.text_length] * len(prompts)

    @property
    def tokenizers(self) -> list:
        """One tokenizer per text encoder that has columns among the keys, over all columns."""
        return self.own.key_tokenizers(self.text_length)

    def text(self, prompts: list[str], size: tuple[int, int], null: bool = False) -> Rows:
        """The rows of the pipeline's own prompts, or of its own negative ones."""
        if null and self.copies == 1:
            raise GuidekitError(
                "a guidance adds the null branch, and the pipeline was called without it; call it "
                "with a guidance_scale above 1"
            )
        if prompts != (self.negatives if null else self.prompts):
            raise GuidekitError(
                "a guidance needs prompts that the pipeline has not encoded "
                f"({', '.join(map(repr, prompts))}); draw with guidekit.sample instead"
            )
        return Rows((null,))

    def _index(self, text: Rows) -> tuple[int, ...]:
        """Rows of the call, which may have lost its null half since the last step."""
        count, last = len(self.prompts), len(self.input)
        starts = [0 if null else last - count for null in text.null]
        return tuple(row for start in starts for row in range(start, start + count))

    def __call__(self, z: Tensor, timestep: Tensor, text: Rows) -> Tensor:
        """The model's output (B, C, h, w) for scaled latents z (B, C, h, w)."""
        index, count = self._index(text), len(self.input)
        given = {k: _rows(v, index, count, k) for k, v in self._given.items()}
        given[self.input_name] = self._completed(self.pack(z), given[self.input_name])
        if timestep is not self._timestep and not torch.equal(timestep, self._timestep):
            own = given["timestep"]
            given["timestep"] = (timestep * self._time_scale).to(own).expand(own.shape)
        out = self._forward(**given, return_dict=False)[0]
        return self.unpack(out)[:, : z.shape[1]]

    def _completed(self, x: Tensor, given: Tensor) -> Tensor:
        """The latents with what the pipeline gives beside them.

        An inpainting model's mask and image are further channels, Kontext's image is further
        tokens.
        """
        if x.ndim == 4:
            return torch.cat([x, given[:, self._channels :]], 1)
        own = torch.cat([x, given[:, : x.shape[1], x.shape[2] :]], 2)
        return torch.cat([own, given[:, x.shape[1] :]], 1)

    def unpack(self, x: Tensor) -> Tensor:
        """Latents (B, C, h, w) out of what the pipeline carries or gives, which may be packed."""
        if x.ndim == 4:
            return x
        side = self._side
        return self.own.unpack(x[:, : math.prod(side) // 4, : 4 * self.channels], side)

    def pack(self, z: Tensor) -> Tensor:
        """What the pipeline carries out of latents (B, C, h, w)."""
        return self.own.pack(z)


def _normal(value: Any) -> Any:
    """Arguments that autograd may save: tensors of inference mode are copied."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {k: _normal(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_normal(v) for v in value)
    return value


def _rows(value: Any, index: tuple[int, ...], count: int, name: str) -> Any:
    """The chosen rows of every tensor with `count` of them; containers are always new.

    SD3 takes arguments out of the containers that it is given.
    """
    if name in WHOLE:
        return value
    if isinstance(value, dict):
        return {k: _rows(v, index, count, k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rows(v, index, count, name) for v in value)
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != count:
        return value
    if index == tuple(range(index[0], index[0] + len(index))):
        return value[index[0] : index[0] + len(index)]
    return value[list(index)]
