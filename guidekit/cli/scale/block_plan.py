"""plan.json: what is drawn in which blocks, the same for every process that draws some of it."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from guidekit.cli.controls import control_tables, read_controls, save_controls
from guidekit.cli.settings import FORMAT, Settings, dump, make_settings, parse_config, sample_keys
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError
from guidekit.layouts import load_layout, parse_layout
from guidekit.outputs.folders import save_masks, segment_tables
from guidekit.references import load_reference
from guidekit.system.untrusted import inside, parse_json, read_json, read_text
from guidekit.zoo.shipped import ZOO

PLAN = "plan.json"
Form = Literal["folders", "tars"]
Calls = Literal["split", "batched"]
# Of [sample], what blocks decide, or what belongs to one process or to no data set.
NOT_PLANNED = ("batch", "compare", "device", "image_folder", "layout", "out", "per_image")
ENTRY_KEYS = ("prompt", "negative", "label", "map", "segments", "layout", "image")


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """Fixed blocks of seeds with their conditions, each drawn as one batch wherever it is drawn.

    Raises GuidekitError for numbers that cannot be.
    """

    #: The tables of a run.json; the first seed is that of the first image.
    sample: dict[str, Any]
    plugin: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    segment: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    control: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    #: Images in all.
    count: int
    #: Images of a block; another size moves roundings.
    block: int = 16
    #: Conditions of the images, each for `each` in a row, over and over; none: the same for all.
    conditions: tuple[dict[str, Any], ...] = ()
    each: int = 1
    #: Threads of every process: their number moves roundings on CPUs.
    threads: int = 1
    #: How branches with and without a graph ride; a run of its own would measure it.
    calls: Calls = "split"
    #: A folder a block, or a tar of WebDataset.
    form: Form = "folders"
    #: What paths are relative to.
    folder: Path = Path()

    def __post_init__(self) -> None:
        for name in ("count", "block", "each", "threads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise GuidekitError(f"{name} of a plan must be a number from 1, not {value!r}")
        particles = self.sample.get("particles", 1)
        if not isinstance(particles, int) or particles < 1:
            raise GuidekitError(f"particles of a plan is a number from 1, not {particles!r}")
        if self.block % particles or self.count % particles:
            raise GuidekitError(
                f"block and count of a plan are multiples of its {particles} particles, not "
                f"{self.block} and {self.count}"
            )
        for name, kind in (("calls", Calls), ("form", Form)):
            if getattr(self, name) not in get_args(kind):
                exist = " or ".join(get_args(kind))
                raise GuidekitError(f"{name} of a plan is {exist}, not {getattr(self, name)!r}")

    @property
    def blocks(self) -> range:
        """The numbers of the blocks."""
        return range(-(-self.count // self.block))

    @property
    def first(self) -> int:
        """The seed of the first image."""
        return int(self.sample.get("seeds", [0])[0])

    @property
    def identity(self) -> str:
        """A short name of all that decides the images, but for the files that it names."""
        table = self.table()
        del table["folder"]
        text = json.dumps(table, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def seeds(self, number: int) -> range:
        """The seeds of a block."""
        start = self.first + number * self.block
        return range(start, min(start + self.block, self.first + self.count))

    def condition_number(self, seed: int) -> int | None:
        """Which of the conditions an image has; None where all have the same."""
        if not self.conditions:
            return None
        return (seed - self.first) // self.each % len(self.conditions)

    def condition(self, seed: int, base: Condition) -> Condition:
        """What is asked of an image. Raises GuidekitError that names its condition."""
        number = self.condition_number(seed)
        if number is None:
            return base
        where = f"condition {number} of the plan"
        try:
            return _condition(self.conditions[number], self.folder, base, where)
        except GuidekitError as error:
            text = str(error)
            raise GuidekitError(text if where in text else f"{where}: {text}") from None

    def settings(self, device: str | None = None) -> Settings:
        """The settings of its images."""
        names = ("sample", "plugin", "segment", "control")
        tables = {name: getattr(self, name) for name in names}
        config = parse_config(tables, self.folder, "plan")
        if self.conditions and config["sample"].get("prompt") is None:
            config["sample"]["prompt"] = ""  # nothing is drawn in place of what they ask
        return make_settings(config, {"device": device})

    def table(self, home: Path | None = None) -> dict[str, Any]:
        """What plan.json holds, in the folder `home`."""
        table = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        folder = self.folder.resolve()
        own = {
            "conditions": list(self.conditions),
            "folder": "." if home is not None and home.resolve() == folder else str(folder),
        }
        return {"format": FORMAT} | table | own


def _condition(entry: dict[str, Any], folder: Path, base: Condition, where: str) -> Condition:
    """The condition of an entry; what it leaves out is the plan's."""
    own = {key: entry[key] for key in entry if key not in ("layout", "image")}
    found, segments = parse_layout(own, folder, where), "segments" in entry
    if "layout" in entry:
        if segments or "map" in entry:
            raise GuidekitError(f"{where}: give `layout` or `segments`, not both")
        found = load_layout(inside(folder, entry["layout"], f"{where}: `layout`"))
        segments = True
    image = base.image
    if "image" in entry:
        image = load_reference(inside(folder, entry["image"], f"{where}: `image`"))
    return replace(
        base,
        prompt=entry.get("prompt", found.prompt or base.prompt),
        negative=entry.get("negative", found.negative or base.negative),
        segments=found.segments if segments else base.segments,
        label=entry.get("label", base.label if found.label is None else found.label),
        image=image,
    )


