"""Plugins on a model of label maps: those that need no prompt act, the others refuse."""

import pytest
import torch

import guidekit
from guidekit import Condition, GuidekitError
from guidekit.registry import Registry
from label_worlds import label_map, maps_pipeline

full = pytest.mark.full
FEW = ["apg", "pag"]
MORE = ["adaptive", "autoguidance", "cfg", "clip", "fewshot", "fk", "ilvr", "red-diff", "reno"]
MORE += ["seg", "slg"]
OF_TEXT = ["attend-and-excite", "multidiffusion", "pww", "semantica", "zest"]


def draw(pipe, *guidances, image=None, particles=1):
    """Images for two maps, of `particles` each."""
    own = [
        Condition(map=label_map(seed=i), image=image) for i in range(2) for _ in range(particles)
    ]
    options = {"particles": particles, "eta": float(particles > 1)}
    seeds = range(len(own))
    return guidekit.sample(pipe, own, guidances, seeds=seeds, steps=3, cfg=2.0, **options).finish()


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(n, marks=full) for n in MORE)])
def test_a_plugin_acts(name):
    cls, pipe = Registry().guidance_class(name), maps_pipeline()
    image = cls.example_condition().image if cls.reads_image else None
    particles = 2 if cls.grouped or cls.overrides("resample") else 1
    found = draw(pipe, cls.example(), image=image, particles=particles)
    plain = draw(pipe, particles=particles)
    assert torch.isfinite(found.images).all()
    # Resampling among two particles may leave all of them.
    assert name == "fk" or not torch.equal(found.images, plain.images)


@pytest.mark.parametrize("name", OF_TEXT)
def test_a_plugin_of_texts_says_so(name):
    example = Registry().guidance_class(name).example()
    with pytest.raises(GuidekitError, match="needs a prompt that pixels attend to"):
        draw(maps_pipeline(), example)
