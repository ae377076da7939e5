"""Tiny random Semantica: an encoder of 8x8 patches, a UViT of 16x16 images, their pipeline."""

import functools
import json

import torch
from PIL import Image

from guidekit.semantica.data import Encoding, write_pages
from guidekit.semantica.encode import ImageEncoder, from_timm
from guidekit.semantica.model import UViT
from guidekit.semantica.pipeline import SemanticaPipeline
from guidekit.semantica.schedule import SemanticaScheduler
from guidekit.semantica.sources import Item, numbered
from guidekit.testing.weights import frozen_model, randomised

SIZE = 16
UVIT = dict(
    sample_size=SIZE,
    patch_size=1,
    block_out_channels=(8, 16),
    layers_per_block=(1, 1),
    down_block_types=("conv",),
    attention_head_dim=8,
    cross_attention_dim=16,
    embedding_dim=16,
    norm_num_groups=4,
)


def encoder() -> ImageEncoder:
    """A vision transformer of one block: 4 patches and a class token of 16 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return from_timm(
            "vit_tiny_patch16_224",
            pretrained=False,
            img_size=SIZE,
            patch_size=8,
            embed_dim=16,
            depth=1,
            num_heads=2,
        )


def pipeline(**changes) -> SemanticaPipeline:
    """A whole pipeline; `changes` of the UViT's config."""
    unet = frozen_model(randomised(UViT(**UVIT | changes)))
    pipe = SemanticaPipeline(unet, SemanticaScheduler(image_size=SIZE), encoder())
    pipe.set_progress_bar_config(disable=True)
    return pipe


RECIPE = """
model = "small"
size = 16
[[stage]]
task = "semantica"
encoder = "{encoder}"
conditioning = "{conditioning}"
pages = 8
per_page = 3
low = -1.0
high = 1.0
steps = {steps}
batch = 4
lr = 2e-3
decay = "constant"
weight_decay = 0.0
eps = 1e-12
ema = 0.9999
warmup = 2
save_every = 2
log_every = 1
preview_every = 1000
"""


def write(path, encoder, steps=6, conditioning="tokens", **lines):
    """A recipe of a small training; lines are of its stage."""
    text = RECIPE.format(encoder=encoder, steps=steps, conditioning=conditioning)
    path.write_text(text + "".join(f"{k} = {v}\n" for k, v in lines.items()))
    return path


def losses(folder):
    """Step and loss of every row that the recipe logged below `folder`."""
    rows = (folder / "small/semantica/metrics.jsonl").read_text().splitlines()
    return [(json.loads(row)["step"], json.loads(row)["epsilon"]) for row in rows]


def encoded(items, encoder, folder, size=SIZE, facts=None, **how):
    """The store of items, or of parts; how: of `Encoding`."""
    parts = items if isinstance(items, list) else [numbered("items", lambda: items)]
    return write_pages(parts, Encoding(encoder, size, **how), folder, facts)


def numbers_of(store):
    """Numbers of all rows, in order."""
    return [int(n) for part in sorted(store.chunks) for rows, _ in store.files(part) for n in rows]


def pages_of(store):
    """The page of every row, in order."""
    return [
        int(n)
        for p in sorted(store.chunks)
        for _, file in store.files(p)
        for n in file.read("page")
    ]


def firsts(pages) -> list[int]:
    """For every row the first row of its page."""
    found = pages_of(pages)
    return [found.index(page) for page in found]


def all_pairs(episodes, which=0):
    """Every pair that the episodes may give, by the numbers of their rows."""
    index = episodes._index(which)
    return [pair for page in range(len(index)) for pair in index.pairs(page)]


def coloured(count, page):
    """Items of a page in colours of their own."""
    return [
        Item(page, f"{page}/{i}", functools.partial(Image.new, "RGB", (16, 16), (i, 90, 255 - i)))
        for i in range(count)
    ]
