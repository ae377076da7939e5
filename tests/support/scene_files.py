"""Real scenes of the test split as a folder of images with their captions."""

from pathlib import Path

from guidekit.evaluate.label_maps import held_out
from guidekit.evaluate.rows import real_scenes

N = 12


def write_scenes(folder: Path) -> Path:
    """The first N as PNG, each beside the text of its caption."""
    plans = held_out(N)
    images = real_scenes(plans)
    for key, plan in zip(images.keys, plans, strict=True):
        images.image(key).save(folder / f"{int(key):08d}.png")
        (folder / f"{int(key):08d}.txt").write_text(plan.caption)
    return folder
