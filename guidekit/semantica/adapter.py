"""Image tokens as extra keys and values of a text-to-image backbone's cross-attention.

IP-Adapter: Ye, Zhang, Liu, Han, Yang 2023, arXiv:2308.06721, equation 5. Published weights of that
form can be used; adapters trained here on episodes have the same form.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from torch import Tensor, nn

from guidekit.attention.call import AttentionCall
from guidekit.backbones.loading import LOAD_ERRORS
from guidekit.errors import GuidekitError
from guidekit.system.untrusted import check_configs, read_weights
from guidekit.taps import find_sites, tap_attention
from guidekit.testing.weights import randomised
from guidekit.zoo.shipped import ZOO

SITES = "*.attn2"
# Of published projections: the key that tells the kind.
PROJECTIONS = {"proj.weight": "IP-Adapter", "proj.3.weight": "Full", "latents": "Plus"}


class TokenProjection(nn.Module):
    """Tokens (B, T, D) of an encoder to the backbone's text width: linear, normalised."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.proj, self.norm = nn.Linear(channels, width), nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, width)."""
        return self.norm(self.proj(tokens))


class ImageAdapter(ModelMixin, ConfigMixin):
    """A projection of image tokens, and a key and a value projection for each attention site.

    sites: (name, inner width) of every cross-attention. width: channels of the backbone's text
    states. channels: of the encoder's tokens; 0 where `projection` is put in from other weights.
    encoder, fingerprint: the name of the encoder whose tokens it was trained with, and of its
    weights (`ImageEncoder.fingerprint`); empty where nobody knows.
    """

    @register_to_config
    def __init__(
        self,
        sites: tuple[tuple[str, int], ...],
        width: int,
        channels: int = 0,
        encoder: str = "",
        fingerprint: str = "",
    ):
        super().__init__()
        self.names = {name: index for index, (name, _) in enumerate(sites)}
        self.projection = TokenProjection(channels, width) if channels else None
        inner = [n for _, n in sites]
        self.to_k = nn.ModuleList(nn.Linear(width, n, bias=False) for n in inner)
        self.to_v = nn.ModuleList(nn.Linear(width, n, bias=False) for n in inner)

    def forward(self, states: Tensor) -> Tensor:
        """Image tokens (B, T, width) of what the encoder says of the images."""
        return self.projection(states)

    @property
    def reads(self) -> int:
        """Channels of the encoder's states that it takes."""
        return _in_width(self.projection)

    def extend(self, call: AttentionCall, tokens: Tensor, scale: float | Tensor = 1.0) -> None:
        """Lets the call attend to `tokens` (B, T, width) too, softmaxed by themselves."""
        index, heads = self.names[call.site], call.key.shape[1]

        def split(x: Tensor) -> Tensor:  # (B, T, H d) -> (B, H, T, d)
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)

        key, value = self.to_k[index](tokens), self.to_v[index](tokens)
        call.extend(split(key), split(value), scale)

    @contextlib.contextmanager
    def attached(self, model: nn.Module, tokens: Tensor, scale: float = 1.0) -> Iterator[None]:
        """The model reads `tokens` (B, T, width) beside its text while the context is open."""
        with tap_attention(model, lambda call: self.extend(call, tokens, scale), SITES):
            yield


def sites_of(model: nn.Module) -> tuple[tuple[str, int], ...]:
    """Names and inner widths of a backbone's cross-attention; ValueError if it has none."""
    names = find_sites(model, SITES)
    return tuple((name, model.get_submodule(name).to_k.out_features) for name in names)


def new_adapter(
    model: nn.Module, channels: int, encoder: str = "", fingerprint: str = ""
) -> ImageAdapter:
    """An adapter to train; keys begin as the text's, values at zero, which change nothing."""
    width = model.config.cross_attention_dim
    adapter = ImageAdapter(sites_of(model), width, channels, encoder, fingerprint)
    with torch.no_grad():
        for name, index in adapter.names.items():
            adapter.to_k[index].weight.copy_(model.get_submodule(name).to_k.weight)
            nn.init.zeros_(adapter.to_v[index].weight)
    return adapter


