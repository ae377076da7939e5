"""`guidekit augment`: a class-folder data set of generated images that their head accepts.

Rejection as in Graikos et al. 2023, section 4.3: an image is kept if the probability of its class
exceeds a threshold; tries are bounded.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guidekit.backbones.denoiser import Denoiser
from guidekit.conditions import Condition
from guidekit.guidance import Guidance
from guidekit.images import to_image
from guidekit.sampler import Sampling, accepted
from guidekit.seeds import derived_seed
from guidekit.system.untrusted import file_name


@dataclass(frozen=True)
class Harvest:
    """What came of one class: images wanted, drawn, accepted and kept."""

    label: str
    wanted: int
    drawn: int
    accepted: int

    @property
    def rate(self) -> float:
        """Share of the drawn images that were accepted."""
        return self.accepted / self.drawn


def accepted_images(
    denoiser: Denoiser,
    guidance: Guidance,
    count: int,
    tries: int = 3,
    batch: int = 16,
    seed: int = 0,
    **options: Any,
) -> tuple[Tensor | None, int, int]:
    """Up to `count` accepted images (n, 3, H, W), the number drawn and the number accepted.

    At most tries * count images are drawn. options: of `Sampling`.
    """
    kept, drawn, limit = [], 0, tries * count
    while sum(map(len, kept)) < count and drawn < limit:
        size = min(batch, limit - drawn, count)
        seeds = [derived_seed(seed, guidance.name, drawn + i) for i in range(size)]
        drawn_now = Sampling(denoiser, Condition(), [guidance], seeds=seeds, **options).finish()
        kept.append(drawn_now.images[accepted(drawn_now.guidances, drawn_now.images)])
        drawn += size
    total = sum(map(len, kept))
    return (None if total == 0 else torch.cat(kept)[:count]), drawn, total


def augment(
    denoiser: Denoiser,
    make: Callable[[str], Guidance],
    classes: Sequence[str],
    per_class: int,
    out: Path,
    seed: int = 0,
    progress: Callable[[Harvest], None] | None = None,
    **options: Any,
) -> list[Harvest]:
    """Writes out/CLASS/NUMBER.png and augment.json; `make(label)` is the guidance of a class.

    options: tries and batch of `accepted_images`, and those of `Sampling`. Raises GuidekitError,
    before anything is drawn, for a class whose name is no folder's.
    """
    found = []
    folders = {label: out / file_name(label, "a class of the head") for label in classes}
    for number, label in enumerate(classes):
        images, drawn, total = accepted_images(
            denoiser, make(label), per_class, seed=derived_seed(seed, number), **options
        )
        folder = folders[label]
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate([] if images is None else images):
            to_image(image).save(folder / f"{i:05d}.png")
        found.append(Harvest(label, per_class, drawn, total))
        rows = [asdict(h) | {"rate": h.rate} for h in found]
        (out / "augment.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        if progress:
            progress(found[-1])
    return found
