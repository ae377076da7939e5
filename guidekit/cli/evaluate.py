"""`guidekit eval`: measures of images. Everything that needs torch is imported inside."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from guidekit.cli.errors import traceback_option
from guidekit.cli.terminal import say

PATH = click.Path(path_type=Path)


@click.group("eval")
def evaluate() -> None:
    """Measure images: folders, runs, plans of blocks or tars, one row each."""


def _measure(command: Callable) -> Callable:
    """The options that all measures have."""
    for option in (
        traceback_option,
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--out", type=PATH, help="Folder for results.json and results.md."),
        click.argument("folders", nargs=-1, required=True, type=PATH),
    ):
        command = option(command)
    return command


_paired = click.option(
    "--paired", is_flag=True, help="Differences of the first row to the others too."
)
_real = click.option("--real", type=PATH, help="Real images, with prompts, for a row of theirs.")
_lpips = click.option("--lpips", type=PATH, help="Weights of LPIPS, for its column.")


def _commands() -> Any:
    """The commands' module, with transformers' bars kept off the terminal."""
    from guidekit.cli.models import quiet_libraries
    from guidekit.evaluate import commands

    quiet_libraries()
    return commands


def _tell(results: Any, out: Path | None, as_json: bool) -> None:
    if out is not None:
        results.write(out)
    if as_json:
        click.echo(json.dumps(results.table()))
    else:
        say(results.markdown())


@evaluate.command()
@_measure
@click.option("--maps", required=True, help="Folder of maps; of panoptic its JSON; 500 scenes.")
@click.option(
    "--form", required=True, help="coco-stuff, panoptic, ade20k, cityscapes, indexed, ..."
)
@click.option("--judge", default="scenes-judge", show_default=True, help="A segmenter.")
@click.option("--real", type=PATH, help="The real images of the maps, the judge's ceiling.")
@click.option(
    "--protocol", type=click.Choice(["all", "filtered", "few"]), default="all", show_default=True
)
@click.option("--clip", help="A CLIP, or its folder, for a column of CLIP scores.")
@_paired
def layout(out: Path | None, as_json: bool, **options: Any) -> None:
    """Do things stand where the maps say? mIoU and presence."""
    _tell(_commands().layout(**options), out, as_json)


@evaluate.command()
@_measure
@click.option("--clip", default="scenes-clip", show_default=True, help="A CLIP, or its folder.")
@click.option(
    "--write", type=click.Choice(["geneval", "t2i-compbench"]), help="Only write folders."
)
@click.option("--metadata", type=PATH, help="GenEval's evaluation_metadata.jsonl, for --write.")
@_real
@_paired
def prompts(
    folders: tuple[Path, ...],
    clip: str,
    write: str | None,
    metadata: Path | None,
    real: Path | None,
    paired: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Do images show what their prompts say? CLIP score, or folders for others' scorers."""
    from guidekit.evaluate import forms
    from guidekit.evaluate.images import prompts_of, read_images

    if write is None:
        _tell(_commands().prompts(folders, clip, real, paired), out, as_json)
        return
    if out is None or len(folders) > 1 or (write == "geneval") != (metadata is not None):
        raise click.UsageError("--write needs one FOLDER, --out, and for geneval --metadata")
    images, texts = read_images(folders[0]), prompts_of(folders[0])
    if metadata is not None:
        count = forms.write_geneval(images, texts, metadata, out)
    else:
        count = forms.write_t2i_compbench(images, texts, out)
    say(f"wrote    {out}/: {count} images in the form of {write}")


@evaluate.command()
@_measure
@click.option("--real", required=True, help="Folder of real images, .npz of statistics, scenes.")
@click.option("--features", default="scenes-judge", show_default=True, help="An extractor.")
@click.option("--draws", type=click.IntRange(0), default=100, show_default=True)
@_paired
def quality(out: Path | None, as_json: bool, **options: Any) -> None:
    """How near do images lie to real ones? Frechet and kernel distance, precision, recall."""
    _tell(_commands().quality(**options), out, as_json)


@evaluate.command()
@traceback_option
@click.argument("sources", nargs=-1, required=True, type=PATH)
@click.option("--features", default="scenes-judge", show_default=True, help="An extractor.")
@click.option("--out", type=PATH, required=True, help="The .npz to write.")
def statistics(sources: tuple[Path, ...], features: str, out: Path) -> None:
    """Mean and covariance of images, added up over shards and other statistics, for quality."""
    say(_commands().gathered(sources, features, out).markdown())


@evaluate.command()
@_measure
@click.option("--features", default="scenes-judge", show_default=True, help="An extractor.")
@_real
@_lpips
@_paired
def diversity(out: Path | None, as_json: bool, **options: Any) -> None:
    """How far apart are images of one prompt?"""
    _tell(_commands().diversity(**options), out, as_json)


@evaluate.command()
@_measure
@click.option("--real", required=True, type=PATH, help="Folder of other, real images.")
@click.option("--clip", default="scenes-clip", show_default=True, help="A CLIP, or its folder.")
@click.option("--among", type=click.IntRange(1), default=99, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Chooses the real ones.")
@_paired
def retrieval(out: Path | None, as_json: bool, **options: Any) -> None:
    """Is an image found by its prompt among real ones?"""
    _tell(_commands().retrieval(**options), out, as_json)


@evaluate.command()
@_measure
@click.option("--real", required=True, type=PATH, help="Folder of the true images.")
@_lpips
@_paired
def inverse(out: Path | None, as_json: bool, **options: Any) -> None:
    """How near are restored images to the true ones? PSNR, SSIM, LPIPS."""
    _tell(_commands().inverse(**options), out, as_json)


@evaluate.command()
@_measure
@click.option("--of", required=True, help="brightness, contrast, or MODULE:NAME.")
@click.option("--real", type=PATH, help="Real images, for a row of theirs.")
@_paired
def reward(out: Path | None, as_json: bool, **options: Any) -> None:
    """How much of a reward do images get? One that guided them is refused."""
    _tell(_commands().reward(**options), out, as_json)
