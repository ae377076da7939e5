"""Four knobs of ZestGuide
=======================

Four knobs of ZestGuide: number of guided steps, rate, layers, seed.

Each block changes one knob and prints the energy before and after; lower is closer to the masks.
"""

# %% A model, a layout, a function that draws
import sys

import torch
from torchvision.utils import save_image

import guidekit
from guidekit import Condition, Segment, box_mask

model = sys.argv[1] if len(sys.argv) > 1 else "objects"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20
pipeline = guidekit.load(model)
condition = Condition(
    "a panda and a crown on grass",
    segments=(
        Segment("panda", box_mask((0.05, 0.1, 0.5, 0.55))),
        Segment("crown", box_mask((0.5, 0.4, 0.95, 0.85))),
    ),
)


def draw(label: str, seed: int = 0, **options) -> guidekit.Sampling:
    """Draws one image and prints Zest's energy at its first and last guided step."""
    zest = guidekit.make("zest", **options)
    run = guidekit.sample(pipeline, condition, [zest], seeds=[seed], steps=steps, cfg=4.0).finish()
    first, last = run.account.first_and_last("zest")
    print(f"{label:24} energy {first:.3f} -> {last:.3f}")
    return run


def sheet(name: str, runs: list[guidekit.Sampling]) -> None:
    """Saves the images of several runs side by side."""
    save_image(torch.cat([run.images for run in runs]), f"{name}.png")


# %% The share of the steps that are guided
sheet("stop", [draw(f"stop {stop:g}", stop=stop) for stop in (0.1, 0.25, 0.5, 1.0)])

# %% The rate: how far a latent number may move at a step
sheet("scale", [draw(f"scale {scale:g}", scale=scale) for scale in (0.1, 0.3, 1.0)])

# %% The layers: maps of one resolution or of all
grids = sorted({max(g) for g in guidekit.Denoiser(pipeline).layout_grids()}, reverse=True)
sheet("layers", [draw(f"maps of long side {side}", resolutions=str(side)) for side in grids])

# %% The seed
sheet("seeds", [draw(f"seed {seed}", seed) for seed in range(3)])
