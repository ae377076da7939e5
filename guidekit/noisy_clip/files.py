"""open_clip models with their tokenizers: from a folder, built-in, or under open_clip's own names.

A folder is what open_clip reads as `local-dir:`: `open_clip_config.json`, safetensors, tokenizer.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
from open_clip.factory import get_model_config
from safetensors.torch import save_file
from torch import Tensor, nn

from guidekit.config import ZOO

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


@dataclass(frozen=True)
class Clip:
    """A CLIP model, its tokenizer (texts to ids), and what `open_clip_config.json` says of it."""

    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    config: dict

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures that it takes."""
        size = self.model.visual.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def save(self, folder: Path) -> None:
        """Writes the model in half precision, as open_clip reads it."""
        write_config(folder, self.config, self.tokenizer)
        save_file(halved(self.model), folder / WEIGHTS)


def load_clip(name: str | Path) -> Clip:
    """A CLIP from a built-in's name, a folder, or `ARCHITECTURE/TAG` of open_clip.

    Raises ValueError that says what exists, and for pickled weights.
    """
    path = find_folder(name)
    if path is not None:
        if not list(path.glob("*.safetensors")):
            raise ValueError(f"{path} has no safetensors; write the model in that format")
        where = f"local-dir:{path}"
        config = json.loads((path / CONFIG).read_text())
        return Clip(_ready(open_clip.create_model(where)), open_clip.get_tokenizer(where), config)
    architecture, _, tag = str(name).partition("/")
    known = get_model_config(architecture)
    if known is None or not tag:
        raise ValueError(
            f"no CLIP {str(name)!r}: not a built-in ({', '.join(built_in())}), not a folder with "
            f"{CONFIG}, not ARCHITECTURE/TAG such as RN50/openai (open_clip.list_pretrained())"
        )
    model = open_clip.create_model(architecture, pretrained=tag)
    config = {"model_cfg": known, "preprocess_cfg": model.visual.preprocess_cfg}
    return Clip(_ready(model), open_clip.get_tokenizer(architecture), config)


def built_in() -> list[str]:
    """Names of the built-in CLIP models, clean and noise-aware."""
    return sorted(path.parent.name for path in ZOO.glob(f"*/{CONFIG}"))


def find_folder(name: str | Path) -> Path | None:
    """The folder that a name stands for, a built-in's or its own; None if there is none."""
    places = [ZOO / name, Path(name)] if str(name) not in ("", ".") else []
    return next((p for p in places if (p / CONFIG).exists()), None)


def build(config: dict) -> nn.Module:
    """A CLIP of a configuration with random weights; nothing is downloaded."""
    given = copy.deepcopy(config["model_cfg"])
    custom = given.pop("custom_text", False) or "hf_model_name" in given["text_cfg"]
    if "timm_model_name" in given["vision_cfg"]:
        given["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in given["text_cfg"]:
        given["text_cfg"]["hf_model_pretrained"] = False
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = kind(**given)
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