def random_adapter(model: nn.Module, channels: int) -> ImageAdapter:
    """An adapter that nobody trained, for examples and checks."""
    adapter = randomised(new_adapter(model, channels))
    return adapter.to(model.device, model.dtype).requires_grad_(False)


def load_adapter(path: str | Path, model: UNet2DConditionModel) -> ImageAdapter:
    """An adapter for the backbone: a folder saved here, or a published IP-Adapter's safetensors.

    Raises GuidekitError for other files and for weights of another backbone.
    """
    path = Path(path)
    if path.is_dir():
        adapter = _from_folder(path, model)
    elif path.suffix == ".safetensors" and path.exists():
        try:
            weights = read_weights(path)
        except ValueError as error:
            raise GuidekitError(f"adapter {error}") from None
        try:
            adapter = from_published(weights, model)
        except ValueError as error:
            raise GuidekitError(f"adapter {path}: {error}") from None
    else:
        raise GuidekitError(
            f"adapter {path}: give a folder saved by guidekit, or the .safetensors of an IP-Adapter"
        )
    return adapter.to(model.device, model.dtype).eval().requires_grad_(False)


def _from_folder(path: Path, model: UNet2DConditionModel) -> ImageAdapter:
    """A saved adapter; ValueError where it is not whole or for another backbone."""
    remedy = "give a folder that guidekit saved, whose weights are safetensors"
    check_configs(path)
    try:
        adapter, found = ImageAdapter.from_pretrained(
            path, use_safetensors=True, output_loading_info=True
        )
    except (*LOAD_ERRORS, SafetensorError) as error:
        raise GuidekitError(f"adapter {path} cannot be loaded: {_line(error)}; {remedy}") from None
    if missing := found["missing_keys"]:  # diffusers leaves them random
        raise GuidekitError(f"adapter {path} lacks {', '.join(sorted(missing))}; {remedy}")
    width = model.config.cross_attention_dim
    if adapter.config.width != width:
        raise GuidekitError(
            f"{path} was trained for a backbone whose text is {adapter.config.width} wide, not "
            f"{width}"
        )
    if [tuple(site) for site in adapter.config.sites] != list(sites_of(model)):
        raise GuidekitError(f"{path} was trained for a backbone with other attention sites")
    return adapter


def _line(error: Exception) -> str:
    """What an error says, in one line of at most 200 characters."""
    return shorten(str(error) or type(error).__name__, 200, placeholder=" ...")


def from_published(weights: dict[str, Tensor], model: UNet2DConditionModel) -> ImageAdapter:
    """An adapter from IP-Adapter weights `image_proj.*` and `ip_adapter.N.to_{k,v}_ip.weight`.

    diffusers itself makes the projection, of whatever kind; N runs over the attention modules in
    the model's order, cross-attention being odd. Raises GuidekitError if they do not fit the model.
    """
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in weights.items():
        part, _, rest = key.partition(".")
        if part not in parts:
            raise GuidekitError(f"these are no IP-Adapter weights: they hold {key!r}")
        parts[part][rest] = value
    adapter = ImageAdapter(sites_of(model), model.config.cross_attention_dim)
    _fill_sites(adapter, parts["ip_adapter"])
    adapter.projection = _projection(parts["image_proj"], model)
    return adapter


def _fill_sites(adapter: ImageAdapter, attention: dict[str, Tensor]) -> None:
    """Copies the published keys and values; ValueError if they are for other sites."""
    if len(attention) != 2 * len(adapter.names):
        raise GuidekitError(
            f"the weights are for {len(attention) // 2} attention sites, the model has "
            f"{len(adapter.names)}; take those made for this kind of model"
        )
    for index in range(len(adapter.names)):
        for layers, kind in ((adapter.to_k, "k"), (adapter.to_v, "v")):
            key = f"{2 * index + 1}.to_{kind}_ip.weight"
            if key not in attention:
                raise GuidekitError(f"they lack ip_adapter.{key}; take an IP-Adapter's own file")
            given, layer = attention[key], layers[index]
            if given.shape != layer.weight.shape:
                raise GuidekitError(
                    f"attention site {index} of the weights is {tuple(given.shape)}, the model's "
                    f"{tuple(layer.weight.shape)}; take those made for this kind of model"
                )
            layer.weight.data.copy_(given)


