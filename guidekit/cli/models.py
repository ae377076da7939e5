"""The model of a run: where its name leads, and what `run.json` says of it."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from guidekit.inputs.given import load
from guidekit.outputs.folders import model_hash
from guidekit.registry import Registry
from guidekit.zoo.shipped import ZOO


def load_model(name: str, registry: Registry, device: str | None, dtype: str | None = None) -> Any:
    """The pipeline of `--model`: a plugin's backbone `acme:x`, else whatever `load` knows."""
    quiet_libraries()
    if ":" in name and not Path(name).exists():
        registry.backbone(name)  # of a plugin that may be blocked
    return load(name, device, None if dtype is None else getattr(torch, dtype))


def loading_once() -> Callable[..., Any]:
    """`load_model` that loads each model once, for several runs."""
    kept: dict[tuple, Any] = {}

    def load(name: str, registry: Registry, device: str | None, dtype: str | None = None) -> Any:
        key = (name, device, dtype)
        if key not in kept:
            kept[key] = load_model(name, registry, device, dtype)
        return kept[key]

    return load


def quiet_libraries() -> None:
    """Keeps the bars and remarks of diffusers and transformers off the terminal."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    for name in ("xformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def model_facts(name: str, pipeline: Any) -> dict[str, Any]:
    """Name, class, path and hash of the model; a live pipeline of a plugin has no path."""
    places = [ZOO / name, Path(name)]
    if name.count("/") == 1:
        index = try_to_load_from_cache(name, "model_index.json")
        places += [Path(index).parent] if isinstance(index, str) else []
    path = next((p.resolve() for p in places if (p / "model_index.json").is_file()), None)
    return {
        "name": name,
        "class": type(pipeline).__name__,
        "path": None if path is None else str(path),
        "hash": None if path is None else model_hash(path),
    }
