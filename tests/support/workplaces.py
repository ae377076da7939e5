"""The files that tutorials and how-to pages name, in small: real classes with random weights.

`WORKPLACES[page]()` writes those of a page into the working folder.
"""

import json
import shutil
import sys
import tarfile
import tomllib
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file

import tiny
from guidekit import LabelSet, load_label_set
from guidekit.images import save_image
from guidekit.testing.conditioners import control_net, t2i_adapter
from guidekit.worlds import digits, scenes
from guidekit.zoo.shipped import ZOO
from ip_adapters import clip_tower, published
from label_worlds import GARDEN, label_map, write_shots
from lpips_weights import random_lpips
from pages import ROOT, blocks, python_blocks
from panoptic import write_mask2former, write_panoptic
from scene_files import write_scenes
from segformers import write_segformer


def picture(name, side=32):
    """A scene as an image file."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scenes.draw(scenes.scene(0), side)[0]).save(name)


def half(name):
    """A mask of the left half."""
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save(name)


def a_map(name, labels, side=32):
    """A label map in the numbers of a label set."""
    save_image(label_map(labels, side=side).indexed(), Path(name))


def your_model():
    tiny.sd_pipeline().save_pretrained("PATH_OR_HUB_ID")


def clip():
    tiny.sd_pipeline().save_pretrained("PATH")


def controls():
    your_model()
    pipe = tiny.sd_pipeline()
    control_net(pipe).save_pretrained("path/to/controlnet")
    t2i_adapter(pipe).save_pretrained("path/to/adapter")
    picture("edges.png")
    picture("map.png")
    half("left.png")
    a_map("m.png", load_label_set(ZOO / "scenes-maps/labels.json"), 64)


def captioned_tar(name, folder):
    """The images of a folder with their captions as a tar."""
    with tarfile.open(name, "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)


def extractor():
    """A DINOv2 of one layer."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained("dinov2-base")
    size = {"height": 28, "width": 28}
    BitImageProcessor(size=size, crop_size=size).save_pretrained("dinov2-base")


def evaluate():
    write_panoptic(Path())
    Path("images").rename("val2017")
    for name in ("RUN", "OTHER", "restored", "truth"):
        shutil.copytree("val2017", name)
    write_mask2former(Path("mask2former"))
    extractor()
    shutil.copytree(ZOO / "scenes-clip", "ViT-B-32")
    save_file(random_lpips()[1], "lpips.safetensors")
    Path("drawn").mkdir()
    drawn = write_scenes(Path("drawn"))
    Path("set").mkdir()
    captioned_tar("set/shard-003.tar", drawn)
    prompts = [file.read_text() for file in sorted(drawn.glob("*.txt"))]
    lines = [json.dumps({"tag": "single_object", "prompt": prompt}) + "\n" for prompt in prompts]
    Path("evaluation_metadata.jsonl").write_text("".join(lines))
    np.savez("real.npz", mu=np.zeros(8), sigma=np.eye(8))  # as pytorch-fid writes them


def few_labels():
    digits.write_shots("shots", 2)
    for i in range(12):
        pixels, _ = scenes.draw(scenes.scene(i), 32)
        for name, array in (("images", pixels), ("targets", pixels.mean(-1).astype(np.uint8))):
            Path("pairs", name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(f"pairs/{name}/{i}.png")
    shutil.copy("pairs/targets/0.png", "depth.png")


def label_maps():
    your_model()
    tiny.sd_pipeline().save_pretrained("path/to/model")
    control_net(tiny.sd_pipeline()).save_pretrained("path/to/sd-controlnet-seg")
    ade, shapes = load_label_set("ade20k-150"), load_label_set(ZOO / "scenes-maps/labels.json")
    write_segformer(Path("path/to/segformer-ade"), ade.classes)
    write_segformer(Path("path/to/segmenter"), shapes.classes)
    write_shots(Path("shots"), side=32, count=4)
    a_map("street.png", LabelSet("street", ade.classes[:9], first=1))
    a_map("park.png", GARDEN)
    a_map("scene.png", shapes)
    Path("MAPS").mkdir()
    a_map("MAPS/1.png", GARDEN)


def own_world():
    """The cut-outs that the page makes."""
    (text,) = python_blocks(ROOT / "docs/howto/own-world.md")
    exec(compile(text, "own-world.md", "exec"), {"__name__": "docs"})


def scale():
    """The page's plan in two steps, and the layout that it names."""
    (text,) = (
        text for language, text in blocks(ROOT / "docs/howto/scale.md") if language == "json"
    )
    Path("plan.json").write_text(text.replace('"steps": 30', '"steps": 2'))
    layout = {"prompt": "a cat on grass", "segments": [{"phrase": "cat", "box": [0, 0, 1, 1]}]}
    Path("kitchen.json").write_text(json.dumps(layout))


def semantica():
    your_model()
    picture("one_per_class/circle/0.png")
    picture("one_per_class/square/0.png")
    picture("ref.png")
    save_file(published(tiny.sd_pipeline().unet), "ip-adapter.safetensors")
    clip_tower().save_pretrained("CLIP_FOLDER")


def installed(monkeypatch):
    """What `pip install -e` does, of the plugin as the page has it."""
    folder = Path("guidekit-warm").resolve()
    (text,) = (t for t in python_blocks(ROOT / "docs/tutorial/first-plugin.md") if "hookimpl" in t)
    (folder / "guidekit_warm.py").write_text(text)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / "guidekit_warm-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1\n")
    lines = [f"{name} = {module}" for name, module in project["entry-points"]["guidekit"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[guidekit]", *lines]))
    monkeypatch.syspath_prepend(folder)
    # Of an earlier test, which had another folder.
    monkeypatch.delitem(sys.modules, "guidekit_warm", raising=False)


WORKPLACES = {
    "clip": clip,
    "controls": controls,
    "evaluate": evaluate,
    "few-labels": few_labels,
    "label-maps": label_maps,
    "own-world": own_world,
    "scale": scale,
    "semantica": semantica,
    "your-model": your_model,
}
