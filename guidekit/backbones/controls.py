"""Controls: what goes beside a Stable Diffusion or SDXL denoiser.

ControlNets and T2I-Adapters (Zhang, Rao, Agrawala 2023, arXiv:2302.05543; Mou et al. 2023,
arXiv:2302.08453) are diffusers' own classes, and add to what the denoiser computes. Encoders of
label maps add tokens to the prompt's, maps of segments add channels to the latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, T2IAdapter
from huggingface_hub import snapshot_download, try_to_load_from_cache
from torch import nn

from guidekit.backbones.hub import require_hub
from guidekit.backbones.loading import LOAD_ERRORS, check_part, quiet
from guidekit.backbones.map_encoder import MapEncoder
from guidekit.backbones.segment_map import SegmentMap
from guidekit.backbones.whole import whole
from guidekit.errors import GuidekitError
from guidekit.images import load_image
from guidekit.labels import LABELS, LabelSet, load_label_set
from guidekit.system.untrusted import check_configs, read_object

Network = ControlNetModel | T2IAdapter | MapEncoder | SegmentMap
KINDS: dict[str, type[Network]] = {
    kind.__name__: kind for kind in (ControlNetModel, T2IAdapter, MapEncoder, SegmentMap)
}
FILES = ("*.json", "*.safetensors")
#: What a ControlNet's config has in common with that of its denoiser.
SHARED = ("block_out_channels", "cross_attention_dim", "down_block_types", "addition_embed_type")
CONVERT = (
    "from diffusers import {0} as K; K.from_pretrained({1!r}, use_safetensors=False)"
    ".save_pretrained({1!r})"
)


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet, T2I-Adapter, MapEncoder or SegmentMap with what it looks at.

    model: the network, or where it is: a diffusers folder or hub id with safetensors. image: an
    image or its path, a LabelMap, or None for each condition's own `map`; a SegmentMap looks at the
    conditions' segments. scale: strength. start, stop: fractions of the steps from the noisy end
    between which it acts, as diffusers' `control_guidance_start` and `control_guidance_end`, for a
    T2I-Adapter as its `adapter_conditioning_factor`, which may end a step earlier. guess:
    the null branch goes without a ControlNet (guess mode). labels: the only set whose maps it
    reads; None for that of labels.json beside its weights, if there is one. Raises GuidekitError
    for numbers that cannot be.
    """

    model: Any
    image: Any = None
    scale: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    guess: bool = False
    labels: LabelSet | None = None

    def __post_init__(self) -> None:
        if not np.isfinite(self.scale):
            raise GuidekitError(f"a control's scale is a finite number, not {self.scale}")
        if not 0 <= self.start < self.stop <= 1:
            raise GuidekitError(
                f"a control acts from start to stop, 0 <= start < stop <= 1, not {self.start:g} to "
                f"{self.stop:g}"
            )
        if isinstance(self.image, str | Path):
            object.__setattr__(self, "image", load_image(self.image, "control image"))

    def acts(self, index: int, n: int) -> bool:
        """Whether it acts at call `index` of `n`, by diffusers' rule for its kind."""
        ended = index >= int(n * self.stop) if self.is_adapter else (index + 1) / n > self.stop
        return self.scale != 0 and self.start <= index / n and not ended

    @property
    def is_adapter(self) -> bool:
        """Whether it is a T2I-Adapter, which looks once and not at every step."""
        return isinstance(self.model, T2IAdapter)

    @property
    def looks_once(self) -> bool:
        """Whether it does not look at the noisy image: all but ControlNets."""
        return not isinstance(self.model, ControlNetModel)

    @property
    def reads_map(self) -> bool:
        """Whether it looks at the conditions' maps."""
        return self.image is None and not isinstance(self.model, SegmentMap)

    @property
    def channels(self) -> int:
        """Channels of the image that it reads."""
        config = self.model.config
        return config.in_channels if self.is_adapter else config.conditioning_channels

    @property
    def further(self) -> int:
        """Channels that the denoiser reads of it beside the latents."""
        return self.model.config.channels if isinstance(self.model, SegmentMap) else 0


def load_control(name: str | Path, device: Any = "cpu", dtype: Any = None) -> nn.Module:
    """A control's network from a diffusers folder or hub id.

    Raises GuidekitError for a folder of another kind, for pickled weights, with the line that
    converts them, and for what cannot be loaded.
    """
    folder = Path(name) if Path(name).is_dir() else _downloaded(str(name))
    if not (folder / "config.json").is_file():
        raise GuidekitError(
            f"control {name} has no config.json; give the folder of a ControlNet or T2I-Adapter in "
            "diffusers' format, or of a control that guidekit trained"
        )
    kind = read_object(folder / "config.json").get("_class_name")
    if kind not in KINDS:
        raise GuidekitError(f"control {name} is a {kind}; controls are {' and '.join(KINDS)}")
    check_configs(folder)
    check_part(folder, f'python -c "{CONVERT.format(kind, str(folder))}"')
    if not any(folder.glob("*.safetensors")):
        raise GuidekitError(_no_weights(name, kind))
    half = not any(file.name.count(".") == 1 for file in folder.glob("*.safetensors"))
    try:
        with quiet(), whole():
            model = KINDS[kind].from_pretrained(
                folder, use_safetensors=True, dtype=dtype, variant="fp16" if half else None
            )
    except LOAD_ERRORS as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GuidekitError(f"control {name} cannot be loaded: {first}") from None
    return model.to(device).eval().requires_grad_(False)


