"""UViT: a pixel denoiser that follows the tokens of another image.

Semantica, arXiv:2405.14857: convolutions at fine grids, transformer blocks with cross-attention to
a frozen encoder at 32x32 and 16x16. The U-shaped transformer is simple diffusion's,
arXiv:2301.11093. diffusers' UVit2DModel is another model (masked tokens).

`VARIANTS`, with parameters in millions (counted; no source that we know prints the paper's):

    a           384.3   2x2 patches, stages of 128/256/512/1024 channels, 3/3/3/16 blocks,
                        DINOv2 B/14; 318.5 with FiLM
    b           386.6   no patches, one stage of 2 blocks and 128 channels more
    c           1323.8  b with doubled channels but for its first stage, DINOv2 L/14
    tiny        2.2     32x32 images, two stages
    tiny-pixel  2.2     is to tiny what b is to a
"""

import itertools
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from guidekit.errors import GuidekitError
from guidekit.semantica.blocks import Stage, zeroed
from guidekit.semantica.schedule import ENDS, NOISE_SIZE, STEPS, logsnr, shift

FREQUENCIES = 256  # sines and cosines of the log-SNR

CONV, ATTEND = "conv", "transformer"
_A = dict(
    sample_size=256,
    patch_size=2,
    block_out_channels=(128, 256, 512, 1024),
    layers_per_block=(3, 3, 3, 16),
    down_block_types=(CONV, CONV, ATTEND),
    mid_block_type=ATTEND,
    cross_attention_dim=768,
)
_B = _A | dict(
    patch_size=1,
    block_out_channels=(128, 128, 256, 512, 1024),
    layers_per_block=(2, 3, 3, 3, 16),
    down_block_types=(CONV, CONV, CONV, ATTEND),
)
_TINY = dict(
    sample_size=32,
    patch_size=2,
    block_out_channels=(64, 128),
    layers_per_block=(2, 4),
    down_block_types=(CONV,),
    mid_block_type=ATTEND,
    attention_head_dim=32,
    cross_attention_dim=128,
    embedding_dim=256,
    norm_num_groups=8,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "a": _A,
    "b": _B,
    "c": _B | dict(block_out_channels=(128, 256, 512, 1024, 2048), cross_attention_dim=1024),
    "tiny": _TINY,
    "tiny-pixel": _TINY
    | dict(
        patch_size=1,
        block_out_channels=(32, 64, 128),
        layers_per_block=(1, 2, 4),
        down_block_types=(CONV, CONV),
    ),
}


