"""Guidance with offloaded models: the same images; accelerate's and diffusers' hooks stay.

The computing device is the CPU here as well, so that the hooks run, and move weights, everywhere.
"""

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload
from diffusers.hooks import HookRegistry

import tiny
from drawing import draw
from guidekit import Condition, Segment, attach, box_mask, sample
from guidekit_pag import PerturbedAttention
from guidekit_zest import Zest

SHORT = {"seeds": (5,), "num_inference_steps": 2}
HOOKS = {AlignDevicesHook, CpuOffload, HookRegistry}
CPU = torch.device("cpu")
SEGMENTS = (Segment("red circle", box_mask((0, 0, 0.5, 1))),)


def sequential(pipe):
    """What enable_sequential_cpu_offload does to a model.

    On a CPU the pipeline's own method fails without guidekit too: accelerate 1.15 cannot put the
    buffers of the text encoder back on the device "meta".
    """
    for model in (pipe.unet, pipe.vae):
        accelerate.cpu_offload(model, CPU)


OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": sequential,
    "group": lambda pipe: pipe.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
    ),
}


def hooks(pipe):
    """What offloading put on every module, and where the weights lie.

    Types, because pipelines make the hooks of whole models anew at the end of every call.
    """
    found = {}
    for part in ("unet", "vae", "text_encoder"):
        for name, module in getattr(pipe, part).named_modules():
            own = [vars(module).get(key) for key in ("_hf_hook", "_diffusers_hook", "forward")]
            devices = [p.device for p in module.parameters()]
            found[part, name] = (*map(type, own), hasattr(own[-1], "patch"), devices)
    return found


@pytest.fixture(scope="module")
def expected():
    """Bare and guided images without offloading."""
    pipe = tiny.sd_pipeline()
    with attach(pipe, guidances(), segments=SEGMENTS):
        guided = draw(pipe, **SHORT)
    return draw(pipe, **SHORT), guided


def guidances():
    return [Zest(stop=1.0), PerturbedAttention()]


@pytest.mark.parametrize("kind", OFFLOADS)
def test_attached(expected, kind):
    pipe = tiny.sd_pipeline()
    OFFLOADS[kind](pipe)
    bare, guided = expected
    assert torch.equal(draw(pipe, **SHORT), bare)
    before = hooks(pipe)
    with attach(pipe, guidances(), segments=SEGMENTS):
        assert torch.equal(draw(pipe, **SHORT), guided)
    assert hooks(pipe) == before
    assert HOOKS & {kind for own in before.values() for kind in own[:2]}


def test_the_own_loop(expected):
    pipe = tiny.sd_pipeline()
    OFFLOADS["model"](pipe)
    before = hooks(pipe)
    drawn = sample(
        pipe,
        Condition("a red circle", "blue", SEGMENTS),
        guidances(),
        seeds=(5,),
        steps=2,
        cfg=5.0,
        height=32,
        width=48,
    ).finish()
    assert torch.equal(drawn.images, expected[1])
    assert hooks(pipe) == before
