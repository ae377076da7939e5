"""One number for a folder of images, higher is better, by the measures of `guidekit eval`.

prompts clip=scenes-clip        layout maps=500 form=scenes        quality real=DIR
inverse real=DIR                diversity                          reward of=MODULE:NAME
prompts.COLUMN ...
"""

import inspect
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guidekit.errors import GuidekitError
from guidekit.evaluate import commands
from guidekit.evaluate.judges import Judge, load_extractor, load_reward, load_segmenter
from guidekit.evaluate.lpips import load_lpips
from guidekit.evaluate.results import Results

#: The column that stands for a measure, and those of which less is better.
COLUMNS = {
    "prompts": "CLIP score",
    "layout": "mIoU",
    "quality": "Frechet",
    "diversity": "distance",
    "inverse": "PSNR",
    "reward": "reward",
}
LESS = (("quality", "Frechet"), ("quality", "kernel"), ("inverse", "LPIPS"))
#: Options that measures have no default for here.
DEFAULTS = {"clip": "scenes-clip", "features": "scenes-judge", "judge": "scenes-judge", "draws": 0}
LOADERS: dict[str, Callable[[Any], Judge]] = {
    "clip": load_extractor,
    "features": load_extractor,
    "judge": load_segmenter,
    "lpips": load_lpips,
    "of": load_reward,
}


@dataclass(frozen=True)
class Score:
    """A measure with its options and the column that counts."""

    measure: str
    column: str
    options: dict[str, Any]
    #: As the user wrote it.
    text: str = ""

    def judges(self) -> list[Judge]:
        """The networks that read the images; none where they are compared by themselves."""
        return [load(self.options[name]) for name, load in LOADERS.items() if name in self.options]

    def of(self, folder: Path) -> float:
        """The number of a folder. Raises GuidekitError as the measure does, and for no column."""
        results: Results = getattr(commands, self.measure)([folder], **self.options)
        row = results.rows[0]
        if not isinstance(value := row.get(self.column), int | float):
            numbers = [k for k, v in row.items() if isinstance(v, float)]
            raise GuidekitError(
                f"{self.measure} has no column {self.column!r}; it has {', '.join(numbers)}"
            )
        return -float(value) if (self.measure, self.column) in LESS else float(value)


def parse_score(text: str) -> Score:
    """A score such as `quality real=DIR`, or `inverse.SSIM real=DIR`.

    Raises GuidekitError that names what exists.
    """
    first, *words = shlex.split(text) or [""]
    measure, _, column = first.partition(".")
    if measure not in COLUMNS:
        raise GuidekitError(f"no measure {measure!r}; there are {', '.join(COLUMNS)}")
    known = _options(measure)
    options: dict[str, Any] = {
        k: v for k, v in DEFAULTS.items() if k in known and known[k].default is not None
    }
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            names = ", ".join(known)
            raise GuidekitError(f"--judge {text!r}: {word!r} is none of its options, {names}")
        options[name] = int(value) if value.isdecimal() and name != "maps" else value
    if lacking := [n for n, p in known.items() if n not in options and p.default is p.empty]:
        raise GuidekitError(f"--judge {text!r} needs {lacking[0]}=...")
    for name in ("real", "lpips"):
        if name in options and measure != "quality":
            options[name] = Path(options[name])
    return Score(measure, column or COLUMNS[measure], options, text)


def _options(measure: str) -> dict[str, inspect.Parameter]:
    """Options that change a measure's first row, and not which other rows stand below it."""
    found = inspect.signature(getattr(commands, measure)).parameters
    more_rows = {"folders", "paired"} | ({"real"} if found["real"].default is None else set())
    return {name: option for name, option in found.items() if name not in more_rows}


def mean_score(scores: Sequence[Score], folder: Path) -> tuple[float, dict[str, float]]:
    """The mean of several scores of a folder, as TFG takes it, and each by itself."""
    values = [score.of(folder) for score in scores]
    return sum(values) / len(values), dict(zip([s.text for s in scores], values, strict=True))
