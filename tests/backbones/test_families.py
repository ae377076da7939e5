"""The own loop on every family of transformers: the bare pipeline's images, phrases, refusals."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from guidekit import (
    Condition,
    Denoiser,
    FeatureRead,
    Guidance,
    Sampling,
    Segment,
    box_mask,
)
from guidekit.backbones.loading import make_scheduler
from guidekit.backbones.tokens import segment_columns
from guidekit.errors import GuidekitError
from guidekit.testing import miniatures
from guidekit_pww import PaintWithWords
from guidekit_zest import Zest

SEGMENTS = (Segment("red circle", box_mask((0, 0, 0.5, 1))),)
RED = Condition("a red circle", "blue", SEGMENTS)
BLUE = Condition("a blue square", "", (Segment("square", box_mask((0, 0, 1, 0.5))),))
CLASSES = (Condition(label=207), Condition(label=3))
SEEDS = (5, 6)


@dataclass(kw_only=True)
class Features(Guidance):
    """Reads the first block."""

    graph = "features"

    def prepare(self, run):
        self.read = run.read(self, FeatureRead(("transformer_blocks.0",)))

    def energy(self, step):
        (self.found,) = step.cond.features(self.read).values()
        return self.found.float().mean((1, 2, 3))


@cache
def pipeline(family):
    return getattr(miniatures, f"{family}_pipeline")()


def bare(pipe, **options):
    """Images of the pipeline's own call, with a generator for each."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipe(generator=generators, num_inference_steps=3, output_type="pt", **options).images


def ours(pipe, conditions, guidances=(), **options):
    return Sampling(pipe, conditions, guidances, seeds=SEEDS, steps=3, **options).finish()


PROMPTS = {"prompt": ["a red circle", "a blue square"], "negative_prompt": ["blue", ""]}
SIZE = {"height": 32, "width": 48}


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_dit_is_the_bare_pipeline(cfg):
    pipe = pipeline("dit")
    expected = bare(pipe, class_labels=[207, 3], guidance_scale=cfg)
    assert torch.equal(ours(pipe, CLASSES, cfg=cfg).images, expected)


@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_pixart_is_the_bare_pipeline(monkeypatch, cls):
    pipe = pipeline("pixart")
    monkeypatch.setattr(pipe, "scheduler", cls.from_config(pipe.scheduler.config))
    expected = bare(pipe, guidance_scale=4.5, use_resolution_binning=False, **PROMPTS, **SIZE)
    shouted = Condition("A Red circle ", "blue", SEGMENTS)  # T5 is given small letters
    assert torch.equal(ours(pipe, [shouted, BLUE], **SIZE).images, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_sd3_is_the_bare_pipeline(monkeypatch, dynamic):
    pipe = pipeline("sd3")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    expected = bare(pipe, guidance_scale=7.0, **PROMPTS, **SIZE)
    assert torch.equal(ours(pipe, [RED, BLUE], **SIZE).images, expected)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True
        ),
    ],
)
def test_flux_is_the_bare_pipeline(monkeypatch, scheduler):
    pipe = pipeline("flux")
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    prompts = {"prompt": PROMPTS["prompt"]}
    expected = bare(pipe, guidance_scale=2.5, **prompts, **SIZE)
    assert torch.equal(ours(pipe, [RED, BLUE], embedded_cfg=2.5, **SIZE).images, expected)
    default = bare(pipe, **prompts, **SIZE)
    assert torch.equal(ours(pipe, [RED, BLUE], **SIZE).images, default)
    assert not torch.equal(default, expected)


@pytest.mark.parametrize("name", ["dpm++", "unipc", "flow-heun"])
def test_schedulers_by_name_are_flow_schedulers_where_the_model_needs_it(monkeypatch, name):
    pipe = pipeline("sd3")
    scheduler = make_scheduler(pipe, name)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    expected = bare(pipe, guidance_scale=7.0, **PROMPTS, **SIZE)
    assert torch.equal(ours(pipe, [RED, BLUE], **SIZE).images, expected)
    with pytest.raises(GuidekitError, match="'ddim' is not for flow models; there are deis, dpm"):
        make_scheduler(pipe, "ddim")
    with pytest.raises(GuidekitError, match="'flow-euler' is for flow models alone"):
        make_scheduler(pipeline("pixart"), "flow-euler")


