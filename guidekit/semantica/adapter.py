"""Image tokens as extra keys and values of a text-to-image backbone's cross-attention.

IP-Adapter: Ye, Zhang, Liu, Han, Yang 2023, arXiv:2308.06721, equation 5. Published weights of that
form can be used; adapters trained here on episodes have the same form.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file
from torch import Tensor, nn

from guidekit.attention import AttentionCall
from guidekit.miniatures import randomised
from guidekit.taps import find_sites, tap_attention

SITES = "*.attn2"


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
    """

    @register_to_config
    def __init__(self, sites: tuple[tuple[str, int], ...], width: int, channels: int = 0):
        super().__init__()
        self.names = {name: index for index, (name, _) in enumerate(sites)}
        self.projection = TokenProjection(channels, width) if channels else None
        inner = [n for _, n in sites]
        self.to_k = nn.ModuleList(nn.Linear(width, n, bias=False) for n in inner)
        self.to_v = nn.ModuleList(nn.Linear(width, n, bias=False) for n in inner)

    def forward(self, states: Tensor) -> Tensor:
        """Image tokens (B, T, width) of what the encoder says of the pictures."""
        return self.projection(states)

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


def new_adapter(model: nn.Module, channels: int) -> ImageAdapter:
    """An adapter to train; keys begin as the text's, values at zero, which change nothing."""
    adapter = ImageAdapter(sites_of(model), model.config.cross_attention_dim, channels)
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

    Raises ValueError for other files and for weights of another backbone.
    """
    path = Path(path)
    if path.is_dir():
        adapter = ImageAdapter.from_pretrained(path)
        wanted = [tuple(site) for site in adapter.config.sites]
        width = model.config.cross_attention_dim
        if adapter.config.width != width:
            raise ValueError(
                f"{path} was trained for a backbone whose text is {adapter.config.width} wide, not "
                f"{width}"
            )
        if wanted != list(sites_of(model)):
            raise ValueError(f"{path} was trained for a backbone with other attention sites")
    elif path.suffix == ".safetensors" and path.exists():
        adapter = from_published(load_file(path), model)
    else:
        raise ValueError(
            f"adapter {path}: give a folder saved by guidekit, or the .safetensors of an IP-Adapter"
        )
    return adapter.to(model.device, model.dtype).eval().requires_grad_(False)


def from_published(weights: dict[str, Tensor], model: UNet2DConditionModel) -> ImageAdapter:
    """An adapter from IP-Adapter weights `image_proj.*` and `ip_adapter.N.to_{k,v}_ip.weight`.

    diffusers itself makes the projection, of whatever kind; N runs over the attention modules in
    the model's order, cross-attention being odd. Raises ValueError if they do not fit the model.
    """
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in weights.items():
        part, _, rest = key.partition(".")
        if part not in parts:
            raise ValueError(f"these are no IP-Adapter weights: they hold {key!r}")
        parts[part][rest] = value
    adapter = ImageAdapter(sites_of(model), model.config.cross_attention_dim)
    attention = parts["ip_adapter"]
    if len(attention) != 2 * len(adapter.names):
        raise ValueError(
            f"the weights are for {len(attention) // 2} attention sites, the model has "
            f"{len(adapter.names)}; take those made for this kind of model"
        )
    for index in range(len(adapter.names)):
        for layers, kind in ((adapter.to_k, "k"), (adapter.to_v, "v")):
            given = attention[f"{2 * index + 1}.to_{kind}_ip.weight"]
            if given.shape != layers[index].weight.shape:
                raise ValueError(
                    f"attention site {index} of the weights is {tuple(given.shape)}, the model's "
                    f"{tuple(layers[index].weight.shape)}; take those made for this kind of model"
                )
            layers[index].weight.data.copy_(given)
    adapter.projection = model._convert_ip_adapter_image_proj_to_diffusers(parts["image_proj"])
    return adapter
