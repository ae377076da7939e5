"""`guidekit plugins`, `plugins show` and `plugins new`. Listing imports no plugin."""

import ast
import dataclasses
import importlib.util
import json
import shlex
from pathlib import Path

import click

from guidekit.cli.errors import traceback_option
from guidekit.cli.terminal import say


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@traceback_option
@click.pass_context
def plugins(ctx: click.Context, as_json: bool) -> None:
    """List the installed plugins; nothing of them is imported."""
    if ctx.invoked_subcommand:
        return
    from guidekit.registry import entries

    found = [(entry, summary(entry.module)) for entry in entries()]
    if as_json:
        rows = [dataclasses.asdict(entry) | {"summary": text} for entry, text in found]
        click.echo(json.dumps({"plugins": rows}))
        return
    rows = [
        (e.name, e.version, "first-party" if e.first_party else f"third-party, {e.distribution}")
        for e, _ in found
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)] if rows else []
    for row, (_, text) in zip(rows, found, strict=True):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        say(f"{cells}  {text}".rstrip())


def summary(module: str) -> str:
    """First line of a module's docstring, read from its source; "" where there is none to read.

    Metadata of a distribution has no word on its entry points, and importing a plugin to list it
    would run it. Finding the source of a top-level module, or of the package that holds one,
    imports nothing.
    """
    top, *rest = module.partition(":")[0].split(".")
    try:
        spec = importlib.util.find_spec(top)
        source = Path(spec.origin).parent.joinpath(*rest) if rest else Path(spec.origin)
        if rest:
            source = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
        text = ast.get_docstring(ast.parse(source.read_bytes()))
    except (ImportError, AttributeError, TypeError, ValueError, OSError, SyntaxError):
        return ""
    return text.splitlines()[0] if text else ""


@plugins.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@traceback_option
def show(name: str, as_json: bool) -> None:
    """Show what a plugin offers and every option of it; the plugin is imported."""
    from guidekit.cli.describe import describe_plugin, plugin_text

    facts = describe_plugin(name)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        say(plugin_text(facts))


@plugins.command()
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to make [guidekit-NAME].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@traceback_option
def new(name: str, out: Path | None, as_json: bool) -> None:
    """Start a plugin of your own: a copy of the template under your name."""
    from guidekit.cli.scaffold import new_plugin

    folder = new_plugin(name, out)
    if as_json:
        click.echo(json.dumps({"folder": str(folder)}))
    else:
        say(f"wrote    {folder}/: {', '.join(sorted(p.name for p in folder.iterdir()))}")
        go = f"cd {shlex.quote(str(folder))}"
        say(f"next     {go} && pip install -e . && pytest --guidekit-plugin {name}")
