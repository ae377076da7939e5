"""Draws the README's images: masks, unguided, Zest, and Zest with Paint-with-Words.

python benchmarks/readme_pictures.py docs/layout.png
"""

import sys

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

import guidekit
from guidekit.registry import Registry
from guidekit.worlds import scenes
from guidekit.zoo.shipped import model_defaults
from layout import PAPER, held_out

FIRST, COUNT, ENLARGE = 40, 8, 2  # held-out scenes from number FIRST on, pixels per pixel


def colour_masks(plans: list[scenes.Scene]) -> Tensor:
    """Masks of each scene in the colours of their phrases on grey: (n, 3, 64, 64) in [0, 1]."""
    pictures = torch.full((len(plans), 3, 64, 64), 0.85)
    for picture, plan in zip(pictures, plans, strict=True):
        for thing, mask in zip(plan.things, scenes.draw(plan)[1], strict=True):
            colour = torch.tensor(scenes.COLOURS[thing.colour]) / 255
            picture[:, torch.from_numpy(mask)] = colour[:, None]
    return pictures


def main(path: str) -> None:
    """Saves the rows as one image and prints the prompts."""
    pipeline, defaults = guidekit.load("scenes"), model_defaults("scenes")
    layouts = held_out(COUNT, FIRST)
    make, tuned = Registry().make_guidance, defaults["plugin"]
    rows = {
        "unguided": [],
        "Zest": [make("zest", tuned["zest"])],
        "Zest + PwW": [make("pww", tuned["pww"]), make("zest", PAPER)],
    }
    pictures = [colour_masks(layouts.plans)]
    for guidances in rows.values():
        options = {"seeds": range(COUNT), "steps": defaults["steps"], "cfg": defaults["cfg"]}
        run = guidekit.sample(pipeline, layouts.conditions, guidances, **options)
        pictures.append(run.finish().images)
    sheet = make_grid(torch.cat(pictures), nrow=COUNT, padding=2, pad_value=1.0)
    image = Image.fromarray((sheet.permute(1, 2, 0) * 255).round().byte().numpy())
    image.resize((image.width * ENLARGE, image.height * ENLARGE), Image.NEAREST).save(path)
    print("rows: masks, " + ", ".join(rows))
    print("\n".join(plan.caption for plan in layouts.plans))


if __name__ == "__main__":
    main(sys.argv[1])
