"""Folders of models: CLIPs, clean and noise-aware, pipelines, image encoders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from corpus import CODE, PICKLE, Make, deep, write
from guidekit.zoo.shipped import ZOO

Change = Callable[[dict], object]
MAP = {"AutoTokenizer": ["evil.X", "evil.X"], "AutoModel": "evil.X", "AutoConfig": "evil.X"}


def copied(source: Path, folder: Path, file: str, change: Change) -> Path:
    """A copy of a folder with code in it, whose JSON file was changed."""
    into = folder / "m"
    shutil.copytree(source, into)
    for place in (into, *(p for p in into.iterdir() if p.is_dir())):
        code = f"{CODE}from transformers import PreTrainedTokenizerFast as X\n"
        write(place / "evil.py", code)
    table = json.loads((into / file).read_text()) if (into / file).exists() else {}
    write(into / file, change(table) or table)
    return into


def _of(source: Path, file: str, change: Change) -> Make:
    return lambda folder: copied(source, folder, file, change)


def _set(**keys) -> Change:
    return lambda table: table.update(keys)


def _settings(**keys) -> Change:
    return lambda table: table["settings"].update(keys)


def _text(**keys) -> Change:
    return lambda table: table["model_cfg"]["text_cfg"].update(keys)


def _vision(**keys) -> Change:
    return lambda table: table["model_cfg"]["vision_cfg"].update(keys)


def _told(**keys) -> Change:
    return _text(tokenizer_kwargs=keys)


TOKENIZER, CONFIG, INDEX = "tokenizer_config.json", "open_clip_config.json", "model_index.json"
BPE = {"hf_tokenizer_name": "", "tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}
NO_TOWERS = {"model_cfg": {"vision_cfg": "x", "text_cfg": "y"}}
CLIPS: dict[str, tuple[str, Change]] = {
    "tokenizer is told to trust": (CONFIG, _told(trust_remote_code=True)),
    "tokenizer is told a cache": (CONFIG, _told(cache_dir="/x")),
    "tokenizer is told a folder": (CONFIG, _told(subfolder="../x")),
    "tokenizer is told a vocabulary": (CONFIG, _text(**BPE)),
    "tokenizer is told a list": (CONFIG, _text(tokenizer_kwargs=[["trust_remote_code", True]])),
    "auto_map": (TOKENIZER, _set(auto_map=MAP, tokenizer_class="X")),
    "auto_map of a model": ("config.json", _set(auto_map=MAP, model_type="evil")),
    "auto_map list": (TOKENIZER, _set(auto_map=["evil.X", "evil.X"])),
    "auto_map in capitals": ("CONFIG.JSON", _set(auto_map=MAP)),
    "text tower of the hub": (CONFIG, _text(hf_model_name="someone/evil")),
    "image tower of the hub": (CONFIG, _vision(timm_model_name="hf-hub:someone/evil")),
    "image tower of the hub 2": (CONFIG, _vision(timm_model_name=" HF_HUB:someone/evil")),
    "image tower of a folder": (CONFIG, _vision(timm_model_name="local-dir:/x")),
    "no such tower": (CONFIG, _vision(timm_model_name="evil")),
    "endless layers of texts": (CONFIG, _text(layers=10**9)),
    "endless layers of images": (CONFIG, _vision(layers=10**9)),
    "layers of a stage": (CONFIG, _vision(layers=[1, 1, 10**9, 1])),
    "another width": (CONFIG, _vision(width=64)),
    "unknown key": (CONFIG, _vision(exec="x")),
    "no towers": (CONFIG, lambda table: {"model_cfg": {}}),
    "towers are texts": (CONFIG, lambda table: NO_TOWERS),
    "a list": (CONFIG, lambda table: [1]),
}
# The image tower alone, which is read of the same folder, is right in these.
TOWER_IS_RIGHT = {"unknown key"}


def _unpickling(folder: Path) -> Path:
    """A CLIP whose only weights by a name that open_clip prefers are a pickle."""
    into = copied(ZOO / "scenes-clip", folder, CONFIG, _set())
    (into / "open_clip_model.safetensors").rename(into / "other.safetensors")
    write(into / "open_clip_pytorch_model.bin", PICKLE)
    return into


CLIP_FOLDERS: dict[str, Make] = {
    **{name: _of(ZOO / "scenes-clip", *made) for name, made in CLIPS.items()},
    "weights to unpickle": _unpickling,
}
OWN = ({"width": 10**9}, {"width": 0}, {"channels": "x"}, {"evil": 1}, {"factor": 10**9})
NOISY_FOLDERS: dict[str, Make] = {
    **{name: _of(ZOO / "scenes-clip-noisy", *made) for name, made in CLIPS.items()},
    **{f"{k}": _of(ZOO / "scenes-clip-noisy", "noisy_clip.json", _set(**k)) for k in OWN},
}

MODELS: dict[str, tuple[str, Change]] = {
    "part of a module": (INDEX, _set(scheduler=["inbox.m.evil", "X"])),
    "part of a module beside": (INDEX, _set(scheduler=["evil", "X"])),
    "part of the system": (INDEX, _set(scheduler=["os", "system"])),
    "part of nothing": (INDEX, _set(scheduler=[])),
    "part of a number": (INDEX, _set(scheduler=[1, 2])),
    "part outside": (INDEX, _set(**{"../x": ["diffusers", "UNet2DModel"]})),
    "own pipeline": (INDEX, _set(_class_name=["evil", "X"])),
    "own pipeline by name": (INDEX, _set(_class_name="evil.X")),
    "pipeline is a number": (INDEX, _set(_class_name=1)),
    "a list": (INDEX, lambda table: [1]),
    "auto_map": ("unet/config.json", _set(auto_map=MAP)),
    "trust": ("unet/config.json", _set(trust_remote_code=True)),
    "auto_map of the scheduler": ("scheduler/scheduler_config.json", _set(auto_map=MAP)),
    "endless layers": ("unet/config.json", _set(layers_per_block=10**9)),
    "shards outside": ("unet/a.safetensors.index.json", _set(weight_map={"a": "../../x"})),
    "config is a list": ("unet/config.json", lambda table: [1]),
}


def _deep(folder: Path) -> Path:
    into = copied(ZOO / "scenes-ddpm", folder, "x.json", _set())
    return write(into / INDEX, deep()).parent


def _pickled(folder: Path) -> Path:
    into = copied(ZOO / "scenes-ddpm", folder, "x.json", _set())
    for file in (into / "unet").glob("*.safetensors"):
        file.unlink()
    write(into / "unet/diffusion_pytorch_model.bin", PICKLE)
    return into


SEMANTICA: dict[str, Change] = {  # of the encoder that a pipeline of guidekit's own holds
    "encoder of the hub": _set(architecture="hf-hub:someone/evil"),
    "encoder's checkpoint": _set(architecture="test_vit", settings={"checkpoint_path": "/x"}),
}
PIPELINES: dict[str, Make] = {
    **{name: _of(ZOO / "scenes-ddpm", *made) for name, made in MODELS.items()},
    **{k: _of(ZOO / "scenes-semantica", "encoder/config.json", v) for k, v in SEMANTICA.items()},
    "deep": _deep,
    "pickle": _pickled,
}

TOWER = {"embed_dim": 8, "vision_cfg": {"timm_model_name": "hf-hub:a/b"}}
ENCODERS: dict[str, Change] = {  # of the config of a saved image encoder
    "architecture of the hub": _set(architecture="hf-hub:someone/evil"),
    "architecture of the hub 2": _set(architecture="HF_HUB:someone/evil"),
    "architecture of a folder": _set(architecture="local-dir:/x"),
    "no such architecture": _set(architecture="evil"),
    "checkpoint": _settings(checkpoint_path="/x.pth"),
    "pretrained": _settings(pretrained=True),
    "pretrained config": _settings(pretrained_cfg={"url": "http://x"}),
    "config over it": _settings(pretrained_cfg_overlay={"hf_hub_id": "x/y"}),
    "cache": _settings(cache_dir="/x"),
    "auto_map": _set(auto_map=MAP),
    "another library": _set(library="os"),
    "settings are a list": _set(settings=[1]),
    "tower of the hub": _set(library="open_clip", settings=TOWER),
}
