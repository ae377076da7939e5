"""The models of a server: each loaded once, those used last kept; what a page asks of them."""

import base64
import copy
import threading
from typing import Any

import torch

from guidekit.backbones.denoiser import Denoiser
from guidekit.backbones.phrases import occurrences
from guidekit.backbones.schedulers import schedulers_for
from guidekit.backbones.tokens import token_columns
from guidekit.cli.models import load_model
from guidekit.cli.words import unknown_words
from guidekit.conditions import Condition, Segment
from guidekit.errors import GuidekitError
from guidekit.registry import Registry
from guidekit.sampler import STEPS
from guidekit.zoo.shipped import ZOO, example_layout, model_defaults

KEPT = 2  # models in memory
PAINTED = 256  # least long side of the map that a page paints


class Models:
    """Loads models by name, one at a time, and keeps those that were used last."""

    def __init__(self, device: str | None, dtype: str | None):
        self.device, self.dtype = device, dtype
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._tokenizing = threading.Lock()
        self._loaded: dict[str, Any] = {}
        self._tokenizers: dict[str, list[Any]] = {}

    def load(self, name: str, registry: Registry | None = None, *_: object) -> Any:
        """The pipeline of that name, on the server's device; one that is there comes at once."""
        if (pipeline := self._kept(name)) is not None:
            return pipeline
        with self._loading:
            pipeline = self._kept(name)  # another thread may have loaded it meanwhile
            if pipeline is None:
                pipeline = load_model(name, registry or Registry(), self.device, self.dtype)
            with self._lock:
                self._loaded[name] = pipeline
                while len(self._loaded) > KEPT:
                    self._loaded.pop(next(iter(self._loaded)))
        return pipeline

    def _kept(self, name: str) -> Any:
        """A model that is there, which becomes the last used; else None."""
        with self._lock:
            pipeline = self._loaded.pop(name, None)
            if pipeline is not None:
                self._loaded[name] = pipeline
            return pipeline

    def facts(self, name: str) -> dict[str, Any]:
        """What a page asks of a model: its size, defaults, schedulers, and what it reads."""
        pipeline, own = self.load(name), model_defaults(name)
        denoiser = Denoiser(pipeline)
        _, h, w = denoiser.latent_shape(None, None) if denoiser.own_size else (0, 64, 64)
        size = (h * denoiser.factor, w * denoiser.factor)
        return {
            "name": name,
            "class": type(pipeline).__name__,
            "height": size[0],
            "width": size[1],
            "multiple": denoiser.multiple,
            "paint": painted_size(*size),
            "steps": own.get("steps", STEPS),
            "cfg": own.get("cfg", denoiser.cfg),
            "tuned": own.get("plugin", {}),
            "example": _example(name) if denoiser.reads_text else {},
            "reads_text": denoiser.reads_text,
            "reads_image": denoiser.reads_image,
            "reads_map": denoiser.reads_map,
            "takes_controls": denoiser.takes_controls,
            "scheduler": type(pipeline.scheduler).__name__,
            "schedulers": schedulers_for(pipeline.scheduler),
            "device": str(denoiser.device),
        }

    def tokens(self, name: str, prompt: str, phrases: list[dict[str, Any]]) -> dict[str, Any]:
        """The tokens of a prompt, and for each phrase its columns or why it has none.

        phrases: {"phrase": ..., "occurrence": ..., "tokens": ...}, as segments have them.
        """
        denoiser = Denoiser(self.load(name))
        with self._tokenizing:  # a tokenizer is for one thread, and the worker has its own
            if name not in self._tokenizers:
                self._tokenizers[name] = copy.deepcopy(denoiser.tokenizers)
            tokenizers = self._tokenizers[name]
            if not tokenizers:
                return {"tokens": [], "phrases": [{"columns": []} for _ in phrases], "unknown": []}
            prompt = denoiser.prepared(Condition(prompt)).prompt
            built_in = (ZOO / name).is_dir()
            return {
                "tokens": _shown(tokenizers[0], prompt),
                "phrases": _found(tokenizers, prompt, phrases),
                "unknown": unknown_words(tokenizers[0], prompt) if built_in else [],
            }


def painted_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the map for an image: the image's own times a whole number."""
    factor = max(1, -(-PAINTED // max(height, width)))
    return height * factor, width * factor


def _example(name: str) -> dict[str, str]:
    """The files in base64 of what a model draws for who asks for nothing; one is layout.json."""
    folder = example_layout(name).parent
    return {p.name: base64.b64encode(p.read_bytes()).decode() for p in sorted(folder.iterdir())}


def _shown(tokenizer: Any, prompt: str) -> list[dict[str, Any]]:
    """Every token of the prompt with its column and the characters that it stands for."""
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    return [
        {"column": i, "start": start, "end": end}
        for i, (start, end) in enumerate(encoded["offset_mapping"])
        if end > start
    ]


def _found(
    tokenizers: list[Any], prompt: str, phrases: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Columns, or an error, of every phrase."""
    segments: list[Segment | None] = []
    errors: dict[int, str] = {}
    for index, entry in enumerate(phrases):
        try:
            segments.append(_segment(entry))
        except GuidekitError as error:
            segments.append(None)
            errors[index] = str(error)
    there = tuple(segment for segment in segments if segment is not None)
    try:
        nths = iter(occurrences(Condition(prompt, segments=there)))
    except GuidekitError as error:
        return [{"error": errors.get(index, str(error))} for index in range(len(phrases))]
    found: list[dict[str, Any]] = []
    for index, segment in enumerate(segments):
        try:
            found.append(
                {"error": errors[index]}
                if segment is None
                else {"columns": _columns(tokenizers, prompt, segment, next(nths))}
            )
        except GuidekitError as error:
            found.append({"error": str(error)})
    return found


def _segment(entry: dict[str, Any]) -> Segment:
    """A segment with the words of an entry, everywhere."""
    tokens = entry.get("tokens")
    if not isinstance(tokens, list | None):
        raise GuidekitError("`tokens` of a segment is a list of columns")
    return Segment(
        entry.get("phrase", ""),
        torch.ones(1, 1),
        tokens=None if tokens is None else tuple(tokens),
        occurrence=entry.get("occurrence"),
    )


def _columns(tokenizers: list[Any], prompt: str, segment: Segment, nth: int | None) -> list[int]:
    if segment.tokens is not None:
        return sorted(segment.tokens)
    found = [token_columns(t, prompt, segment.phrase, nth) for t in tokenizers]
    return found[0]
