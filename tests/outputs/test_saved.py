"""A run from Python: as PIL has it, as files, and in a notebook."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import guidekit
from guidekit.__main__ import main

PROMPT = "a red circle on white"


def disc():
    """A mask (24, 24) of a disc."""
    return np.fromfunction(lambda y, x: (x - 9) ** 2 + (y - 7) ** 2 < 30, (24, 24))


@pytest.fixture(scope="module")
def drawn(model):
    """A run of two images in two steps."""
    condition = guidekit.Condition(PROMPT, segments=[guidekit.Segment("red circle", disc())])
    zest = guidekit.make("zest", stop=1.0)
    pipe = guidekit.load(str(model), "cpu")
    return guidekit.sample(pipe, condition, [zest], seeds=(4, 2), steps=2, cfg=3.0).finish()


def test_images_as_pil_has_them(drawn):
    assert len(drawn.pil) == 2
    for image, pixels in zip(drawn.pil, drawn.images, strict=True):
        wanted = (pixels.permute(1, 2, 0).numpy() * 255).round().astype("uint8")
        assert np.array_equal(image, wanted)


def test_a_saved_run_is_drawn_again_from_its_run_json(drawn, tmp_path):
    folder = drawn.save(tmp_path / "kept")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    assert names == {
        "2.png",
        "4.png",
        "attention/2-0.png",
        "attention/4-0.png",
        "masks/0-red-circle.png",
        "overlay/2.png",
        "overlay/4.png",
        "run.json",
    }
    words = ["sample", "--config", str(folder / "run.json"), "--out", str(tmp_path / "again")]
    done = CliRunner().invoke(main, [*words, "--no-compare", "--quiet"])
    assert done.exit_code == 0, done.stderr
    for seed in (2, 4):
        pair = [np.asarray(Image.open(f / f"{seed}.png")) for f in (folder, tmp_path / "again")]
        assert np.array_equal(*pair)
    record = json.loads((folder / "run.json").read_text())["record"]
    assert record["energy"]["zest"]
    assert record["finished"] == [4, 2]
    carried = json.loads(Image.open(folder / "4.png").text["guidekit"])["files"]
    mask = base64.b64decode(carried["masks/0-red-circle.png"])
    assert np.array_equal(Image.open(io.BytesIO(mask)), 255 * disc().astype("uint8"))
    assert drawn.save(folder) == tmp_path / "kept-2"  # nothing is overwritten


def test_what_settings_cannot_say_is_noted(model, tmp_path):
    conditions = [guidekit.Condition(PROMPT), guidekit.Condition("a blue square")]
    run = guidekit.sample(guidekit.load(str(model)), conditions, seeds=(0, 1), steps=1).finish()
    notes = json.loads((run.save(tmp_path / "o") / "run.json").read_text())["record"]["notes"]
    assert any("conditions of their own" in note for note in notes)


def test_what_decided_the_images_and_is_not_written_is_noted(model, tmp_path):
    pipe = guidekit.load(str(model))
    plain = guidekit.sample(pipe, PROMPT, seeds=0, steps=1)
    noise = torch.randn(1, *plain.run.latent_shape, generator=torch.Generator().manual_seed(3))
    run = guidekit.sample(pipe, PROMPT, seeds=0, steps=1, latents=noise).finish()
    notes = json.loads((run.save(tmp_path / "o") / "run.json").read_text())["record"]["notes"]
    assert [note for note in notes if "latents of the run" in note]


def test_a_notebook_shows_images_masks_and_maps(drawn):
    html = drawn._repr_html_()
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert len(sources) == 2 * 3
    assert "http" not in html
    first = Image.open(io.BytesIO(base64.b64decode(sources[0])))
    factor = first.width // drawn.pil[0].width
    assert np.array_equal(np.asarray(first)[::factor, ::factor], drawn.pil[0])
    for shown in (PROMPT, "energy of zest", "attention of red circle"):
        assert shown in html


def test_before_it_is_drawn(model, tmp_path):
    prompt = "<script>alert(1)</script>"
    run = guidekit.sample(guidekit.load(str(model)), prompt, seeds=(0, 1), steps=1)
    html = run._repr_html_()
    assert "2 images, not drawn yet" in html
    assert "<script>" not in html
    whole = (lambda: run.images, lambda: run.latents, lambda: run.pil)
    for read in (*whole, lambda: run.save(tmp_path / "o")):
        with pytest.raises(guidekit.GuidekitError, match="nothing is drawn yet"):
            read()
    assert not (tmp_path / "o").exists()
