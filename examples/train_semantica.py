"""Train Semantica on your own pages
=================================

A Semantica model of your own pages, a data set from one image a class, and an adapter.

Arguments: a Stable Diffusion pipeline for the adapter, the number of steps, an image encoder. To
train on several GPUs, or to shard the model over them, write the options below as a recipe and
start `accelerate launch -m guidekit train RECIPE`; accelerate's configuration says how
(`accelerate config`: multi-GPU, or FSDP with version 2).
"""

# %% What to train on: a folder is a page. Here the pages are scenes, drawn and saved
import sys
from pathlib import Path

import torch
from torchvision.utils import save_image

import guidekit
from guidekit import Condition, Reference, load_reference
from guidekit.semantica import (
    AdapterOptions,
    SemanticaOptions,
    adapter_task,
    scene_items,
    semantica_task,
)
from guidekit.train import Loop, Options

backbone = sys.argv[1] if len(sys.argv) > 1 else "scenes"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 2000
encoder = sys.argv[3] if len(sys.argv) > 3 else "scenes-clip"

for item in scene_items(pages=20, per_page=4, size=64):
    folder = Path("mine", item.page)
    folder.mkdir(parents=True, exist_ok=True)
    item.open().save(folder / f"{item.key}.png")

# %% Encode every image once, keep pairs that are alike but no copies, train.
# For img2dataset's shards: source="shards", data="shards/", page="page_url". For DINOv2 the paper
# keeps cosines from 0.3 to 0.9; other encoders have another scale and keep all between the lowest
# and the highest 2% of pairs. low and high, or quantiles, say otherwise.
options = SemanticaOptions(variant="tiny", source="folder", data="mine", encoder=encoder)
loop = Loop(
    semantica_task(options, Path("runs/mine"), 32),
    Options(
        steps=steps,
        batch=16,
        lr=1e-3,
        decay="constant",
        weight_decay=0,
        eps=1e-12,
        ema=0.9999,
        log_every=1,
    ),
    Path("runs/mine/train"),
    quiet=True,
)
loop.run()
loop.export(Path("runs/mine/model"))
print("histogram of the filter: runs/mine/filter/histogram.png")

# %% Another image like a reference; on the command line
# guidekit sample --model runs/mine/model --plugin semantica --image ref.png
reference = Reference(item.open())
semantica = guidekit.make("semantica", w=0.5)
model = guidekit.load("runs/mine/model")
images = guidekit.draw(model, Condition(image=reference), [semantica], seeds=range(2), steps=4)
print(f"drew {len(images)} images of {images.shape[-1]}x{images.shape[-2]}")

# %% A data set from one image a class, without fine-tuning; on the command line
# guidekit sample --model runs/mine/model --plugin semantica --image-folder one/ --per-image 50
names = sorted(path.name for path in Path("mine").iterdir())[:3]
shown = [load_reference(next(Path("mine", name).iterdir())) for name in names]
conditions = [Condition(image=image) for image in shown for _ in range(2)]
images = guidekit.draw(model, conditions, [semantica], seeds=range(6), steps=4)
save_image(images, "data-set.png", nrow=2)  # a row a class
print(f"a data set of {len(images)} images in {len(names)} classes")

# %% Image tokens beside the words of a text-to-image backbone, trained on the same pages
adapter = AdapterOptions(backbone=backbone, source="folder", data="mine", encoder=encoder)
loop = Loop(
    adapter_task(adapter, Path("runs/adapter"), 64),
    Options(steps=steps, batch=8, lr=1e-4, log_every=1),
    Path("runs/adapter/train"),
    quiet=True,
)
loop.run()
loop.export(Path("runs/adapter/model"))
follow = guidekit.make("semantica", adapter="runs/adapter/model")
text = Condition("a red circle on a white background", image=reference)
images = guidekit.draw(guidekit.load(backbone), text, [follow], seeds=(0,), steps=4)
print(f"with words and image: {tuple(images.shape)}, {torch.isfinite(images).all()}")
