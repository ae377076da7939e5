"""MapsPipeline: its own call and guidekit's, its files, and maps that it cannot draw."""

import json

import pytest
import torch

import guidekit
from guidekit import Condition, Denoiser, GuidekitError, LabelMap
from guidekit.backbones.maps import MAP
from guidekit.evaluate.judge import load_judge, see
from guidekit.synthesis.data import WorldExamples
from guidekit.synthesis.pipeline import MapsPipeline
from guidekit.worlds import scenes
from label_worlds import GARDEN, PARK, label_map, maps_pipeline


@pytest.fixture(scope="module")
def pipe():
    return maps_pipeline()


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_unguided_is_bit_equal_to_the_pipelines_own_call(pipe, scale):
    maps = [label_map(seed=i) for i in range(2)]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    own = pipe(maps, scale, 3, generators, output_type="pt").images
    conditions = [Condition(map=m) for m in maps]
    found = guidekit.sample(pipe, conditions, seeds=[0, 1], steps=3, cfg=scale).finish()
    assert torch.equal(found.images, own)
    other = pipe(maps[::-1], scale, 3, [torch.Generator().manual_seed(i) for i in range(2)], "pt")
    assert not torch.equal(other.images, own)


def test_a_saved_pipeline_is_the_same_with_its_label_set(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "labels.json").read_text())["classes"] == list(PARK.classes)
    again = guidekit.load(str(tmp_path))
    assert isinstance(again, MapsPipeline)
    assert again.labels == PARK
    images = [
        p(label_map(), 1.5, 2, torch.Generator().manual_seed(0), "pt").images for p in (pipe, again)
    ]
    assert torch.equal(*images)
    (tmp_path / "labels.json").unlink()
    with pytest.raises(GuidekitError, match="has no labels.json"):
        guidekit.load(str(tmp_path))


def test_the_null_is_a_map_of_zeros_and_windows_see_their_part(pipe):
    denoiser = Denoiser(pipe)
    own = label_map()
    assert not denoiser.text(["", ""], (16, 16), null=True).given[MAP].any()
    text = denoiser.text([own], (16, 16))
    assert torch.equal(text.given[MAP][0], own.one_hot())
    window = text.windowed((4, 8, 8, 8)).given[MAP]
    assert torch.equal(window[0], own.one_hot()[:, 4:12, 8:16])
    larger = LabelMap(own.ids.repeat_interleave(3, 0).repeat_interleave(3, 1), PARK)
    assert torch.equal(denoiser.text([larger], (16, 16)).given[MAP], text.given[MAP])


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (Condition(), "follows a label map: give --map MAP.png"),
        (Condition(map=label_map(GARDEN)), r"'garden' with 2 classes .* 'park' with 3 \(grass"),
        (Condition(prompt="a park", map=label_map()), "reads no prompt; leave it out"),
        (
            Condition(map=LabelMap(label_map().ids[:8], PARK)),
            "label map is 16x8, of another",
        ),
        (Condition(label=1, map=label_map()), "has no class labels"),
    ],
)
def test_what_it_cannot_draw_is_said_in_one_line(pipe, condition, words):
    with pytest.raises(GuidekitError, match=words) as caught:
        guidekit.sample(pipe, [condition], seeds=[0], steps=1).finish()
    assert "\n" not in str(caught.value)


def test_a_label_set_of_another_length_is_refused(pipe):
    with pytest.raises(GuidekitError, match="reads maps of 3 classes; its label set has 2"):
        MapsPipeline(pipe.unet, pipe.scheduler, GARDEN)


def test_the_built_in_model_draws_what_its_maps_say():
    """By the judge of its world, which never guided; grounds are no classes of the judge's."""
    _, maps = WorldExamples("dense", 32).shown(4)
    conditions = [Condition(map=own) for own in maps]
    run = guidekit.sample("scenes-maps", conditions, seeds=range(4), steps=8)
    found = see(load_judge(), run.finish().images).classes
    wanted = torch.stack([own.ids for own in maps]).numpy() + 1
    things = wanted <= len(scenes.CLASSES)
    assert (found[things] == wanted[things]).mean() > 0.9
    assert (found[~things] == 0).mean() > 0.9
