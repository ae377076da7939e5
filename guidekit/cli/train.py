"""`guidekit train`. Everything that needs torch is imported inside."""

import json
from pathlib import Path

import click

from guidekit.cli.errors import traceback_option
from guidekit.cli.terminal import say
from guidekit.errors import GuidekitError

#: What a model of a kind needs beside its name.
BESIDE = {
    "SemanticaPipeline": " --plugin semantica --image IMAGE",
    "MapsPipeline": " --map MAP.png",
}


@click.command()
@click.argument("recipe")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--set", "settings", multiple=True, help="Option of every stage: steps=100.")
@click.option(
    "--cutouts", type=click.Path(path_type=Path), help="Folder of images that scenes are made of."
)
@click.option(
    "--fast-dev-run",
    "fast",
    is_flag=True,
    help="Every stage for two steps on little data, in OUT/fast-dev-run: does it run at all?",
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@traceback_option
def train(
    recipe: str,
    out: Path,
    settings: tuple[str, ...],
    cutouts: Path | None,
    fast: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train a model from a built-in recipe or a TOML file; a stopped training continues."""
    if not (quiet or as_json):
        say(f"loading  {recipe}")
    from guidekit.options import convert, option_kinds, parse_value
    from guidekit.train.loop import Options
    from guidekit.train.recipe import train as run

    kinds, overrides = option_kinds(Options), {}
    for text in settings:
        option, equals, value = text.partition("=")
        if not equals:
            raise GuidekitError(f"--set {text}: write OPTION=VALUE, such as steps=100")
        if option not in kinds:
            raise GuidekitError(f"--set {text}: no option {option!r}; there are {', '.join(kinds)}")
        overrides[option] = convert(parse_value(value), kinds[option], option)
    silent = quiet or as_json
    model = run(recipe, out, quiet=silent, overrides=overrides, cutouts=cutouts, fast_dev_run=fast)
    if as_json:
        click.echo(json.dumps({"model": str(model)}))
    elif not quiet:
        say(f"model    {model}{next_step(model)}")


def next_step(model: Path) -> str:
    """What is done with a trained model, where it is a command."""
    if (index := model / "model_index.json").exists():
        kind = json.loads(index.read_text()).get("_class_name")
        beside = BESIDE.get(kind, "")
        if (own := model / "control").is_dir():  # that the model was trained with
            reads = "--map MAP.png" if (own / "labels.json").exists() else "--segment PHRASE=MASK"
            beside = f" --control {own} {reads}"
        return f"\nnext     guidekit sample --model {model}{beside}"
    if (model / "labels.json").exists():
        return f"\nnext     guidekit sample --control {model} --map MAP.png"
    if (model / "noisy_clip.json").exists():
        return f"\nnext     guidekit sample --plugin clip --set clip.encoder={model}"
    return ""
