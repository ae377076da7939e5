"""Writes the pages of the reference that code and results know best, and all tables.

Tables of results stand in pages of all folders; tables.py makes them of benchmarks/results.

With --check it writes nothing, and exits with 1 if a page is not what it would write.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import click
import matrix
import tables

from guidekit.__main__ import main as guidekit
from guidekit.cli.describe import describe_plugin
from guidekit.registry import entries

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
NOTE = "<!-- Written by docs/generate.py; change the code and run it again. -->\n\n"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def walk(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """A command and those below it, with their full names."""
    yield name, command
    for part, child in sorted(getattr(command, "commands", {}).items()):
        yield from walk(child, f"{name} {part}")


def command_text(name: str, command: click.Command) -> str:
    """What a command does, its usage and its options."""
    context = click.Context(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    about = " ".join((command.help or "").split())
    rows = [record for option in command.params if (record := option.get_help_record(context))]
    cells = [(f"`{flags}`", " ".join(text.split())) for flags, text in rows]
    options = "\n" + table(("option", "meaning"), cells) if cells else ""
    return f"## {name}\n\n{about}\n\n```\nusage: {usage}\n```\n{options}"


def commands() -> str:
    """The page of all commands."""
    head = "# Commands\n\nThe same as `guidekit COMMAND --help`.\n\n"
    return head + "\n".join(command_text(*pair) for pair in walk(guidekit, "guidekit"))


def guidance_text(facts: dict) -> str:
    """A guidance of a plugin: what it is, its options, its tuned values and a command."""
    rows = [
        (f"`{o['option']}`", f"`{o['type']}`", f"`{o['default']!r}`", o["comment"])
        for o in facts["options"]
    ]
    tuned = [
        f"Tuned for `{model}`: "
        + ", ".join(f"`{name}` {value}" for name, value in options.items())
        + ".\n"
        for model, options in facts["tuned"].items()
    ]
    parts = [
        f"## {facts['name']}\n",
        facts["about"] + "\n",
        table(("option", "type", "default", "meaning"), rows),
        *tuned,
        f"```\n{facts['example']}\n```\n",
    ]
    return "\n".join(parts)


def options() -> str:
    """The page of the options of every plugin that belongs to guidekit."""
    head = (
        "# Options of the plugins\n\nThe same as `guidekit plugins show NAME`. Set one by "
        "`--set NAME.OPTION=VALUE`, in Python by `guidekit.make(NAME, OPTION=VALUE)`.\n\n"
    )
    names = [entry.name for entry in entries() if entry.first_party]
    facts = [guidance for name in names for guidance in describe_plugin(name)["guidances"]]
    return head + "\n".join(map(guidance_text, facts))


PAGES = {"commands.md": commands, "options.md": options, "matrix.md": matrix.page}


def main() -> None:
    """Writes the pages, or says which of them are stale."""
    pages = {REFERENCE / name: NOTE + made().rstrip() + "\n" for name, made in PAGES.items()}
    pages |= {path: tables.filled(path.read_text()) for path in tables.PAGES}
    if "--check" not in sys.argv[1:]:
        for path, text in pages.items():
            path.write_text(text)
        return
    stale = [str(path.relative_to(ROOT)) for path, text in pages.items() if not same(path, text)]
    if stale:
        sys.exit(f"stale: {', '.join(stale)}; run python docs/generate.py")


def same(path: Path, text: str) -> bool:
    """Whether a page says this."""
    return path.exists() and path.read_text() == text


if __name__ == "__main__":
    main()
