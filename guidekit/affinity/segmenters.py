"""Segmenters: networks that say how probable the classes of a label set are in every pixel."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guidekit.backbones.hub import require_hub
from guidekit.backbones.loading import LOAD_ERRORS, check_part, default_device, quiet
from guidekit.backbones.whole import whole
from guidekit.errors import GuidekitError
from guidekit.images import to_image
from guidekit.labels import (
    LABELS,
    VOID,
    LabelMap,
    LabelSet,
    label_sets,
    load_label_set,
    void_numbers,
)
from guidekit.system.untrusted import check_configs, read_object
from guidekit.train.judge import Judge
from guidekit.worlds import scenes
from guidekit.zoo.shipped import ZOO

#: Classes of segmenters that say nothing of a pixel.
NOTHING = ("void", "unlabeled", "unlabelled", "background", "free", "ignore", "other")
#: What transformers calls its classes of semantic and of panoptic segmenters.
SEMANTIC = "ForSemanticSegmentation"
PANOPTIC = ("ForUniversalSegmentation", "MaskFormerForInstanceSegmentation")
SLACK = 1e-3  # of shares, which sum to 1 at most
MOST = 512  # cells of the longer side of what panoptic models say
TOLD = "OneFormer"  # reads a text too, for which its processor fetches a file


@dataclass(frozen=True, eq=False)
class Segmenter:
    """Shares of a label set's classes in the cells of an image.

    labels: the set. see: pixels (3, H, W) in [-1, 1] to shares (N, h, w) at any size, the
    probabilities of the classes; what they lack of 1 is void. A network that only names classes
    gives ones and zeros (`LabelMap.one_hot`).
    """

    labels: LabelSet
    see: Callable[[Tensor], Tensor]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Shares (N, h, w) for pixels (3, H, W) in [-1, 1].

        Raises GuidekitError where `see` gives something else.
        """
        with torch.no_grad():
            found = torch.as_tensor(self.see(pixels)).float().cpu()
        fits = found.ndim == 3 and len(found) == len(self.labels)
        if not fits or not (found.min() >= 0 and found.sum(0).max() <= 1 + SLACK):
            raise GuidekitError(
                f"the segmenter of {self.labels.name!r} gives {tuple(found.shape)}, and needs to "
                f"give probabilities ({len(self.labels)}, h, w) of its classes, without void; use "
                "softmax, or LabelMap.one_hot for classes"
            )
        return found


def load_segmenter(name: str | Path, device: str | None = None) -> Segmenter:
    """A segmenter from a built-in judge's name, a judge's folder, or one of transformers.

    Semantic and panoptic models of transformers give their classes by `id2label`; a judge's are in
    labels.json beside it. device: default CUDA if there is one. Raises GuidekitError for other
    folders, pickles and folders with code.
    """
    device = device or default_device()
    places = [ZOO / name, Path(name)]
    folder = next((p for p in places if (p / "config.json").is_file()), None)
    if folder is None:
        folder = _downloaded(str(name))
    check_configs(folder)
    check_part(folder)
    config = read_object(folder / "config.json")
    if config.get("_class_name") == "Judge":
        return _judge(folder, device)
    kinds = [str(kind) for kind in config.get("architectures") or []]
    if not any(k.endswith((SEMANTIC, *PANOPTIC)) and not k.startswith(TOLD) for k in kinds):
        told = ", and nothing here tells it its task in words" if TOLD in str(kinds) else ""
        raise GuidekitError(
            f"segmenter {name} is a {', '.join(kinds) or 'model without architectures'}{told}; "
            f"give one of transformers (...{SEMANTIC}, ...{', '.join(PANOPTIC)}) or a judge"
        )
    return _of_transformers(folder, kinds[0].endswith(PANOPTIC), device)


def _downloaded(name: str) -> Path:
    if name.count("/") != 1 or Path(name).exists():
        raise GuidekitError(
            f"no segmenter {name!r}: not built in, not a folder with config.json, not a hub id; "
            f"label sets are {', '.join(label_sets())}, or a JSON file"
        )
    from huggingface_hub import snapshot_download

    require_hub(name, "config.json")
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))


def _judge(folder: Path, device: str) -> Segmenter:
    """A judge, whose class 0 is free space, and its label set."""
    judge = Judge.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return judge_segmenter(judge.to(device), _judged(folder, judge.config.classes))


def _judged(folder: Path, count: int) -> LabelSet:
    """The classes of a judge."""
    if (folder / LABELS).is_file():
        labels = load_label_set(folder / LABELS)
    elif folder == ZOO / "scenes-judge":
        things = scenes.CLASSES
        labels = LabelSet("scenes", things, things=things, first=1, void=(0,))
    else:
        raise GuidekitError(f"{folder} has no {LABELS}, the label set of its classes; add one")
    if len(labels) + 1 != count:
        raise GuidekitError(
            f"{folder / LABELS} has {len(labels)} classes, the judge {count - 1} and free space"
        )
    return labels


def judge_segmenter(judge: Judge, labels: LabelSet) -> Segmenter:
    """A live judge as a segmenter; its class 0, free space, is void."""
    judge = judge.eval().requires_grad_(False)

    def see(pixels: Tensor) -> Tensor:
        logits, _ = judge(pixels[None].to(judge.device, judge.dtype))
        return logits[0].float().softmax(0)[1:].cpu()

    return Segmenter(labels, see)


def _of_transformers(folder: Path, panoptic: bool, device: str) -> Segmenter:
    """A semantic or panoptic model of transformers, with its own image processor.

    It sees the whole image, as label maps are of the whole, where its processor would crop.
    Panoptic ones name classes of segments, so that a cell's shares are one and zeros.
    """
    import transformers

    kind: Any = transformers.AutoModelForSemanticSegmentation
    if panoptic:
        kind = transformers.AutoModelForUniversalSegmentation
    try:
        with quiet(), whole():
            processor = transformers.AutoImageProcessor.from_pretrained(folder)
            model = kind.from_pretrained(folder, use_safetensors=True).to(device).eval()
    except LOAD_ERRORS as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GuidekitError(f"segmenter {folder} cannot be loaded: {first}") from None
    if getattr(processor, "do_center_crop", False):
        processor.do_center_crop = False
    names = [text for _, text in sorted((int(k), v) for k, v in model.config.id2label.items())]
    kept = [i for i, text in enumerate(names) if text.strip().lower() not in NOTHING]
    own = tuple(names[i].strip() for i in kept)
    labels = LabelSet(folder.name, own, void=void_numbers(len(own)))
    place = torch.full((len(names),), VOID)
    place[kept] = torch.arange(len(kept))

    def see(pixels: Tensor) -> Tensor:
        inputs = processor(images=to_image(pixels / 2 + 0.5), return_tensors="pt").to(device)
        out = model(**inputs)
        if not panoptic:
            return out.logits[0].float().softmax(0)[kept].cpu()
        reduced = min(1.0, MOST / max(pixels.shape[1:]))
        size = tuple(max(round(side * reduced), 1) for side in pixels.shape[1:])
        (found,) = processor.post_process_semantic_segmentation(out, [size])
        return LabelMap(place[found.cpu()], labels).one_hot()

    return Segmenter(labels, see)
