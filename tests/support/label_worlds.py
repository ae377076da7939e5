"""A tiny pipeline of label maps, its maps, and shots in a folder."""

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel

from guidekit import LabelMap, LabelSet
from guidekit.affinity import Affinity
from guidekit.affinity.matrix import parse_hand
from guidekit.images import save_image, to_image
from guidekit.synthesis.pipeline import MapsPipeline

PARK = LabelSet("park", ("grass", "water", "rock"))
GARDEN = LabelSet("garden", ("lawn", "pond"))
SIDE = 16


def maps_pipeline(labels: LabelSet = PARK) -> MapsPipeline:
    """Two levels at 16x16 with random weights, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=SIDE,
            in_channels=3 + len(labels),
            out_channels=3,
            block_out_channels=(16, 32),
            layers_per_block=1,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
    )
    pipeline = MapsPipeline(unet.eval(), scheduler, labels)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def label_map(labels: LabelSet = PARK, seed: int = 0, side: int = SIDE) -> LabelMap:
    """A map of random blocks of all classes."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(len(labels), (side // 4, side // 4), generator=generator)
    small.view(-1)[: len(labels)] = torch.arange(len(labels))
    return LabelMap(small.repeat_interleave(4, 0).repeat_interleave(4, 1), labels)


def affinity(hand: dict, source: LabelSet = PARK, target: LabelSet = GARDEN) -> Affinity:
    """An affinity by hand."""
    return Affinity(source, target, {}, parse_hand(hand, source, target))


def write_shots(folder: Path, labels: LabelSet = GARDEN, count: int = 3, side: int = SIDE) -> Path:
    """Shots as `read_shots` reads them."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    replace(labels).save(folder / "classes.json")
    for i in range(count):
        own = label_map(labels, i, side)
        pixels = torch.rand(3, side, side, generator=torch.Generator().manual_seed(i))
        save_image(to_image(pixels), folder / "images" / f"{i}.png")
        save_image(own.indexed(), folder / "masks" / f"{i}.png")
    return folder
