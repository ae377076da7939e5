"""Are things recognised? The first draws of `objects`, one thing an image, read by its judge.

    python benchmarks/kinds.py --sheet docs/kinds.png     48 kinds, 4 seeds; a sheet of the first
    python benchmarks/kinds.py --quick

Nothing guides and nothing is chosen. "recognised" is the share of images whose largest thing, pixel
by pixel in the judge's eyes, is the one that was asked for; "any" that in which it is seen at all.
Who has looked at the sheet says by --missed which of its kinds were not told at sight.
"""

from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from torchvision.utils import save_image

import guidekit
from guidekit import Condition
from guidekit.evaluate import judge as evaluate
from guidekit.evaluate.overlap import asked_pixels, shown
from guidekit.evaluate.rows import mean_column
from guidekit.worlds.grounds import GROUNDS
from guidekit.worlds.objects import caption
from guidekit.zoo.shipped import model_defaults
from layout_worlds import Objects
from measured import Results

COLUMNS, BATCH = 8, 16


def captions(kinds: tuple[str, ...]) -> list[str]:
    """A caption for every kind, on the grounds in turn."""
    grounds = list(GROUNDS)
    return [caption([kind], grounds[i % len(grounds)]) for i, kind in enumerate(kinds)]


def drawn(model: str, texts: list[str], first: int, steps: int, cfg: float) -> Tensor:
    """An image (n, 3, H, W) for every text, with seeds from `first` on."""
    pipeline, images = guidekit.load(model), []
    for i in range(0, len(texts), BATCH):
        part = [Condition(text) for text in texts[i : i + BATCH]]
        seeds = range(first + i, first + i + len(part))
        run = guidekit.sample(pipeline, part, seeds=seeds, steps=steps, cfg=cfg)
        images.append(run.finish().images)
    return torch.cat(images)


@click.command()
@click.option("--model", default="objects", show_default=True, help="A pipeline of that world.")
@click.option("--seeds", default=4, show_default=True, help="Images of a kind.")
@click.option("--seed", default=0, show_default=True, help="The first.")
@click.option("--quick", is_flag=True, help="One seed, ten steps.")
@click.option("--sheet", type=click.Path(dir_okay=False), help="Save the first image of each kind.")
@click.option("--missed", help="Kinds that you did not tell on the sheet, by commas.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write the rows here.")
def main(
    model: str,
    seeds: int,
    seed: int,
    quick: bool,
    sheet: str | None,
    missed: str | None,
    path: Path | None,
):
    """Prints which kinds the judge recognises, and how often."""
    torch.set_num_threads(1)
    own, kinds = model_defaults("objects"), Objects().classes
    seeds, steps, cfg = (1, 10, own["cfg"]) if quick else (seeds, own["steps"], own["cfg"])
    n = seeds * len(kinds)
    about = {"n": n, "seeds": [seed, seed + n - 1], "steps": steps, "cfg": cfg}
    results = Results(path, model=model, batch=BATCH, **about)
    judge, texts, hits, found = evaluate.load_judge(Objects.judge), captions(kinds), [], []
    for first in range(seed, seed + n, len(kinds)):
        images = drawn(model, texts, first, steps, cfg)
        if sheet and first == seed:
            save_image(images, sheet, nrow=COLUMNS)
        classes = evaluate.see(judge, images).classes
        hits.append(asked_pixels(classes, len(kinds)).argmax(1) == np.arange(len(kinds)))
        found.append(np.diagonal(shown(classes, len(kinds))))
    table = np.stack(hits).T, np.stack(found).T  # (kinds, seeds) each
    row = {"kind": "all", "n": n}
    for name, values in zip(("recognised", "any"), table, strict=True):
        row |= mean_column(name, values.mean(1).astype(float))
    results.add(row)
    for kind, own_hits, own_found in zip(kinds, *table, strict=True):
        shares = {"recognised": float(own_hits.mean()), "any": float(own_found.mean())}
        results.add({"kind": kind, "n": seeds} | shares)
    if missed is not None:
        results.add(at_sight(kinds, missed.split(",") if missed else []))
    results.finish()


def at_sight(kinds: tuple[str, ...], missed: list[str]) -> dict:
    """The row of a person's eye: how many of the sheet's kinds were told, and which were not."""
    if unknown := set(missed) - set(kinds):
        raise click.BadParameter(f"no kinds: {', '.join(sorted(unknown))}", param_hint="--missed")
    told = len(kinds) - len(missed)
    return {"kind": "at sight", "n": len(kinds), "told": told, "not told": ", ".join(missed)}


if __name__ == "__main__":
    main()
