"""`guidekit status`: how far a plan has come, what failed and who draws what."""

import json
import sys
from pathlib import Path

import click

from guidekit.cli.errors import traceback_option
from guidekit.cli.terminal import images, say


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@traceback_option
def status(folder: Path, as_json: bool) -> None:
    """Say how far the plan of FOLDER has come; exit code 3 while something is missing."""
    from guidekit.cli.scale.block_plan import read_block_plan
    from guidekit.cli.scale.store import Store

    store = Store(folder, read_block_plan(folder))
    manifest, drawing = store.manifest(), store.drawing()
    if as_json:
        click.echo(json.dumps(manifest | {"drawing": drawing}))
    else:
        done, blocks = len(manifest["blocks"]), len(store.plan.blocks)
        say(f"plan     {manifest['plan']}: {images(store.plan.count)} in {blocks} blocks")
        say(f"there    {images(manifest['images'])} in {done} blocks")
        for number, who in drawing.items():
            say(f"drawing  block {number} by {who}")
        for row in manifest["failures"]:
            first, last = row["seeds"]
            where = f"block {row['block']}, seeds {first}-{last}"
            say(f"failed   {where}, tries {row['tries']}: {row['error']}")
        for line in _mixed(manifest["blocks"]):
            say(line)
    sys.exit(0 if manifest["complete"] else 3)


def _mixed(blocks: list[dict]) -> list[str]:
    """What differs between the processes that drew the blocks."""
    found: dict[str, set[str]] = {}
    for block in blocks:
        for name, value in block["made_by"].items():
            found.setdefault(name, set()).add(str(value))
    return [
        f"mixed    {name}: {', '.join(sorted(values))}; images may differ slightly"
        for name, values in found.items()
        if len(values) > 1
    ]