def _no_weights(name: str | Path, kind: str) -> str:
    """What is said of a control whose pickle, if it has one, was not downloaded."""
    local = Path(name).is_dir()
    repo, own = ("OWNER/NAME", str(name)) if local else (name, str(name).rpartition("/")[2])
    return (
        f"control {name} has no safetensors; if its weights are a pickle, which can run code when "
        f"it is read, convert them once and give --control {own}: hf download {repo} --local-dir "
        f'{own} && python -c "{CONVERT.format(kind, own)}"'
    )


def _downloaded(name: str) -> Path:
    if name.count("/") != 1 or Path(name).exists():
        raise GuidekitError(f"no control {name!r}: not a folder, not a hub id such as owner/name")
    require_hub(name, "config.json")
    return Path(snapshot_download(name, allow_patterns=list(FILES)))


def control_labels(name: str | Path) -> LabelSet | None:
    """The label set beside a control's weights, which are on this machine; None without one."""
    place = Path(name) / LABELS
    found = place if Path(name).is_dir() else try_to_load_from_cache(str(name), LABELS)
    there = isinstance(found, str | Path) and Path(found).is_file()
    return load_label_set(found) if there else None


def check_net(net: ControlNetModel, denoiser: Any) -> None:
    """Raises GuidekitError for a ControlNet of another family, or for other sizes of latents."""
    embedding = net.config.get("conditioning_embedding_out_channels")
    factor = 2 ** (len(embedding) - 1)
    if factor != denoiser.factor:
        raise GuidekitError(
            f"the control is a ControlNet for another model: it makes an image {factor} times "
            f"smaller, this model's latents are {denoiser.factor} times smaller; take one that was "
            "trained for this model's family"
        )
    for key in SHARED:
        own, wanted = _plain(net.config.get(key)), _plain(denoiser.model.config.get(key))
        if own != wanted:
            raise GuidekitError(
                f"the control is a ControlNet for another model: its {key} is {own}, the "
                f"denoiser's {wanted}; take one that was trained for this model's family"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_widths(model: MapEncoder | SegmentMap, denoiser: Any) -> None:
    """Raises GuidekitError for a control that was trained with texts of another width."""
    if isinstance(model, MapEncoder):
        own, wanted = model.config.width, denoiser.model.config.cross_attention_dim
    else:
        own, wanted = model.config.text_channels, denoiser.pipeline.text_encoder.config.hidden_size
    if own != wanted:
        raise GuidekitError(
            f"the control is a {type(model).__name__} for another model: its texts have {own} "
            f"channels, this one's {wanted}; take the model that it was trained with"
        )


def check_further(controls: Sequence[Control], denoiser: Any) -> None:
    """Raises GuidekitError where the denoiser reads other channels than latents and controls have.

    A control that looks at its own image where it reads segments is refused too.
    """
    for control in controls:
        if isinstance(control.model, SegmentMap) and control.image is not None:
            raise GuidekitError(
                "this control reads the segments of the condition, not an image; leave it out"
            )
    reads = denoiser.model.config.in_channels
    own = getattr(denoiser.vae.config, "latent_channels", reads)
    further = sum(control.further for control in controls)
    if further and reads != own + further:
        raise GuidekitError(
            f"the controls make {further} channels beside the {own} of the latents, and the model "
            f"reads {reads}; take the model that was trained with the control"
        )


def check_adapter(adapter: T2IAdapter, denoiser: Any, size: tuple[int, int]) -> None:
    """Raises GuidekitError for a T2I-Adapter whose features do not fit the denoiser's blocks.

    size: height and width of the image.
    """
    if wrong := [side for side in size if side % adapter.downscale_factor]:
        raise GuidekitError(
            f"the T2I-Adapter needs height and width in multiples of {adapter.downscale_factor}, "
            f"not {wrong[0]}"
        )
    blank = torch.zeros(
        1, adapter.config.in_channels, *size, device=adapter.device, dtype=adapter.dtype
    )
    with torch.no_grad():
        found = [tuple(x.shape[1:]) for x in adapter(blank)]
    grid = (size[0] // denoiser.factor, size[1] // denoiser.factor)
    wanted = _block_shapes(denoiser.model, grid)
    if found[: len(wanted)] != wanted:
        raise GuidekitError(
            f"the control is a T2I-Adapter for another model: its features are {found}, the "
            f"denoiser's blocks take {wanted}; take one that was trained for this model's family"
        )


def _block_shapes(model: Any, grid: tuple[int, int]) -> list[tuple[int, int, int]]:
    """(C, h, w) where each down block of a UNet takes an adapter's features.

    With cross-attention that is before its downsampler, without it after.
    """
    shapes, (h, w) = [], grid
    for block, channels in zip(model.down_blocks, model.config.block_out_channels, strict=True):
        halved = ((h + 1) // 2, (w + 1) // 2) if block.downsamplers else (h, w)
        attends = getattr(block, "has_cross_attention", False)
        shapes.append((channels, *((h, w) if attends else halved)))
        h, w = halved
    return shapes
