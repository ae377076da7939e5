"""Tables and numbers of the pages, made of benchmarks/results/*.json.

A page marks the place of a table, and a number, by what it is read from:

    <!-- table: fewshot-scenes part=masks columns="method, mIoU" -->
    ...
    <!-- end of table -->

    Zest reaches 0.37<!-- = layout Zest mIoU -->.

`docs/generate.py` writes what stands between, and before. A word NAME=VALUE that is no option of
`Shown` keeps the rows that have this value. benchmarks/commands.toml says how each file is made.
"""

import json
import re
import shlex
import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
NUMBER = re.compile(r"[^\s(\[]+(<!-- = (.+?) -->)")
INDEX = re.compile(r"(<!-- results -->\n).*?(<!-- end of results -->)", re.DOTALL)
#: Pages with tables of results.
PAGES = (
    *sorted((ROOT / "docs").glob("results/*.md")),
    *sorted((ROOT / "docs").glob("howto/*.md")),
    ROOT / "docs" / "explanation" / "seeds-and-batches.md",
    ROOT / "docs" / "reference" / "plugins.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "kernels" / "README.md",
    ROOT / "README.md",
)


@dataclass(frozen=True)
class Result:
    """A file of results: its facts, and rows; without rows where there is no file."""

    name: str
    command: str
    facts: dict = field(default_factory=dict)

    @property
    def rows(self) -> list[dict]:
        """What was measured."""
        return self.facts.get("rows", [])

    @property
    def again(self) -> str:
        """The command that writes the file."""
        return f"`{self.command} --json benchmarks/results/{self.name}.json`"


@dataclass(frozen=True)
class Shown:
    """What a mark asks for."""

    name: str
    columns: str = ""  # of the rows, in this order; all
    digits: int = 3
    caption: str = "whole"  # or "none", where another table of the page has it
    where: dict = field(default_factory=dict)

    @classmethod
    def read(cls, words: str) -> "Shown":
        """The name of the results, then NAME=VALUE."""
        name, *pairs = shlex.split(words)
        given = dict(pair.split("=", 1) for pair in pairs)
        own = {key: given.pop(key) for key in ("columns", "caption") if key in given}
        return cls(name, digits=int(given.pop("digits", 3)), where=given, **own)


@cache
def commands() -> dict[str, dict]:
    """How every file of results is made."""
    return tomllib.loads((ROOT / "benchmarks" / "commands.toml").read_text())


@cache
def result(name: str) -> Result:
    """A file of results by its name."""
    path = RESULTS / f"{name}.json"
    facts = json.loads(path.read_text()) if path.exists() else {}
    return Result(name, f"python benchmarks/{commands()[name]['run']}", facts)


def filled(text: str) -> str:
    """A page with its tables and numbers written anew."""
    text = TABLE.sub(lambda m: f"{m[1]}\n{table_text(Shown.read(m[2]))}\n\n{m[3]}", text)
    text = INDEX.sub(lambda m: f"{m[1]}\n{index()}\n\n{m[2]}", text)
    return NUMBER.sub(lambda m: inline(m[2]) + m[1], text)


def table_text(shown: Shown) -> str:
    """Tables of the rows, one for each set of columns, and what they were measured on."""
    found = result(shown.name)
    rows = [r for r in found.rows if all(str(r.get(k)) == v for k, v in shown.where.items())]
    if found.rows and not rows:
        raise SystemExit(f"{shown.name}: no row with {shown.where}")
    if not rows:
        return f"*Not measured with this version:* {found.again}."
    parts = grouped([(columns_of(row, shown, found), row) for row in rows])
    tables = [markdown(names, members, shown.digits) for names, members in parts.items()]
    captions = [] if shown.caption == "none" else [caption(found)]
    return "\n\n".join([*tables, *captions])


def grouped(rows: list[tuple[tuple[str, ...], dict]]) -> dict[tuple[str, ...], list[dict]]:
    """Rows by their columns; those that lack some of another's columns stand with that one."""
    sets = dict.fromkeys(names for names, _ in rows)
    widest = [names for names in sets if not any(set(names) < set(other) for other in sets)]
    parts: dict[tuple[str, ...], list[dict]] = {}
    for names, row in rows:
        parts.setdefault(next(w for w in widest if set(names) <= set(w)), []).append(row)
    return parts


