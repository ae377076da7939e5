"""Frozen image encoders: tokens of the last block and one global feature, from timm or open_clip.

DINOv2: Oquab et al. 2023, arXiv:2304.07193. SigLIP: Zhai et al. 2023, arXiv:2303.15343.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from guidekit.backbones.loading import LOAD_ERRORS
from guidekit.errors import GuidekitError
from guidekit.noisy_clip.files import folder_config, open_pretrained
from guidekit.system.untrusted import check_configs, check_encoder, read_weights
from guidekit.zoo.shipped import ZOO

# Short names; everything else is `timm/NAME` or `open_clip/ARCHITECTURE/TAG`.
NAMES = {
    "dinov2-b": ("timm/vit_base_patch14_dinov2.lvd142m", {"img_size": 224}),
    "dinov2-l": ("timm/vit_large_patch14_dinov2.lvd142m", {"img_size": 224}),
    "siglip-b": ("timm/vit_base_patch16_siglip_224.webli", {}),
}
CLIP_CONFIG, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
# open_clip builds both towers; the text one of this size is thrown away.
_NO_TEXT = dict(context_length=4, vocab_size=8, width=8, heads=1, layers=1)


class ImageEncoder(ModelMixin, ConfigMixin):
    """Tokens and global feature of images; saved with its weights, so that it stays the same.

    library: "timm" (architecture: its name, settings: arguments of `timm.create_model`) or
    "open_clip" (settings: embed_dim, vision_cfg and quick_gelu of its model config). mean, std: of
    the images in [0, 1]. source: the name that it was made from.
    """

    @register_to_config
    def __init__(
        self,
        library: str,
        architecture: str,
        settings: dict[str, Any],
        image_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        source: str = "",
    ):
        super().__init__()
        check_encoder({"architecture": architecture, **settings}, "the encoder's config")
        if library == "timm":
            self.net = timm.create_model(architecture, pretrained=False, num_classes=0, **settings)
        else:
            self.net = _clip_tower(settings)
        self.eval().requires_grad_(False)

    @property
    def source(self) -> str:
        """What it was made from, for records."""
        return self.config.source

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, D) and global features (B, P) of pixels (B, 3, H, W) in [-1, 1].

        The global feature is the class token (DINOv2), the attention pool's output (SigLIP) or the
        joint embedding (CLIP). Convolutions' tokens are the places of their last map. Raises
        ValueError for a model that has several maps.
        """
        x, net = self._normalised(pixels), self.net
        if hasattr(net, "trunk"):  # open_clip's wrapper of a timm model
            tokens = net.trunk.forward_features(x)
            return self._flat(tokens, net.trunk), net.head(net.trunk.forward_head(tokens))
        if isinstance(net, ModifiedResNet):
            tokens = nn.Sequential(net.layer1, net.layer2, net.layer3, net.layer4)(net.stem(x))
            return self._flat(tokens, net), net.attnpool(tokens)
        if self.config.library == "open_clip":
            pooled, tokens = net(x)
            return tokens, pooled
        tokens = net.forward_features(x)
        return self._flat(tokens, net), net.forward_head(tokens, pre_logits=True)

    def _flat(self, tokens: Tensor, net: nn.Module) -> Tensor:
        """Tokens (B, T, D) of features, which may be a map (B, D, h, w), or timm's (B, h, w, D)."""
        if not isinstance(tokens, Tensor):
            raise GuidekitError(
                f"{self.source or type(net).__name__} has {len(tokens)} maps of features, not one; "
                "give a model that has one, such as a vit_*, swin_* or convnext_* of timm"
            )
        if tokens.ndim == 3:
            return tokens
        if getattr(net, "output_fmt", "NCHW") == "NHWC":
            return tokens.flatten(1, 2)
        return tokens.flatten(2).transpose(1, 2)

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, s, s) as the network was trained on them."""
        size = self.config.image_size
        pixels = pixels.to(self.device, torch.float32)
        if tuple(pixels.shape[-2:]) != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        mean, std = pixels.new_tensor([self.config.mean, self.config.std]).view(2, 3, 1, 1)
        return ((pixels.clamp(-1, 1) / 2 + 0.5 - mean) / std).to(self.dtype)

    def copied(self, **changes: Any) -> "ImageEncoder":
        """Another of the same weights that does not say from which folder it came.

        changes: of the config.
        """
        config = {k: v for k, v in self.config.items() if not k.startswith("_")}
        other = ImageEncoder(**config | changes)
        other.load_state_dict(self.state_dict())
        return other

    def fingerprint(self) -> str:
        """A name of its weights: the same for the same weights in half precision."""
        digest = hashlib.sha256()
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().half().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def shapes(self) -> tuple[int, int, int]:
        """Number of tokens T, their channels D, channels P of the global feature."""
        with torch.no_grad():
            size = self.config.image_size
            tokens, pooled = self(torch.zeros(1, 3, size, size))
        return tokens.shape[1], tokens.shape[2], pooled.shape[1]


def load_encoder(name: str | Path) -> ImageEncoder:
    """An encoder by name, with its weights.

    name: dinov2-b, dinov2-l, siglip-b, `timm/NAME`, `open_clip/ARCHITECTURE/TAG` (those are
    downloaded at the first use), a built-in such as scenes-clip, or a folder: a saved
    ImageEncoder, or what open_clip reads as `local-dir:`. Raises GuidekitError that names what
    exists, and for a saved one whose weights are no safetensors.
    """
    name = str(name)
    folder = ZOO / name if (ZOO / name / CLIP_CONFIG).exists() else Path(name)
    if (folder / CLIP_CONFIG).exists():
        return _from_clip_folder(folder, name)
    if (folder / "config.json").exists():
        return _from_saved(folder)
    full, settings = NAMES.get(name, (name, {}))
    library, _, rest = full.partition("/")
    if library == "timm" and rest:
        return from_timm(rest, pretrained=True, **settings)
    if library == "open_clip" and rest.count("/") == 1:
        return from_open_clip(*rest.split("/"))
    built_in = sorted(p.parent.name for p in ZOO.glob(f"*/{CLIP_CONFIG}"))
    raise GuidekitError(
        f"no encoder {name!r}; there are {', '.join([*NAMES, *built_in])}, timm/NAME, "
        "open_clip/ARCHITECTURE/TAG, and folders of saved ones"
    )


def _from_saved(folder: Path) -> ImageEncoder:
    """A saved ImageEncoder; weights that have to be unpickled are not read."""
    if not list(folder.glob("*.safetensors")):
        raise GuidekitError(f"{folder} has no safetensors; save the encoder in that format")
    check_configs(folder)
    try:
        encoder = ImageEncoder.from_pretrained(folder, use_safetensors=True)
    except LOAD_ERRORS as error:
        raise _unfit(folder, error) from None
    return encoder.eval().requires_grad_(False)


def _unfit(folder: Path, error: Exception) -> GuidekitError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return GuidekitError(f"the encoder {folder} cannot be loaded: {first}; save it again")


def random_encoder() -> ImageEncoder:
    """A tiny encoder that nobody trained, for examples and checks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return from_timm("test_vit", pretrained=False, img_size=32)


