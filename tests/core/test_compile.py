"""A compiled denoiser: every plugin works on it, and its taps hold the guards of torch.compile."""

import pytest
import torch
import torch._dynamo

import tiny
from guidekit import Condition, Sampling, Segment, attach, box_mask
from guidekit_autoguidance import Autoguidance
from guidekit_cfg import ClassifierFree
from guidekit_multidiffusion import MultiDiffusion
from guidekit_pag import PerturbedAttention
from guidekit_pww import PaintWithWords
from guidekit_seg import SmoothedEnergy
from guidekit_slg import SkipLayer
from guidekit_zest import Zest

pytestmark = pytest.mark.slow

SEGMENTS = (Segment("red circle", box_mask((0, 0, 0.5, 1))),)
RED = Condition("a red circle and a blue square", segments=SEGMENTS)
SPLIT = {"null+cond*": "split", "null+cond*+pag": "batched"}

PLUGINS = {
    "none": list,
    "pww": lambda: [PaintWithWords()],
    "pag": lambda: [PerturbedAttention()],
    "seg": lambda: [SmoothedEnergy()],
    "slg": lambda: [SkipLayer.example()],
    "autoguidance": lambda: [Autoguidance()],
    "zest": lambda: [Zest(stop=1.0)],
    "cfg": lambda: [ClassifierFree(rescale=0.7)],
    "multidiffusion": lambda: [MultiDiffusion()],
    "all": lambda: [PaintWithWords(), Zest(stop=1.0), PerturbedAttention()],
}
# Kinds of denoiser calls: with split calls null has one of its own.
KINDS = {"zest": 2}


class Graphs:
    """A backend of torch.compile that runs what it is given and counts it."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph


def compiled(how):
    torch._dynamo.reset()
    pipe, graphs = tiny.sd_pipeline(), Graphs()
    if how == "in place":
        pipe.unet.compile(backend=graphs)
    else:
        pipe.unet = torch.compile(pipe.unet, backend=graphs)
    return pipe, graphs


def run(pipe, name, steps=4, **options):
    given = {"seeds": [5], "steps": steps, "cfg": 5.0, "calls": SPLIT} | options
    return Sampling(pipe, RED, PLUGINS[name](), **given)


@pytest.mark.parametrize("name", PLUGINS)
def test_a_run_compiles_a_graph_for_each_kind_of_call(name):
    """And none after the second step, nor in a second run; the images are those without."""
    expected = run(tiny.sd_pipeline(), name).finish().latents
    pipe, graphs = compiled("in place")
    sampling = run(pipe, name)
    counts = [graphs.count for _ in sampling]
    torch.testing.assert_close(sampling.latents, expected, rtol=1e-4, atol=1e-4)
    assert len(set(counts[1:])) == 1
    assert counts[-1] <= KINDS.get(name, 1)
    run(pipe, name).finish()
    assert graphs.count == counts[-1]


@pytest.mark.parametrize("name", ["none", "zest", "slg"])
def test_a_module_that_compile_returned(name):
    expected = run(tiny.sd_pipeline(), name, steps=2).finish().latents
    pipe, graphs = compiled("outside")
    found = run(pipe, name, steps=2).finish().latents
    assert graphs.count
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["in place", "outside"])
@pytest.mark.parametrize("name", ["zest", "pww"])
def test_attached(name, how):
    def draw(pipe):
        generator = [torch.Generator().manual_seed(5)]
        with attach(pipe, PLUGINS[name](), segments=SEGMENTS):
            return pipe(
                RED.prompt,
                num_inference_steps=3,
                guidance_scale=5.0,
                generator=generator,
                output_type="latent",
            ).images

    expected = draw(tiny.sd_pipeline())
    pipe, graphs = compiled(how)
    before = dict(vars(pipe.unet))
    torch.testing.assert_close(draw(pipe), expected, rtol=1e-3, atol=1e-3)
    assert graphs.count
    assert vars(pipe.unet).keys() == before.keys()


def compiled_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ["none", "zest", "all"])
def test_a_run_compiles_for_itself(name):
    """`compile=`: a graph for each kind of call, none after the second step or in another run."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe = tiny.sd_pipeline()
    expected, before = run(pipe, name).finish().latents, dict(vars(pipe.unet))
    counts = []
    for _ in range(2):
        sampling = run(pipe, name, compile="aot_eager")
        counts += [compiled_graphs() for _ in sampling]
        torch.testing.assert_close(sampling.latents, expected, rtol=1e-4, atol=1e-4)
        assert vars(pipe.unet).keys() == before.keys()
    assert 0 < counts[1] <= KINDS.get(name, 1)
    assert len(set(counts[1:])) == 1
    run(pipe, name).finish()
    assert compiled_graphs() == counts[-1]


def test_two_runs_share_what_is_compiled_and_the_user_keeps_his_own():
    torch._dynamo.reset()
    pipe = tiny.sd_pipeline()
    one, other = (iter(run(pipe, "none", compile="eager")) for _ in range(2))
    next(one), next(other)
    one.close()
    assert pipe.unet._compiled_call_impl is not None
    other.close()
    assert "_compiled_call_impl" not in vars(pipe.unet)
    pipe, graphs = compiled("in place")
    own = pipe.unet._compiled_call_impl
    run(pipe, "none", compile="eager").finish()
    assert pipe.unet._compiled_call_impl is own
    assert graphs.count == 1