def make_block_plan(settings: Settings, condition: Condition, **values: Any) -> BlockPlan:
    """The plan that settings and a number of images ask for; values: the other fields.

    condition: that of the settings; its masks and maps are to lie in the plan's
    folder.
    """
    tables = dump(settings)
    sample = {k: v for k, v in tables["sample"].items() if k not in NOT_PLANNED and v is not None}
    sample["seeds"] = [settings.seeds[0]]
    if condition != Condition(negative=condition.negative) or settings.prompt is not None:
        sample |= {"prompt": condition.prompt}
        sample |= {} if condition.label is None else {"label": condition.label}
    sample["negative"] = condition.negative
    if Path(settings.model).is_dir() and not (ZOO / settings.model).is_dir():
        sample["model"] = str(Path(settings.model).resolve())
    return BlockPlan(
        sample=sample,
        plugin=tables["plugin"],
        segment=segment_tables(condition.segments),
        control=control_tables(read_controls(settings)),
        **values,
    )


def save_plan_files(settings: Settings, condition: Condition, folder: Path) -> None:
    """Writes the masks, the map and the controls' images that the plan names."""
    save_masks(condition.segments, folder)
    save_controls(read_controls(settings), condition.map, folder)


def read_block_plan(path: Path) -> BlockPlan:
    """The plan of a file, or of a folder that holds plan.json.

    Raises GuidekitError that names the key at fault and those that exist.
    """
    path = path / PLAN if path.is_dir() else path
    where = f"plan {path}"
    try:
        table = read_json(path)
    except FileNotFoundError:
        raise GuidekitError(f"{where}: no such file") from None
    except (OSError, ValueError) as error:
        raise GuidekitError(f"{where}: not a readable JSON file ({error})") from None
    known = ("format", *(field.name for field in dataclasses.fields(BlockPlan)))
    if not isinstance(table, dict) or set(table) - set(known):
        raise GuidekitError(f"{where}: an object with the keys {', '.join(known)} is expected")
    if table.get("format", FORMAT) != FORMAT:
        raise GuidekitError(f"{where}: format {FORMAT} is read, not {table['format']!r}")
    values = {key: value for key, value in table.items() if key != "format"}
    if not isinstance(values.get("folder", ""), str):
        raise GuidekitError(f"{where}: `folder` must be a path")
    folder = values["folder"] = path.parent / values.get("folder", "")
    values["conditions"] = tuple(_entries(values.get("conditions", []), folder, where))
    values["sample"] = _sample(values.get("sample", {}), where)
    values.setdefault("count", len(values["conditions"]) * values.get("each", 1) or None)
    if values["count"] is None:
        raise GuidekitError(f"{where}: give `count`, the number of images, or `conditions`")
    return BlockPlan(**values)


def _sample(table: object, where: str) -> dict[str, Any]:
    """The table [sample], its one seed in a list."""
    known = [key for key in sample_keys() if key not in NOT_PLANNED]
    if not isinstance(table, dict) or set(table) - set(known):
        raise GuidekitError(f"{where}: `sample` may have the keys {', '.join(known)}")
    seeds = table.get("seeds", 0)
    seeds = seeds if isinstance(seeds, list) else [seeds]
    if len(seeds) != 1 or isinstance(seeds[0], bool) or not isinstance(seeds[0], int):
        raise GuidekitError(f"{where}: `seeds` is the first image's alone; the others follow it")
    return table | {"seeds": seeds}


def _entries(given: object, folder: Path, where: str) -> Iterator[dict[str, Any]]:
    """The conditions: a list of objects or prompts, or the name of a file with one a line."""
    if isinstance(given, str):
        given = _lines(inside(folder, given, f"{where}: `conditions`"))
    if not isinstance(given, list):
        raise GuidekitError(f"{where}: `conditions` is a list, or the name of a file of lines")
    for number, entry in enumerate(given):
        entry = {"prompt": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or set(entry) - set(ENTRY_KEYS):
            raise GuidekitError(
                f"{where}: condition {number} is a prompt, or an object with some of the keys "
                f"{', '.join(ENTRY_KEYS)}"
            )
        yield entry


def _lines(path: Path) -> list[Any]:
    """The entries of a file: JSON lines (.jsonl), else a prompt a line; empty lines are none."""
    try:
        lines = [line for line in read_text(path).splitlines() if line.strip()]
        return [parse_json(line) for line in lines] if path.suffix == ".jsonl" else lines
    except FileNotFoundError:
        raise GuidekitError(f"conditions {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise GuidekitError(f"conditions {path}: {error}") from None
