"""open_clip models with their tokenizers: from a folder, built-in, or under open_clip's own names.

A folder is what open_clip reads as `local-dir:`: `open_clip_config.json`, safetensors, tokenizer.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from open_clip.factory import get_model_config
from safetensors.torch import save_file
from torch import Tensor, nn

from guidekit.backbones.hub import require_hub
from guidekit.backbones.loading import LOAD_ERRORS
from guidekit.errors import GuidekitError
from guidekit.system.untrusted import check_clip, check_configs, check_weights, read_object
from guidekit.zoo.shipped import ZOO

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
# What open_clip takes before any file that it would have to unpickle.
SAFE = (WEIGHTS, "open_clip_pytorch_model.safetensors")
NOISY_CONFIG, NOISY_WEIGHTS = "noisy_clip.json", "noisy_clip.safetensors"


@dataclass(frozen=True)
class Clip:
    """A CLIP model, its tokenizer (texts to ids), and what `open_clip_config.json` says of it."""

    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    config: dict

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that it takes."""
        size = self.model.visual.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def save(self, folder: Path) -> None:
        """Writes the model in half precision, as open_clip reads it."""
        write_config(folder, self.config, self.tokenizer)
        save_file(halved(self.model), folder / WEIGHTS)


def load_clip(name: str | Path) -> Clip:
    """A CLIP from a built-in's name, a folder, or `ARCHITECTURE/TAG` of open_clip.

    A tag's weights are downloaded by open_clip at the first use. Raises GuidekitError that says
    what exists, and for a folder whose weights are no safetensors.
    """
    path = find_folder(name)
    if path is not None:
        if (path / NOISY_CONFIG).exists():
            raise GuidekitError(f"{name} is noise-aware; give a clean CLIP such as scenes-clip")
        return _from_folder(path)
    architecture, _, tag = str(name).partition("/")
    if get_model_config(architecture) is None or not tag:
        raise GuidekitError(
            f"no CLIP {str(name)!r}: not a built-in ({', '.join(built_in())}), not a folder with "
            f"{CONFIG}, not ARCHITECTURE/TAG such as RN50/openai (open_clip.list_pretrained())"
        )
    model, known = open_pretrained(architecture, tag)
    config = {"model_cfg": known, "preprocess_cfg": model.visual.preprocess_cfg}
    return Clip(_ready(model), open_clip.get_tokenizer(architecture), config)


def _from_folder(path: Path) -> Clip:
    """A clean CLIP of a folder.

    Raises GuidekitError where it is not whole, or asks for code or downloads.
    """
    config = folder_config(path)
    safe = list(path.glob("*.safetensors"))
    if not safe:
        raise GuidekitError(f"{path} has no safetensors; write the model in that format")
    if (pickled := _pickled(path)) and not any((path / name).exists() for name in SAFE):
        raise GuidekitError(f"{path}: open_clip would read the pickle {pickled[0].name}; remove it")
    for file in safe:
        check_weights(file)
    try:
        with torch.random.fork_rng(devices=[]):  # weights are drawn before they are loaded
            model = open_clip.create_model(f"local-dir:{path}")
    except LOAD_ERRORS as error:
        raise _unfit(path, error) from None
    return Clip(_ready(model), folder_tokenizer(path), config)


def _pickled(path: Path) -> list[Path]:
    return [*path.glob("*.bin"), *path.glob("*.pth")]


def folder_config(path: Path) -> dict:
    """`open_clip_config.json` of a folder, checked as everything that is read of the folder.

    Raises GuidekitError for what asks for code or downloads, and for what is no such config.
    """
    check_configs(path)
    config = read_object(path / CONFIG)
    check_clip(config, str(path / CONFIG))
    return config


def folder_tokenizer(path: Path) -> Callable[[list[str]], Tensor]:
    """The tokenizer of a folder that `folder_config` let pass; ValueError if it is not whole."""
    try:
        return open_clip.get_tokenizer(f"local-dir:{path}")
    except LOAD_ERRORS as error:
        raise _unfit(path, error) from None


def _unfit(path: Path, error: Exception) -> GuidekitError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return GuidekitError(f"the CLIP {path} cannot be loaded: {first}; download it again")


def open_pretrained(architecture: str, tag: str) -> tuple[nn.Module, dict]:
    """A model with the weights of a tag, by open_clip, and its `model_cfg`.

    With the activation that the weights were trained with, which open_clip only warns of. Raises
    ValueError for a model or tag that it does not know, and for weights that it cannot get.
    """
    config = get_model_config(architecture)
    if config is None:
        raise GuidekitError(f"open_clip has no model {architecture!r}; see open_clip.list_models()")
    if tag not in (tags := open_clip.list_pretrained_tags_by_model(architecture)):
        raise GuidekitError(
            f"open_clip has no weights {tag!r} of {architecture}; there are {', '.join(tags)}"
        )
    known = open_clip.get_pretrained_cfg(architecture, tag)
    if known.get("quick_gelu"):
        config["quick_gelu"] = True
    quick = config.get("quick_gelu", False)
    try:
        if repo := known.get("hf_hub", "").rstrip("/"):
            require_hub(repo, WEIGHTS, "open_clip_pytorch_model.bin")
        with torch.random.fork_rng(devices=[]):
            model = open_clip.create_model(architecture, pretrained=tag, force_quick_gelu=quick)
    except (RuntimeError, GuidekitError) as error:
        reason = str(error).splitlines()[0]
        raise GuidekitError(f"open_clip could not load {architecture}/{tag}: {reason}") from None
    return model, config


def built_in(noisy: bool = False) -> list[str]:
    """Names of the built-in CLIP models, the clean or the noise-aware ones."""
    folders = [path.parent for path in ZOO.glob(f"*/{CONFIG}")]
    return sorted(f.name for f in folders if (f / NOISY_CONFIG).exists() == noisy)


def find_folder(name: str | Path) -> Path | None:
    """The folder that a name stands for, a built-in's or its own; None if there is none."""
    places = [ZOO / name, Path(name)] if str(name) not in ("", ".") else []
    return next((p for p in places if (p / CONFIG).exists()), None)


def is_clip(name: str | Path) -> bool:
    """Whether `load_clip` knows a name: a folder's, a built-in's, or an architecture's before /."""
    architecture = str(name).partition("/")[0]
    return find_folder(name) is not None or architecture in open_clip.list_models()


def build(config: dict) -> nn.Module:
    """A CLIP of a configuration with random weights; nothing is downloaded."""
    given = copy.deepcopy(config["model_cfg"])
    custom = given.pop("custom_text", False) or "hf_model_name" in given["text_cfg"]
    if "timm_model_name" in given["vision_cfg"]:
        given["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in given["text_cfg"]:
        given["text_cfg"]["hf_model_pretrained"] = False
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with torch.random.fork_rng(devices=[]):
        model = (open_clip.CoCa if "multimodal_cfg" in given else kind)(**given)
    open_clip.set_model_preprocess_cfg(model, config["preprocess_cfg"])
    return _ready(model)


def write_config(folder: Path, config: dict, tokenizer) -> None:
    """Writes `open_clip_config.json` and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    if hasattr(tokenizer, "save_pretrained"):  # open_clip's own vocabulary comes with it
        tokenizer.save_pretrained(folder)


def halved(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with its floating numbers in half precision."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


def _ready(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)
