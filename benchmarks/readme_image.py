"""Draws the README's image: masks, unguided, Zest, and Zest with Paint-with-Words.

python benchmarks/readme_image.py docs/layout.png
python benchmarks/readme_image.py docs/layout.png --world objects
"""

from collections.abc import Sequence
from pathlib import Path

import click
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

import guidekit
from guidekit import Segment
from guidekit.registry import Registry
from guidekit.worlds import scenes
from guidekit.zoo.shipped import model_defaults
from layout_worlds import WORLDS, world_of

COUNT = 8
FIRST = {"scenes": 40, "objects": 0}  # number of the first held-out layout
ENLARGED = 128  # pixels of a side at least


def colour_masks(layouts: Sequence[Sequence[Segment]], size: int) -> Tensor:
    """Masks in the colours of their phrases, or others, on grey: (n, 3, size, size) in [0, 1]."""
    images = torch.full((len(layouts), 3, size, size), 0.85)
    others = [scenes.COLOURS[name] for name in ("red", "blue", "green", "yellow")]
    for image, segments in zip(images, layouts, strict=True):
        for segment, other in zip(segments, others, strict=False):
            colour = scenes.COLOURS.get(segment.phrase.split()[0], other)
            image[:, segment.mask > 0.5] = torch.tensor(colour)[:, None] / 255
    return images


@click.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--world", default="scenes", show_default=True, type=click.Choice(WORLDS))
def main(path, world):
    """Saves the rows as one image and prints the prompts."""
    pipeline, defaults = guidekit.load(world), model_defaults(world)
    drawn = world_of(world)
    layouts = drawn.layouts(COUNT, FIRST[world])
    make, tuned = Registry().make_guidance, defaults["plugin"]
    rows = {
        "unguided": [],
        "Zest": [make("zest", tuned["zest"])],
        "Zest + PwW": [make("pww", tuned["pww"]), make("zest", tuned["zest"])],
    }
    images = [colour_masks([c.segments for c in layouts.conditions], drawn.size)]
    for guidances in rows.values():
        options = {"seeds": range(COUNT), "steps": defaults["steps"], "cfg": defaults["cfg"]}
        run = guidekit.sample(pipeline, layouts.conditions, guidances, **options)
        images.append(run.finish().images)
    sheet = make_grid(torch.cat(images), nrow=COUNT, padding=2, pad_value=1.0)
    image = Image.fromarray((sheet.permute(1, 2, 0) * 255).round().byte().numpy())
    times = max(ENLARGED // drawn.size, 1)
    image.resize((image.width * times, image.height * times), Image.NEAREST).save(path)
    print("rows: masks, " + ", ".join(rows))
    print("\n".join(condition.prompt for condition in layouts.conditions))


if __name__ == "__main__":
    main()