def from_timm(name: str, pretrained: bool, **settings: Any) -> ImageEncoder:
    """A timm model's features. Refuses a name or weights that timm does not know."""
    if not timm.is_model(name.split(".")[0]):
        raise GuidekitError(f"timm has no model {name!r}; see timm.list_models()")
    if pretrained and "." in name and name not in timm.list_pretrained():
        tags = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or "none"
        raise GuidekitError(f"timm has no weights {name!r}; there are {tags}")
    net = timm.create_model(name, pretrained=pretrained, num_classes=0, **settings)
    data = timm.data.resolve_data_config({}, model=net)
    size = settings.get("img_size", data["input_size"][1])
    encoder = ImageEncoder(
        "timm",
        name.split(".")[0],
        settings,
        size,
        tuple(data["mean"]),
        tuple(data["std"]),
        source=f"timm/{name}",
    )
    encoder.net.load_state_dict(net.state_dict())
    return encoder


def from_open_clip(architecture: str, tag: str | None) -> ImageEncoder:
    """The image tower of an open_clip model; tag None for random weights.

    Raises GuidekitError for a model or weights that open_clip does not know.
    """
    if tag is None:
        config = open_clip.get_model_config(architecture)
        if config is None:
            raise GuidekitError(
                f"open_clip has no model {architecture!r}; see open_clip.list_models()"
            )
        visual = open_clip.create_model(architecture, pretrained=None).visual
    else:
        model, config = open_pretrained(architecture, tag)
        visual = model.visual
    return _from_tower(config, visual.state_dict(), visual, f"open_clip/{architecture}/{tag}")


def _from_clip_folder(folder: Path, source: str) -> ImageEncoder:
    """The image tower of an open_clip model that was saved with its config."""
    table = folder_config(folder)
    weights = {
        key.removeprefix("visual."): value.float()
        for key, value in read_weights(folder / CLIP_WEIGHTS).items()
        if key.startswith("visual.")
    }
    preprocess = table.get("preprocess_cfg", {})
    try:
        return _from_tower(table["model_cfg"], weights, preprocess, source)
    except LOAD_ERRORS as error:
        raise _unfit(folder, error) from None


def _from_tower(config: dict, weights: dict, preprocess: Any, source: str) -> ImageEncoder:
    """An encoder of an open_clip model config, weights, and what holds mean and std."""
    settings = {k: config[k] for k in ("embed_dim", "vision_cfg", "quick_gelu") if k in config}
    if isinstance(preprocess, nn.Module):
        mean, std = preprocess.image_mean, preprocess.image_std
    else:
        mean = preprocess.get("mean") or open_clip.OPENAI_DATASET_MEAN
        std = preprocess.get("std") or open_clip.OPENAI_DATASET_STD
    size = config["vision_cfg"]["image_size"]
    size = size if isinstance(size, int) else size[0]
    encoder = ImageEncoder("open_clip", "", settings, size, tuple(mean), tuple(std), source)
    encoder.net.load_state_dict(weights)
    return encoder


def _clip_tower(settings: dict[str, Any]) -> nn.Module:
    """open_clip's image tower with random weights; a vision transformer returns tokens too."""
    known = {f.name for f in dataclasses.fields(open_clip.CLIPVisionCfg)}
    vision = {k: v for k, v in settings["vision_cfg"].items() if k in known}
    vision |= {"output_tokens": True, "timm_model_pretrained": False}
    return open_clip.CLIP(
        settings["embed_dim"],
        open_clip.CLIPVisionCfg(**vision),
        open_clip.CLIPTextCfg(**_NO_TEXT),
        quick_gelu=settings.get("quick_gelu", False),
    ).visual
