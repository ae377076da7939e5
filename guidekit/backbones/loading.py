"""Where a model name leads: a built-in, a diffusers pipeline directory or a hub id."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from guidekit.backbones.hub import require_hub
from guidekit.backbones.schedulers import (
    SCHEDULERS,
    parse_scheduler,
    scheduler_config,
    schedulers_for,
)
from guidekit.backbones.whole import whole
from guidekit.errors import GuidekitError
from guidekit.noise import is_flow
from guidekit.system.untrusted import check_pipeline, check_weights, file_name, read_object
from guidekit.zoo.shipped import ZOO

# What diffusers and transformers raise for files that are missing, cut short or not theirs.
LOAD_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
CONVERT = "save_pretrained(..., safe_serialization=True)"
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model")
# Pipelines of guidekit's own, which diffusers finds once their module is imported.
PIPELINES = {
    "SemanticaPipeline": "guidekit.semantica.pipeline",
    "MapsPipeline": "guidekit.synthesis.pipeline",
}


def built_in() -> list[str]:
    """Names of the built-in pipelines."""
    return sorted(p.parent.name for p in ZOO.glob("*/model_index.json"))


def load(
    name: str,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> DiffusionPipeline:
    """A diffusers pipeline from a built-in's name, a directory or a hub id.

    Weights are safetensors; nothing is unpickled and no remote code runs. device: default CUDA if
    there is one; dtype: default float32 on a CPU and for built-ins, else float16. Raises
    GuidekitError that says what exists or what is wrong with the directory.
    """
    device = device or default_device()
    own = ZOO / name / "model_index.json"
    path = ZOO / name if own.exists() else Path(name)
    if dtype is None:
        dtype = torch.float32 if device == "cpu" or own.exists() else torch.float16
    there = bool(name) and path.exists()
    if there:
        _check_directory(path)
    elif name.count("/") != 1:
        raise GuidekitError(
            f"no model {name!r}: not a built-in ({', '.join(built_in())}), not a directory, "
            "not a hub id of the form owner/name"
        )
    else:
        _require_download(name)
    try:
        with quiet(), whole(f"model {name!r}"):
            folder = path if there else _downloaded(name)
            pipeline = _pipeline_class(folder).from_pretrained(
                folder, dtype=dtype, use_safetensors=True
            )
    except GuidekitError:
        raise
    except LOAD_ERRORS as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "download it again" if there else f"check its name, or run hf download {name}"
        raise GuidekitError(f"model {name!r} cannot be loaded: {first}; {remedy}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def default_device() -> str:
    """Where models go that nobody put anywhere: CUDA if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of diffusers and transformers; afterwards they are as they were."""
    shown = [
        lib for lib in (diffusers_logging, transformers_logging) if lib.is_progress_bar_enabled()
    ]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _downloaded(name: str) -> Path:
    """The folder of a hub id, with what its pipeline needs; GuidekitError if it holds code."""
    folder = Path(DiffusionPipeline.download(name, use_safetensors=True))
    check_pipeline(folder)
    return folder


def _require_download(name: str) -> None:
    """Raises GuidekitError for a hub id that is neither here nor to be had."""
    try:
        require_hub(name, "model_index.json")
    except GuidekitError as error:
        raise GuidekitError(f"model {name!r} cannot be loaded: {error}") from None


def _pipeline_class(path: Path) -> type[DiffusionPipeline]:
    """The class to load a directory with; diffusers finds its own by itself."""
    index = path / "model_index.json"
    name = read_object(index).get("_class_name") if index.exists() else None
    if not isinstance(name, str) or name not in PIPELINES:
        return DiffusionPipeline
    return getattr(importlib.import_module(PIPELINES[name]), name)


def _check_directory(path: Path) -> None:
    """Raises GuidekitError for a directory that is no complete pipeline with safe weights."""
    index = path / "model_index.json"
    if not index.exists():
        raise GuidekitError(f"{path} has no model_index.json, so it is not a diffusers pipeline")
    check_pipeline(path)
    for part, kind in read_object(index).items():
        if not isinstance(kind, list) or kind[0] is None:
            continue
        folder = path / part
        if not folder.is_dir():
            raise GuidekitError(f"{path} lacks the folder {part!r}; download the model again")
        check_part(folder)
        # transformers makes a tokenizer without words of a folder that has none.
        if "Tokenizer" in str(kind[1]) and not any(any(folder.glob(v)) for v in VOCABULARIES):
            raise GuidekitError(f"{folder} lacks its vocabulary; download the model again")


def check_part(folder: Path, convert: str = CONVERT) -> None:
    """Raises GuidekitError for pickled weights without safetensors and for files cut short.

    convert: how the pickle is made safe, as the message says it.
    """
    pickled = [p for kind in PICKLES for p in folder.glob(kind)]
    safe = list(folder.glob("*.safetensors"))
    if pickled and not safe:
        raise GuidekitError(
            f"{pickled[0]} is a pickle, which can run code when it is read; convert it to "
            f"safetensors ({convert})"
        )
    if safe and not (folder / "config.json").exists():
        raise GuidekitError(f"{folder} lacks config.json; download the model again")
    for file in safe:
        check_weights(file)
    for index in folder.glob("*.safetensors.index.json"):
        try:
            parts = {file_name(p, "a part") for p in read_object(index)["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise GuidekitError(f"{index} is damaged; download it again") from None
        if lost := sorted(part for part in parts if not (folder / part).exists()):
            raise GuidekitError(f"{folder} lacks {', '.join(lost)}; download the model again")


def make_scheduler(pipeline: DiffusionPipeline, name: str):
    """A scheduler by any of its names, with the settings of the pipeline's own.

    Raises GuidekitError for a name that does not exist, or is not for models of this kind.
    """
    import diffusers

    name, options = parse_scheduler(name)
    own = pipeline.scheduler
    if name not in (possible := schedulers_for(own)):
        kind = "not for flow models" if is_flow(own) else "for flow models alone"
        raise GuidekitError(f"scheduler {name!r} is {kind}; there are {', '.join(possible)}")
    scheduler = getattr(diffusers, SCHEDULERS[name])
    # A scheduler with a schedule of its own says what others need to know of it.
    more = own.shared_settings() if hasattr(own, "shared_settings") else {}
    if is_flow(own) and not name.startswith("flow-"):
        shift = own.config.get("shift", own.config.get("flow_shift", 1.0))
        more = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    return scheduler.from_config(own.config, **more, **scheduler_config(scheduler, options))