def _projection(weights: dict[str, Tensor], model: UNet2DConditionModel) -> nn.Module:
    """diffusers' module of a published projection; ValueError if it is not whole or does not fit.

    Those of faces (Face ID) read what no image encoder says, so they are not among PROJECTIONS.
    """
    if not any(key in weights for key in PROJECTIONS):
        known = ", ".join(f"image_proj.{key} ({kind})" for key, kind in PROJECTIONS.items())
        raise GuidekitError(f"they lack the projection of the image's tokens, one of {known}")
    try:  # low memory would leave what is missing without numbers
        projection = model._convert_ip_adapter_image_proj_to_diffusers(
            weights, low_cpu_mem_usage=False
        )
        given = _out_width(projection)
    except KeyError as error:
        raise GuidekitError(f"they lack image_proj.{error.args[0]}; download them again") from None
    except (RuntimeError, ValueError, IndexError, ArithmeticError) as error:
        raise GuidekitError(
            f"image_proj is not whole or does not fit together: {_line(error)}; download it again"
        ) from None
    if given != (width := model.config.cross_attention_dim):
        raise GuidekitError(
            f"image_proj makes tokens {given} wide, the model's text is {width}; take those made "
            "for this kind of model"
        )
    return projection


def _in_width(projection: nn.Module) -> int:
    """Channels of what a projection reads: all kinds begin with a linear layer."""
    return next(m for m in projection.modules() if isinstance(m, nn.Linear)).in_features


def _out_width(projection: nn.Module) -> int:
    """Channels of the tokens that a projection makes."""
    with torch.no_grad():
        return projection(torch.zeros(1, 1, _in_width(projection))).shape[-1]


def check_bound(adapter: ImageAdapter, encoder: Any, where: str) -> str | None:
    """A remark where nobody knows which encoder an adapter was trained with.

    encoder: an `ImageEncoder`. where: what messages begin with. Raises GuidekitError, which names
    both, for an encoder of other weights.
    """
    if not (bound := adapter.config.fingerprint):
        return (
            f"{where} does not say which encoder it was trained with; {encoder.source} fits its "
            "width, and no more is known"
        )
    if (given := encoder.fingerprint()) != bound:
        raise GuidekitError(
            f"{where} was trained with the encoder {adapter.config.encoder} of weights {bound}, "
            f"not {encoder.source} of {given}; leave the encoder to the adapter, or give that one"
        )
    return None


def settled_encoder(encoder: str) -> str:
    """An encoder's name; a folder's is made absolute, so that run.json holds from anywhere."""
    built_in = (ZOO / encoder / "open_clip_config.json").exists()  # those come first, as in loading
    folder = encoder and not built_in and Path(encoder).is_dir()
    return str(Path(encoder).resolve()) if folder else encoder


def load_clip_tower(folder: Path, option: str) -> Any:
    """A saved image tower of CLIP; ValueError that names the folder, and others beside it."""
    from transformers import CLIPVisionModelWithProjection

    remedy = "give the folder of a CLIPVisionModelWithProjection with safetensors"
    if not (folder / "config.json").exists():
        others = sorted(p.parent.name for p in folder.parent.glob("*/config.json"))
        beside = f"; in {folder.parent.resolve()} there are {', '.join(others)}" if others else ""
        wrong = "has no config.json" if folder.is_dir() else "is no folder"
        raise GuidekitError(f"{option} {folder} {wrong}; {remedy}{beside}")
    check_configs(folder)
    try:
        encoder, found = CLIPVisionModelWithProjection.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True
        )
    except (*LOAD_ERRORS, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GuidekitError(f"{option} {folder} cannot be loaded: {first}; {remedy}") from None
    if missing := found["missing_keys"]:  # transformers leaves them random
        raise GuidekitError(f"{option} {folder} lacks {min(missing)}; {remedy}")
    return encoder