def columns_of(row: dict, shown: Shown, found: Result) -> tuple[str, ...]:
    """The columns that a row is shown with."""
    if shown.columns:
        return tuple(name.strip() for name in shown.columns.split(","))
    hidden = {"part", *shown.where}
    if "n" in found.facts and len({row.get("n") for row in found.rows}) == 1:
        hidden.add("n")
    return tuple(k for k in row if k not in hidden and not k.endswith((" 95%", "_interval")))


def markdown(names: tuple[str, ...], rows: list[dict], digits: int) -> str:
    """A table in Markdown."""
    lines = [names, ["---"] * len(names)]
    lines += [[cell(row, name, digits) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(row: dict, name: str, digits: int) -> str:
    """A value, with its interval where it has one."""
    text = number(row.get(name, ""), digits)
    bounds = row.get(f"{name} 95%") or row.get(f"{name}_interval")
    if not bounds or not text:
        return text.replace("|", "\\|")
    places = min(digits, max(2, *(len(str(bound).partition(".")[2]) for bound in bounds)))
    return f"{text} [{', '.join(number(bound, places) for bound in bounds)}]"


def number(value: object, digits: int = 3) -> str:
    """A value in as many digits as it is read with."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{digits if abs(value) < 10 else 1}f}"


def inline(words: str) -> str:
    """The number of FILE ROW COLUMN [DIGITS], of one row.

    ROW is what it alone says in any column, or several such values with " & " between them.
    """
    name, said, column, *digits = shlex.split(words)
    values = set(said.split(" & "))
    found = [row for row in result(name).rows if values <= set(map(str, row.values()))]
    if len(found) != 1:
        raise SystemExit(f"{words}: {len(found)} rows of {name} say {said!r}")
    return number(found[0][column], int(digits[0]) if digits else 3)


def caption(found: Result) -> str:
    """What the rows were measured on, and what makes them again."""
    facts, again = found.facts, found.again
    told = "; ".join(filter(None, [shared(facts), facts.get("intervals", ""), place(facts)]))
    if "origin" in facts:
        text = f"*Of an earlier version, {facts['origin']}:* {told}. With this version: {again}."
    elif not facts["finished"]:
        text = f"*Cut short, rows are missing:* {told}. Whole: {again}."
    else:
        text = f"Measured: {told}: `{facts['command']}`."
    said = "\n".join(f"- {line}" for line in facts["said"])
    return "\n\n".join(filter(None, [text, facts.get("note"), said]))


def shared(facts: dict) -> str:
    """What the rows have in common."""
    words = [f"n = {facts['n']:,}"] if "n" in facts else []
    words += [f"seeds {facts['seeds'][0]} to {facts['seeds'][1]}"] if "seeds" in facts else []
    words += [f"seed {facts['seed']}"] if "seed" in facts and "seeds" not in facts else []
    for name, text in {
        "draws": "{} draws",
        "steps": "{} steps",
        "cfg": "cfg {:g}",
        "batch": "batch {}",
        "repeats": "{} turns",
        "rounds": "{} rounds",
    }.items():
        words += [text.format(facts[name])] if facts.get(name) else []
    return ", ".join(words)


def place(facts: dict) -> str:
    """The machine, the versions and the day."""
    many = facts.get("threads")
    machine = f"{facts['cores']} {facts['machine']} cores"
    machine = f"{many} thread{'s' * (many > 1)} of {machine}" if many else machine
    device = [] if facts.get("device", "cpu") == "cpu" else [facts["device"]]
    return ", ".join([*device, machine, f"torch {facts['torch']}", facts["date"]])


def index() -> str:
    """All results: which there are, of when, and the commands."""
    lines = ["| results | of | command |", "|---|---|---|"]
    for name in commands():
        found = result(name)
        when = found.facts.get("date", "") or "not measured with this version"
        if "origin" in found.facts:
            when = f"an earlier version ({when})"
        lines.append(f"| `{name}` | {when} | `{found.command}` |")
    return "\n".join(lines)
