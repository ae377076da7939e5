"""Images of masks and maps, and the page of a run."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from guidekit import images as pictures
from guidekit.cli.report import write_report

EVIL = "<script>alert('x')</script> & \"quotes\""


def test_pictures_are_rounded_as_diffusers_does():
    from diffusers.image_processor import VaeImageProcessor

    picture = torch.rand(3, 6, 4, generator=torch.Generator().manual_seed(0))
    theirs = VaeImageProcessor.numpy_to_pil(picture.permute(1, 2, 0).numpy()[None])[0]
    assert np.array_equal(np.array(pictures.to_image(picture)), np.array(theirs))


def test_enlarged_pixels_stay_crisp():
    image = Image.fromarray(np.array([[0, 255]], np.uint8))
    large = np.array(pictures.enlarge(image, 8))
    assert large.shape == (4, 8)
    assert (large[:, :4] == 0).all()
    assert (large[:, 4:] == 255).all()
    assert pictures.enlarge(image, 2) is image


def test_a_grid():
    images = [Image.new("RGB", (4, 2), colour) for colour in ("red", "lime", "blue")]
    sheet = pictures.grid(images, columns=2, gap=1)
    assert sheet.size == (9, 5)
    assert sheet.getpixel((0, 0)) == (255, 0, 0)
    assert sheet.getpixel((5, 0)) == (0, 255, 0)
    assert sheet.getpixel((0, 3)) == (0, 0, 255)
    assert sheet.getpixel((4, 0)) == (255, 255, 255)


def test_masks_are_outlined_in_their_colours():
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    drawn = pictures.overlay(Image.new("RGB", (256, 256)), [mask])
    assert drawn.getpixel((0, 128)) == pictures.colour(0)  # the edge
    assert drawn.getpixel((200, 128)) == (0, 0, 0)  # outside
    inside = drawn.getpixel((60, 128))
    assert 0 < inside[0] < pictures.colour(0)[0]


def test_heat_maps_share_their_scale():
    before, after = torch.zeros(4, 4), torch.zeros(4, 4)
    before[0, 0], after[0, 0] = 0.5, 1.0
    image = pictures.heat_pair(before, after)
    assert image.getpixel((0, 0)) != image.getpixel((260, 0)) == pictures.HEAT[-1]
    assert image.getpixel((255, 255)) == pictures.HEAT[0]
    assert pictures.heat_map(torch.full((2, 2), float("nan"))).getpixel((0, 0)) == pictures.HEAT[0]


class Page(HTMLParser):
    """Collects tags, links and text, and checks that tags close in order."""

    VOID = {"meta", "img", "rect", "polyline"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def folder(tmp_path):
    """An out folder whose every text tries to be markup."""
    rows = [
        {"plugin": EVIL, "step": i, "repeat": 0, "energy": [2.0 - i, None, 1.0]} for i in range(3)
    ]
    run = {
        "sample": {"model": EVIL, "prompt": EVIL, "negative": EVIL, "seeds": [0, 1, 2]},
        "plugin": {EVIL: {"option": EVIL}},
        "segment": [
            {"phrase": EVIL, "box": [0, 0, 0.5, 1], "strength": 0.5},
            {"phrase": "b", "mask": "masks/1-b.png", "strength": 1.0},
        ],
        "record": {
            "status": "stopped",
            "finished": [0],
            "seconds": 1.5,
            "notes": [EVIL],
            "account": rows,
            "versions": {"torch": EVIL},
            "machine": {"gpu": None},
            "scheduler": EVIL,
            "model": {"hash": None},
            "sites": {EVIL: [EVIL]},
            "tokens": [{"phrase": EVIL, "columns": [1], "tokens": [EVIL]}],
        },
    }
    maps = ("attention/0-0.png", "attention/0-1.png")
    for name in ("0.png", "unguided/0.png", "overlay/0.png", "masks/1-b.png", *maps):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "run.json").write_text(json.dumps(run))
    return tmp_path


def test_a_page_shows_everything_and_escapes_it(folder):
    page = Page(write_report(folder).read_text())
    assert "script" not in page.tags
    assert page.text.count(EVIL) >= 10
    assert {"0.png", "unguided/0.png", "attention/0-1.png", "masks/1-b.png"} <= set(page.links)
    assert page.tags.count("polyline") == 4  # the mean and three images
    assert "1 of 3 images, stopped" in page.text
    assert "strength 0.5" in page.text


def test_a_model_that_reads_an_image_follows_it_unguided_too(folder):
    run = json.loads((folder / "run.json").read_text())
    assert "unguided" in Page(write_report(folder).read_text()).text
    run["record"]["reads_image"] = True
    (folder / "run.json").write_text(json.dumps(run))
    text = Page(write_report(folder).read_text()).text
    assert "without guidance; it follows the reference too" in text
    assert "unguided" not in text


def test_links_are_relative_and_exist(folder):
    page = Page(write_report(folder).read_text())
    assert page.links
    assert all((folder / link).is_file() for link in page.links)


def test_a_page_without_pictures(folder):
    run = json.loads((folder / "run.json").read_text())
    run["plugin"], run["segment"], run["record"]["account"] = {}, [], []
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "0.png").unlink()
    (folder / "overlay/0.png").unlink()
    (folder / "unguided/0.png").unlink()
    page = Page(write_report(folder).read_text())
    assert "none finished" in page.text
    assert "svg" not in page.tags
