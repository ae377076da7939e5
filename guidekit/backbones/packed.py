"""Steps of flow models whose shift depends on the size of the image, and their packed latents."""

import inspect

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from guidekit.errors import GuidekitError


def dynamic_shift(scheduler, tokens: int, max_shift: float) -> dict[str, float]:
    """`mu` of `set_timesteps` for images of so many image tokens; empty for a fixed shift.

    max_shift: the pipeline's own default, for configs without it. Raises GuidekitError for a
    scheduler that has the setting from another's config and cannot follow it.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting", False):
        return {}
    if "mu" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise GuidekitError(
            f"{type(scheduler).__name__} cannot shift its steps by the size of the image, as the "
            "pipeline's own does (use_dynamic_shifting); use flow-euler, dpm++ or unipc"
        )
    mu = calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", max_shift),
    )
    return {"mu": mu}


def set_flow_timesteps(
    scheduler,
    steps: int,
    device: torch.device,
    tokens: int,
    keeps: bool,
    who: str,
    **own: list[float],
) -> None:
    """Lays out the steps from 1 to 1 / steps, shifted for so many image tokens.

    keeps: a scheduler with use_flow_sigmas keeps its own sigmas even where it takes others, as in
    FluxPipeline. own: the user's sigmas or timesteps, in place of these. Raises GuidekitError, for
    the model `who`, for a scheduler that takes none and has none.
    """
    given = dynamic_shift(scheduler, tokens, max_shift=1.15)
    takes = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    has = scheduler.config.get("use_flow_sigmas", False)
    if not (takes or has):
        raise GuidekitError(f"{type(scheduler).__name__} takes no sigmas, which {who} sets")
    count = {"num_inference_steps": steps}
    if takes and not (keeps and has):
        count = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    scheduler.set_timesteps(device=device, **(own or count), **given)


def unpacked(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Latents (B, C, h, w) out of 2x2 patches (B, N, 4C)."""
    x = x.unflatten(1, (grid[0] // 2, grid[1] // 2)).unflatten(3, (-1, 2, 2))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # from (B, h, w, C, 2, 2)


def packed(z: Tensor) -> Tensor:
    """2x2 patches (B, N, 4C) of latents (B, C, h, w)."""
    z = z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, h, 2, w, 2)
    return z.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def rescaled(combined: Tensor, cond: Tensor) -> Tensor:
    """The combination with the norms that the conditional output has along the last side."""
    norms = [torch.norm(x, dim=-1, keepdim=True) for x in (cond, combined)]
    return combined * (norms[0] / norms[1])


class PackedLatents:
    """Sizes of a denoiser whose transformer reads latents two by two, and how it does."""

    @property
    def channels(self) -> int:
        """Channels of the latents before packing."""
        return self.model.config.in_channels // 4

    @property
    def multiple(self) -> int:
        """Latents are packed two by two."""
        return self.factor * 2

    @property
    def own_size(self) -> tuple[int, int]:
        """Height and width of the latents by default."""
        return (self.pipeline.default_sample_size,) * 2

    def unpack(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latents (B, C, h, w) out of 2x2 patches (B, N, 4C)."""
        return unpacked(x, grid)

    def pack(self, z: Tensor) -> Tensor:
        """2x2 patches (B, N, 4C) of latents (B, C, h, w)."""
        return packed(z)
