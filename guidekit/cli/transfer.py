"""`guidekit transfer`. Everything that needs torch is imported inside."""

import json
from pathlib import Path
from typing import Any

import click

from guidekit.cli.errors import traceback_option
from guidekit.cli.terminal import say


@click.command()
@click.argument("shots", metavar="SHOTS", type=click.Path(path_type=Path))
@click.option("--model", default="scenes-maps", show_default=True, help="A model of label maps.")
@click.option("--control", help="Transfer this ControlNet or T2I-Adapter, beside --model.")
@click.option(
    "--affinity",
    type=click.Path(path_type=Path),
    help="From `guidekit affinity`, of the model's classes to the shots' [new filters].",
)
@click.option("--by", default="vote", show_default=True, help="The estimate of it that counts.")
@click.option("--soft", is_flag=True, help="Fold shares of classes, not one class for each.")
@click.option("--steps", type=click.IntRange(0), default=400, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True)
@click.option("--lr", type=float, help="Rate [1e-3 for a model, 3e-4 for a control].")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--held-out",
    type=click.IntRange(0),
    help="Shots that choose the checkpoint and are not trained on [5, or a quarter of few].",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to train in.")
@click.option("--fast-dev-run", "fast", is_flag=True, help="Two steps: does it run at all?")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@traceback_option
def transfer(out: Path, fast: bool, quiet: bool, as_json: bool, **options: Any) -> None:
    """Make a model or control of label maps follow those of a few labelled images.

    SHOTS holds images/ and masks/ by stem and classes.json, their label set. OUT/recipe.toml says
    what is trained; a stopped training continues. With --steps 0 the affinity is folded into the
    model and nothing is trained.
    """
    silent = quiet or as_json
    if not silent:
        say(f"loading  {options['model']}")
    from guidekit.synthesis.transfer import Transfer
    from guidekit.synthesis.transfer import transfer as run

    model = run(Transfer(**options), out, quiet=silent, fast_dev_run=fast)
    if as_json:
        click.echo(json.dumps({"model": str(model)}))
    elif not quiet:
        control = options["control"] is not None
        words = f"{options['model']} --control {model}" if control else model
        say(f"model    {model}\nnext     guidekit sample --model {words} --map MAP.png")
