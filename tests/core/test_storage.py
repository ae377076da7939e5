"""Weights in float8: gradients through diffusers' layerwise casting, and what cannot compute."""

import copy

import pytest
import torch

import guidekit
import tiny
from guidekit import Condition, GuidekitError, Sampling, Segment, box_mask
from guidekit_dps import Dps
from guidekit_zest import Zest

BOX = box_mask((0, 0, 0.5, 1))
RED = Condition("a red circle", segments=(Segment("circle", BOX),))
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def rounded():
    """A pipeline whose weights are those that float8 can hold, in float32."""
    pipe = tiny.sd_pipeline()
    for part in (pipe.unet, pipe.vae):
        twin = copy.deepcopy(part)
        twin.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=torch.float32)
        for own, narrow in zip(part.parameters(), twin.parameters(), strict=True):
            own.data = narrow.data.float()
    return pipe


@pytest.fixture(scope="module")
def stored(rounded):
    """The same weights, stored in float8 and cast layer by layer."""
    pipe = tiny.sd_pipeline()
    for name in ("unet", "vae"):
        part = copy.deepcopy(getattr(rounded, name))
        part.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=torch.float32)
        setattr(pipe, name, part)
    assert FLOAT8 in {weight.dtype for weight in pipe.unet.parameters()}
    return pipe


def drawn(pipe, guidance, **options):
    options = {"seeds": [5], "steps": 3, "cfg": 5.0, "calls": {"*": "split"}} | options
    return Sampling(pipe, RED, [guidance], **options).finish()


@pytest.mark.parametrize("guidance", [Zest(), Dps.example()], ids=["zest", "dps"])
def test_gradients_are_those_of_the_wide_weights(rounded, stored, guidance):
    found, true = (drawn(pipe, guidance) for pipe in (stored, rounded))
    assert found.account.acted(guidance.name)
    torch.testing.assert_close(found.latents, true.latents, rtol=1e-5, atol=1e-5)
    first, second = (run.account.rows[0]["grad_norm"] for run in (found, true))
    assert first == pytest.approx(second, rel=1e-5)
    assert FLOAT8 in {weight.dtype for weight in stored.unet.parameters()}


def test_checkpoints_are_refused(stored):
    with pytest.raises(GuidekitError, match="does not go with enable_layerwise_casting; leave one"):
        drawn(stored, Zest(), memory="low")


def test_weights_that_cannot_compute_are_refused_before_the_first_call():
    pipe = tiny.sd_pipeline()
    pipe.unet.to(FLOAT8)
    with pytest.raises(GuidekitError, match="are float8_e4m3fn, in which nothing can be computed"):
        Sampling(pipe, RED, [Zest()], steps=2)
    with pytest.raises(GuidekitError, match=r"call enable_layerwise_casting\(storage_dtype=torch"):
        with guidekit.attach(pipe, [Zest()], segments=RED.segments):
            pipe(RED.prompt, num_inference_steps=2)
