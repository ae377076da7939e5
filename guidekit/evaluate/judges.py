"""Judges: networks that read images, by name or folder, with the hashes of their weights.

Nothing is downloaded, and weights are safetensors. A judge that guided is refused by its hashes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from guidekit.bases.rewards import Reward, as_reward, rewarded
from guidekit.errors import GuidekitError
from guidekit.evaluate.judge import load_judge
from guidekit.images import fitted, to_uint8
from guidekit.noisy_clip.files import load_clip
from guidekit.noisy_clip.model import CleanClip
from guidekit.system.untrusted import check_configs, read_object
from guidekit.system.weights import weight_hashes
from guidekit.worlds import scenes
from guidekit.zoo.shipped import ZOO

SEGMENTERS = {  # of a config's model_type: transformers' class
    "mask2former": "AutoModelForUniversalSegmentation",
    "maskformer": "AutoModelForInstanceSegmentation",
    "segformer": "AutoModelForSemanticSegmentation",
}
CLIP = "open_clip_config.json"


@dataclass(frozen=True)
class Judge:
    """A network that reads images, with the SHA-256 of its weights."""

    name: str
    hashes: frozenset[str]


@dataclass(frozen=True)
class Segmenter(Judge):
    """Reads class maps: images to (H, W) each, 0 for none, 1 to the number of its names."""

    names: tuple[str, ...]
    read: Callable[[Sequence[Image]], list[np.ndarray]]


@dataclass(frozen=True)
class Extractor(Judge):
    """Reads features: images to (n, d); of CLIP also texts, both of length 1."""

    read: Callable[[Sequence[Image]], np.ndarray]
    texts: Callable[[list[str]], np.ndarray] | None = None


def check_never_guided(judge: Judge, folders: Iterable[Path]) -> None:
    """Raises GuidekitError if weights of the judge guided a run or a plan in one of the folders."""
    is_judge = cache(partial(names_judge, judge))  # runs of a grid name the same files
    for folder in folders:
        for path in sorted(folder.rglob("run.json")):  # of one run, or of those of a grid
            found = read_object(path)
            guided = next(filter(is_judge, _named(found.get("plugin", {}))), None)
            name = guided or _noted(judge, found)
            if name is not None:
                raise GuidekitError(
                    f"{judge.name} guided the images of {path.parent} ({name}), so it cannot "
                    "judge them; take another judge"
                )


def guided_by(judge: Judge, tables: dict[str, Any]) -> str | None:
    """The option of plugins that names the judge, or weights of it; None if none does."""
    return next((name for name in _named(tables) if names_judge(judge, name)), None)


def names_judge(judge: Judge, name: str) -> bool:
    """Whether a text names the judge, or weights of it."""
    there = [path for path in (ZOO / name, Path(name)) if path.exists()]
    return name == judge.name or any(weight_hashes(path) & judge.hashes for path in there)


def _noted(judge: Judge, record: dict[str, Any]) -> str | None:
    """The guidance of a run whose reward read weights of the judge; None if none did."""
    ran = record.get("record")
    noted = ran.get("guides") if isinstance(ran, dict) else None
    tables = noted.items() if isinstance(noted, dict) else ()
    return next((name for name, own in tables if judge.hashes.intersection(_named(own))), None)


def _named(value: Any) -> list[str]:
    """The texts of a plugin's options, which may name models."""
    if isinstance(value, dict):
        return [name for one in value.values() for name in _named(one)]
    if isinstance(value, list):
        return [name for one in value for name in _named(one)]
    return [value] if isinstance(value, str) and value and "\0" not in value else []


@dataclass(frozen=True)
class RewardJudge(Judge):
    """Reads a number of every image."""

    reward: Reward

    def read(self, images: Sequence[Image]) -> list[float]:
        """Its numbers, of each image by itself."""
        with torch.no_grad():
            return [
                float(rewarded(self.reward, _pixels([image]), self.name)[0]) for image in images
            ]