def test_flux_with_true_classifier_free_guidance():
    """The pipeline calls its denoiser twice, the own loop once with both rows."""
    pipe = pipeline("flux")
    expected = bare(pipe, true_cfg_scale=3.0, **PROMPTS, **SIZE)
    assert (ours(pipe, [RED, BLUE], cfg=3.0, **SIZE).images - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["pixart", "sd3", "flux"])
@pytest.mark.parametrize("guidance", [Zest(stop=1.0), PaintWithWords()])
def test_layouts(family, guidance):
    """Guidance acts, and an image does not depend on its batch."""
    pipe = pipeline(family)
    guided = ours(pipe, [RED, BLUE], [guidance], **SIZE)
    assert guided.account.acted(guidance.name)
    assert not torch.equal(guided.images, ours(pipe, [RED, BLUE], **SIZE).images)
    alone = Sampling(pipe, BLUE, [guidance], seeds=[6], steps=3, **SIZE).finish()
    assert (alone.images[0] - guided.images[1]).abs().max() < 1e-4


COLUMNS = {"pixart": [1, 2], "flux": [1, 2], "sd3": [2, 3, 78, 79]}


@pytest.mark.parametrize("family", COLUMNS)
def test_phrases_have_columns(family):
    denoiser = Denoiser(pipeline(family))
    (columns,) = segment_columns(denoiser.tokenizers, RED)
    assert columns == COLUMNS[family]
    text = denoiser.text(["a red circle"], (32, 32))
    assert text.states.shape[1] == denoiser.text_length


def test_a_class_may_be_named():
    pipe = pipeline("dit")
    named = Sampling(pipe, Condition("goldfish"), steps=1)
    assert named.conditions[0] == Condition(label=1)
    with pytest.raises(GuidekitError, match="but the names of its classes, such as 'Tinca tinca'"):
        Sampling(pipe, Condition("a fox"), steps=1)


@pytest.mark.parametrize(
    "family, condition, options, message",
    [
        ("dit", Condition(), {}, "give label, from 0 to 999, not None"),
        ("dit", Condition(label=1000), {}, "from 0 to 999, not 1000"),
        ("dit", Condition(label=1, segments=SEGMENTS), {}, "reads no text"),
        ("dit", Condition(label=1), {"height": 32, "width": 48}, "square images"),
        ("sd3", Condition("red", label=1), {}, "no class labels"),
        ("sd3", RED, {"embedded_cfg": 3.0}, "takes no guidance scale as an input"),
        ("flux", RED, {"height": 30}, "multiples of 4"),
        ("flux", Condition("red " * 600), {}, "tokens"),
        ("flux", RED, {"scheduler": EulerDiscreteScheduler()}, "flow"),
        ("flux", RED, {"scheduler": FlowMatchHeunDiscreteScheduler()}, "takes no sigmas"),
        ("pixart", RED, {"scheduler": FlowMatchEulerDiscreteScheduler()}, "flow"),
    ],
)
def test_what_cannot_work_is_refused(family, condition, options, message):
    with pytest.raises(GuidekitError, match=message):
        Sampling(pipeline(family), condition, steps=1, **options)


@pytest.mark.parametrize("family", ["dit", "sd3", "flux"])
def test_features_of_transformer_blocks_have_grids(family):
    """Also where a block returns the text beside them."""
    pipe = pipeline(family)
    condition = CLASSES[0] if family == "dit" else RED
    run = Sampling(pipe, condition, [Features()], steps=1).finish().run
    assert run.guidances[0].found.shape[2:] == (8, 8)