class UViT(ModelMixin, ConfigMixin):
    """Predicts the velocity of a noisy image from it, its noise level and another image.

    conditioning: "tokens" (cross-attention to all tokens of the encoder's last block), "film" (the
    encoder's global feature, normalised and projected, is added to the noise embedding), "none".
    The last of `block_out_channels` and `layers_per_block` are the middle's. noise_size: side at
    which the schedule is not shifted; the log-SNR that the model is shown follows from it.

    Raises GuidekitError for settings that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TransformerBlock", "ConvBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        in_channels: int = 3,
        patch_size: int = 2,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 1024),
        layers_per_block: tuple[int, ...] = (3, 3, 3, 16),
        down_block_types: tuple[str, ...] = (CONV, CONV, ATTEND),
        mid_block_type: str = ATTEND,
        attention_head_dim: int = 64,
        cross_attention_dim: int = 768,
        conditioning: str = "tokens",
        embedding_dim: int = 1024,
        norm_num_groups: int = 32,
        dropout: float = 0.0,
        noise_size: int = NOISE_SIZE,
    ):
        super().__init__()
        kinds = (*down_block_types, mid_block_type)
        _check(block_out_channels, layers_per_block, kinds, conditioning)
        if sample_size % (least := patch_size * 2 ** (len(block_out_channels) - 1)):
            raise GuidekitError(
                f"{len(block_out_channels)} stages cannot halve images of {sample_size} pixels; "
                f"take a multiple of {least}"
            )
        widths, e = block_out_channels, embedding_dim
        self.time_embedding = TimestepEmbedding(FREQUENCIES, e)
        if conditioning == "film":
            self.film = nn.Linear(cross_attention_dim, e)
        common = dict(
            groups=norm_num_groups,
            head=attention_head_dim,
            dropout=dropout,
            context=cross_attention_dim if conditioning == "tokens" else None,
        )
        sides = [sample_size // patch_size // 2**level for level in range(len(widths))]
        stages = list(zip(down_block_types, layers_per_block, widths, sides, strict=False))
        self.conv_in = nn.Conv2d(in_channels, widths[0], patch_size, patch_size)
        self.down_blocks = nn.ModuleList(Stage(*stage, e, **common) for stage in stages)
        self.mid_block = Stage(
            mid_block_type, layers_per_block[-1], widths[-1], sides[-1], e, **common
        )
        self.up_blocks = nn.ModuleList(
            Stage(*stage, e, skips=True, **common) for stage in reversed(stages)
        )
        pairs = list(itertools.pairwise(widths))
        self.downsamplers = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairs)
        self.upsamplers = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in reversed(pairs))
        self.norm_out = nn.GroupNorm(norm_num_groups, widths[0])
        self.conv_out = zeroed(nn.Conv2d(widths[0], in_channels * patch_size**2, 1))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Velocity (B, 3, H, W) at noisy images `sample` (B, 3, H, W).

        timestep: t * 1000 - 1 for time t in (0, 1], one number or (B,). encoder_hidden_states:
        (B, T, D) tokens, or with FiLM the global feature (B, 1, D); a row of zeros is no condition.
        """
        states = self._states(encoder_hidden_states)
        emb = self._embedding(sample, timestep)
        if self.config.conditioning == "film":
            emb = emb + self.film(states[:, 0])
        x, skips = self.conv_in(sample), []
        for stage, down in zip(self.down_blocks, self.downsamplers, strict=True):
            x, outs = stage(x, emb, states)
            skips.append(outs)
            x = down(nn.functional.avg_pool2d(x, 2))
        x, _ = self.mid_block(x, emb, states)
        for stage, up in zip(self.up_blocks, self.upsamplers, strict=True):
            x = nn.functional.interpolate(up(x), scale_factor=2.0, mode="nearest")
            x, _ = stage(x, emb, states, skips.pop())
        x = self.conv_out(nn.functional.silu(self.norm_out(x)))
        out = nn.functional.pixel_shuffle(x, self.config.patch_size)
        return UNet2DOutput(sample=out) if return_dict else (out,)

    def _states(self, states: Tensor | None) -> Tensor | None:
        """The condition normalised per token, in which zeros stay zeros."""
        if self.config.conditioning == "none":
            return None
        if states is None:
            raise GuidekitError("this model follows an image: give encoder_hidden_states (B, T, D)")
        if self.config.conditioning == "film" and states.shape[1] != 1:
            raise GuidekitError(
                f"FiLM takes the encoder's global feature (B, 1, D), not {tuple(states.shape)}"
            )
        return nn.functional.layer_norm(states, states.shape[-1:])

    def _embedding(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """Embedding (B, E) of the log-SNR at the timestep, from 0 (clean) to 1000."""
        t = (torch.as_tensor(timestep, device=sample.device).float() + 1) / STEPS
        config = self.config
        level = logsnr(t.expand(len(sample)), config.sample_size, config.noise_size)
        top = ENDS + shift(config.sample_size, config.noise_size)
        scaled = (top - level) * (1000 / (2 * ENDS))
        return self.time_embedding(get_timestep_embedding(scaled, FREQUENCIES).to(sample.dtype))


def variant(name: str, **changes: Any) -> UViT:
    """The named variant with random weights; `changes` of its config.

    Raises GuidekitError for a name that does not exist.
    """
    if name not in VARIANTS:
        raise GuidekitError(f"no UViT {name!r}; there are {', '.join(VARIANTS)}")
    return UViT(**VARIANTS[name] | changes)


def _check(widths: tuple, layers: tuple, kinds: tuple, conditioning: str) -> None:
    """Raises GuidekitError for settings that do not fit each other."""
    if not len(widths) == len(layers) == len(kinds):
        raise GuidekitError(
            f"{len(widths)} widths, {len(layers)} numbers of blocks and {len(kinds)} kinds; give "
            "one of each per stage, the middle included"
        )
    if unknown := set(kinds) - {CONV, ATTEND}:
        raise GuidekitError(f"no block type {', '.join(unknown)}; there are {CONV} and {ATTEND}")
    if conditioning not in ("tokens", "film", "none"):
        raise GuidekitError(f"conditioning must be tokens, film or none, not {conditioning!r}")
