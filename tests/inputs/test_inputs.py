"""What users pass from Python: texts, names, numbers, images; and what is refused in words."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import guidekit
from guidekit import Condition, GuidekitError, Segment, attach, box_mask, make
from guidekit.__main__ import main
from guidekit.cli.plan import make_plan
from guidekit.cli.settings import make_settings
from guidekit.testing import sd_pipeline
from guidekit.toolbox import to_image
from guidekit.zoo.shipped import DEFAULT
from guidekit_pag import PerturbedAttention
from guidekit_zest import Zest

LEFT = np.zeros((8, 8), np.uint8)
LEFT[:, :4] = 255
BOX = (0.0, 0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def pipe():
    return sd_pipeline()


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("masks") / "left.png"
    Image.fromarray(LEFT).save(path)
    return path


@pytest.mark.parametrize("kind", ["image", "array", "bools", "tensor", "path", "text", "box"])
def test_a_mask_is_whatever_shows_one(kind, mask_file):
    given = {
        "image": Image.fromarray(LEFT),
        "array": LEFT / 255,
        "bools": LEFT > 0,
        "tensor": torch.from_numpy(LEFT / 255),
        "path": mask_file,
        "text": str(mask_file),
        "box": BOX,
    }[kind]
    segment = Segment("red circle", given)
    assert guidekit.toolbox.resize_mask(segment.mask, 2, 2).tolist() == [[1, 0], [1, 0]]
    assert segment.box == (BOX if kind == "box" else None)


def test_a_prompt_a_name_and_a_number_are_enough(pipe):
    short = guidekit.sample(pipe, "a red circle", "pag", seeds=3, steps=2).finish()
    long = guidekit.sample(
        pipe, Condition("a red circle"), [PerturbedAttention()], seeds=[3], steps=2
    ).finish()
    assert torch.equal(short.images, long.images)


def test_a_scheduler_by_name_and_seeds_as_text(pipe):
    sampling = guidekit.sample(pipe, "a", seeds="0-1", steps=1, scheduler="euler")
    assert sampling.seeds == [0, 1]
    assert type(sampling.run.scheduler).__name__ == "EulerDiscreteScheduler"


def test_attach_takes_a_name(pipe):
    with attach(pipe, "pag") as attached:
        pipe("a red circle", num_inference_steps=1, output_type="np")
    assert attached.account.acted("pag")


REFUSED = [
    (lambda p: guidekit.sample(p, 3.5), "a condition is a prompt, a class or"),
    (lambda p: guidekit.sample(p, True), "a condition is a prompt, a class or"),
    (lambda p: guidekit.sample(p, "a", 3), "guidances are objects or names, not int"),
    (lambda p: guidekit.sample(p, "a", [3]), "a guidance is an object such as"),
    (
        lambda p: guidekit.sample(p, "a", "zesty"),
        r"no plugin 'zesty' \(the nearest is zest\); there",
    ),
    (
        lambda p: guidekit.sample(p, "a", seed=3),
        r"no option 'seed' \(the nearest is seeds\); it has",
    ),
    (lambda p: guidekit.draw(p, "a", seed=3), r"no option 'seed' \(the nearest is seeds\); it has"),
    (lambda p: guidekit.sample(p, "a", seeds="x"), "write a range such as 0-7"),
    (lambda p: guidekit.sample(p, "a", seeds=1.5), "seeds must be whole numbers"),
    (lambda p: guidekit.sample(p, "a", seeds=[0, 0]), "a seed occurs twice"),
    (lambda p: guidekit.sample(p, ["a", "b"], seeds=[0]), "2 conditions for 1 seeds"),
    (lambda p: guidekit.sample(p, "a", scheduler=3), "a scheduler is one of diffusers"),
    (lambda p: guidekit.sample(p, "a", [z := PerturbedAttention(), z]), "pag is given twice"),
    (lambda p: guidekit.sample(3, "a"), "a model is a diffusers pipeline"),
    (lambda p: guidekit.sample("nowhere", "a"), "no model 'nowhere'"),
    (lambda p: make("zest", scal=2), "zest has no option 'scal'"),
    (lambda p: Segment(3, BOX), "a segment's phrase is a text, not int"),
    (lambda p: Segment("a", object()), "a mask is a tensor or array"),
    (lambda p: Segment("a", "nowhere.png"), "no such file"),
    (lambda p: Condition(3), "a condition's prompt is a text, not int"),
    (lambda p: Condition("a", label=1.5), "label is a whole number"),
    (lambda p: Condition("a", segments=["b"]), "segments are guidekit.Segment"),
    (lambda p: Condition("a", image=3), "a reference is an image"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[m[:24] for _, m in REFUSED])
def test_the_rest_is_refused_in_words(pipe, call, message):
    with pytest.raises(GuidekitError, match=message):
        call(pipe)


def test_python_and_the_command_line_draw_the_same_bytes(tmp_path):
    words = ["--plugin", "pww", "--plugin", "zest", "--prompt", "a cat on grass"]
    words += ["--segment", "cat=0,0,0.5,1", "--seeds", "7", "--steps", "2", "--no-compare"]
    run = CliRunner().invoke(main, ["sample", *words, "--out", str(tmp_path / "o"), "--json"])
    folder = json.loads(run.stdout)["folder"]
    condition = Condition("a cat on grass", segments=[Segment("cat", BOX)])
    # The faster way is measured where it is not given, and two ways round differently.
    calls = json.loads(Path(folder, "run.json").read_text())["record"]["calls"]
    options = {"seeds": 7, "steps": 2, "calls": calls}
    drawn = guidekit.sample(DEFAULT, condition, ["pww", "zest"], **options).finish()
    (image,) = drawn.images
    with Image.open(f"{folder}/7.png") as shown:
        assert shown.tobytes() == to_image(image).tobytes()


@pytest.mark.parametrize(
    ("zest", "expected"),
    [
        (Zest(scale=1.0), (1.0, 0.75, "power4")),  # the default, but given
        (make("zest"), (0.75, 0.75, "power4")),
        (make("zest", preset="paper"), (1.0, 0.5, "bce")),
        (make("zest", preset="like-sd14", stop=0.25), (0.3, 0.25, "bce")),
    ],
)
def test_tuned_values_fill_what_was_not_given(zest, expected):
    before = (zest.scale, zest.stop, zest.loss)
    condition = Condition("a red circle", segments=[Segment("red circle", box_mask(BOX))])
    (own,) = guidekit.sample(guidekit.load("scenes"), condition, [zest]).guidances
    assert (own.scale, own.stop, own.loss) == expected
    assert (zest.scale, zest.stop, zest.loss) == before  # the user's object stays as it was


def test_a_preset_on_the_command_line_is_not_mixed_with_tuned_values():
    settings = make_settings({}, {"plugin": ("zest",), "set": ("zest.preset=paper",)})
    (zest,) = make_plan(settings).guidances
    assert (zest.scale, zest.stop, zest.loss) == (1.0, 0.5, "bce")