def load_reward(text: str) -> RewardJudge:
    """A reward as a judge: of a known name, or MODULE:NAME. Raises GuidekitError for another."""
    reward = as_reward(text, "the reward")
    return RewardJudge(text, reward.hashes, reward)


def load_segmenter(name: str) -> Segmenter:
    """A segmenter by name: `scenes-judge`, or a folder of transformers' Mask2Former and others.

    Raises GuidekitError that says what exists.
    """
    if name == "scenes-judge":
        judge = load_judge()

        def read(images: Sequence[Image]) -> list[np.ndarray]:
            with torch.no_grad():
                return [judge(_pixels([image]))[0].argmax(1)[0].numpy() for image in images]

        hashes = weight_hashes(ZOO / name)
        return Segmenter(name, hashes, tuple(scenes.CLASSES), read)
    return _transformers_segmenter(Path(name))


def _config(folder: Path, what: str, exist: str) -> dict[str, Any]:
    """The config of a model's folder, which asks for no code."""
    if not (folder / "config.json").is_file():
        raise GuidekitError(f"no {what} {str(folder)!r}; there are {exist}, and folders of models")
    check_configs(folder)
    return read_object(folder / "config.json")


def _transformers_segmenter(folder: Path) -> Segmenter:
    import transformers

    config = _config(folder, "segmenter", "scenes-judge")
    kind = config.get("model_type")
    if kind not in SEGMENTERS:
        raise GuidekitError(f"{folder} is a {kind!r}; segmenters are {', '.join(SEGMENTERS)}")
    cls = getattr(transformers, SEGMENTERS[kind])
    model = cls.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    labels = model.config.id2label
    names = tuple(str(labels[i]) for i in range(len(labels)))

    def read(images: Sequence[Image]) -> list[np.ndarray]:
        inputs = processor(images=list(images), return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        sizes = [(image.height, image.width) for image in images]
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        return [found.numpy() + 1 for found in maps]

    return Segmenter(str(folder), weight_hashes(folder), names, read)


def load_extractor(name: str) -> Extractor:
    """An extractor: `scenes-judge`, a CLIP by name or folder, a vision model's folder.

    Raises GuidekitError that says what exists.
    """
    if name == "scenes-judge":
        judge = load_judge()

        def read(images: Sequence[Image]) -> np.ndarray:
            with torch.no_grad():
                return torch.cat([judge(_pixels([image]))[1] for image in images]).double().numpy()

        return Extractor(name, weight_hashes(ZOO / name), read)
    folder = ZOO / name if (ZOO / name / CLIP).exists() else Path(name)
    if (folder / CLIP).exists():
        return _clip(name, folder)
    return _vision(folder)


def _clip(name: str, folder: Path) -> Extractor:
    clip = load_clip(folder)
    model = CleanClip(clip)

    def read(images: Sequence[Image]) -> np.ndarray:
        with torch.no_grad():
            return _unit(model.sees(_pixels(images, clip.size)).embedding)

    def texts(lines: list[str]) -> np.ndarray:
        with torch.no_grad():
            return _unit(model.texts(lines))

    return Extractor(name, weight_hashes(folder), read, texts)


def _vision(folder: Path) -> Extractor:
    """DINOv2, CLIP's vision tower and others of transformers: the pooled output."""
    import transformers

    _config(folder, "extractor", "scenes-judge, scenes-clip")
    model = transformers.AutoModel.from_pretrained(
        folder, use_safetensors=True, local_files_only=True
    ).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)

    def read(images: Sequence[Image]) -> np.ndarray:
        inputs = processor(images=list(images), return_tensors="pt")
        with torch.no_grad():
            return model(**inputs).pooler_output.double().numpy()

    return Extractor(str(folder), weight_hashes(folder), read)


def _pixels(images: Sequence[Image], size: tuple[int, int] | None = None) -> Tensor:
    """Images as (n, 3, H, W) in [-1, 1]; at their own size, or the middle at another."""
    if size is not None:
        images = [fitted(image, size)[0] for image in images]
    return torch.stack([to_uint8(image) for image in images]).float() / 127.5 - 1


def _unit(embeddings: Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(embeddings.double(), dim=-1).numpy()
