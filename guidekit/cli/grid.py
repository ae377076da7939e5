"""Runs over the values of one or two options, and the labelled sheet of what they drew."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from guidekit.cli.settings import Settings, not_among, sample_keys
from guidekit.errors import GuidekitError
from guidekit.images import enlarge, grid
from guidekit.options import convert, parse_value
from guidekit.outputs.folders import CLAIM

TOGETHER = (
    "seeds",
    "particles",
    "out",
    "layout",
    "model",
    "image_folder",
    "per_image",
    "map",
    "labels",
    "affinity",
)  # the same in all cells
SHEET = "sheet.png"
INK, PAPER = "#1b1b1b", "white"
TEXT, GAP = 16, 10  # pixels: size of labels, space between cells


@dataclass(frozen=True)
class Axis:
    """An option, as `zest.scale` or `cfg`, and its values as the user wrote them."""

    name: str
    values: tuple[str, ...]

    def label(self, index: int) -> str:
        """`zest.scale 0.5`."""
        return f"{self.name} {self.values[index]}"


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a grid: its place, and its settings."""

    row: int
    column: int
    settings: Settings

    @property
    def name(self) -> str:
        """Name of its folder inside the grid's."""
        return f"{self.row}-{self.column}"


def parse_axes(texts: Iterable[str]) -> tuple[Axis, ...]:
    """One or two axes of `zest.scale=0.5,1,2`. Raises GuidekitError for another form."""
    axes = tuple(map(_parse_axis, texts))
    if len(axes) > 2:
        raise GuidekitError(f"a grid has one or two options, not {len(axes)}")
    if len({axis.name for axis in axes}) < len(axes):
        raise GuidekitError(f"--grid {axes[0].name} is given twice; name another option")
    return axes


def _parse_axis(text: str) -> Axis:
    name, equals, raw = text.partition("=")
    values = tuple(value.strip() for value in raw.split(",") if value.strip())
    if not equals or not name.strip() or not values:
        raise GuidekitError(f"--grid {text}: write OPTION=VALUES, such as zest.scale=0.5,1,2")
    if len(set(values)) < len(values):
        raise GuidekitError(f"--grid {text}: a value occurs twice")
    return Axis(name.strip(), values)


def cells_of(settings: Settings, axes: tuple[Axis, ...]) -> list[Cell]:
    """The runs of a grid, row by row; the first axis goes down, the second across.

    Raises GuidekitError for an option that there is not, or that is the same in all cells.
    """
    if settings.image_folder is not None:
        raise GuidekitError("a grid is not for image_folder; give image, or leave --grid out")
    down, across = axes[0], axes[1] if len(axes) > 1 else None
    if across is None:  # one option is read from left to right
        return [Cell(0, i, _with(settings, down, i)) for i in range(len(down.values))]
    places = itertools.product(range(len(down.values)), range(len(across.values)))
    return [Cell(i, j, _with(_with(settings, down, i), across, j)) for i, j in places]


def _with(settings: Settings, axis: Axis, index: int) -> Settings:
    """The settings with one value of an axis; no unguided images, which all cells share."""
    value, (plugin, _, option) = axis.values[index], axis.name.rpartition(".")
    settings = replace(settings, compare=False)
    if plugin:
        if plugin not in settings.plugin:
            raise not_among(f"--grid {axis.name}", plugin, settings.plugin)
        own = settings.changes.get(plugin, {}) | {option: parse_value(value)}
        return replace(settings, changes=settings.changes | {plugin: own})
    kinds = {name: kind for name, kind in sample_keys().items() if name not in TOGETHER}
    if axis.name not in kinds:
        raise GuidekitError(
            f"--grid {axis.name}: no such option; give PLUGIN.OPTION or one of {', '.join(kinds)}"
        )
    changed: dict[str, Any] = {axis.name: convert(value, kinds[axis.name], axis.name)}
    return replace(settings, **changed)


def draw_cells(
    folder: Path, axes: tuple[Axis, ...], cells: list[Cell], draw: Callable[[Cell, Path], None]
) -> None:
    """Draws every run of a grid into the new `folder`, and the sheet anew after each.

    draw: draws a cell into the folder that it is given.
    """
    for cell in cells:
        draw(cell, folder / cell.name)
        (folder / CLAIM).unlink(missing_ok=True)
        write_sheet(folder, axes, cells)


def write_sheet(folder: Path, axes: tuple[Axis, ...], cells: list[Cell]) -> Path:
    """Writes the sheet of a grid whose cells lie in `folder`; a cell shows all its seeds."""
    blocks = {cell: _block(folder / cell.name, cell.settings) for cell in cells}
    font = ImageFont.load_default(TEXT)
    columns = axes[-1]
    above = [columns.label(j) for j in range(len(columns.values))]
    beside = [axes[0].label(i) for i in range(len(axes[0].values))] if len(axes) > 1 else [""]
    left = max(_length(text, font) for text in beside) + GAP if len(axes) > 1 else 0
    width = max([block.width for block in blocks.values()] + [_length(t, font) for t in above])
    height, top = max(block.height for block in blocks.values()), TEXT + GAP
    size = (left + len(above) * (width + GAP) + GAP, top + len(beside) * (height + GAP) + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for j, text in enumerate(above):
        draw.text((GAP + left + j * (width + GAP), GAP), text, INK, font)
    for i, text in enumerate(beside):
        draw.text((GAP, GAP + top + i * (height + GAP)), text, INK, font)
    for cell, block in blocks.items():
        x, y = left + cell.column * (width + GAP), top + cell.row * (height + GAP)
        sheet.paste(block, (GAP + x, GAP + y))
    sheet.save(folder / SHEET)
    return folder / SHEET


def _length(text: str, font: Any) -> int:
    return int(font.getlength(text)) + 1


def _block(folder: Path, settings: Settings) -> Image.Image:
    """The images of one cell, four in a row; grey where a run was stopped before any."""
    paths = [folder / f"{seed}.png" for seed in settings.seeds]
    images = [enlarge(Image.open(path).convert("RGB"), 128) for path in paths if path.is_file()]
    return grid(images, columns=4) if images else Image.new("RGB", (128, 128), "#dddddd")
