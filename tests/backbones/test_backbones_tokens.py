"""The own loop on Sana, Lumina2 and Qwen-Image: images, tokens, maps, layouts, the model after.

Their prompts stand in texts of the pipeline's own, and those of a batch differ in length.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from guidekit import (
    Condition,
    Denoiser,
    FeatureRead,
    Guidance,
    Sampling,
    Segment,
    box_mask,
    tap_attention,
)
from guidekit.backbones.loading import make_scheduler
from guidekit.backbones.padding import aligned, taken
from guidekit.backbones.tokens import real_tokens, segment_columns
from guidekit.errors import GuidekitError
from guidekit.testing import miniatures
from guidekit.testing.subject import Subject
from guidekit.testing.suite import restored
from guidekit_pag import PerturbedAttention
from guidekit_pww import PaintWithWords
from guidekit_zest import Zest

FAMILIES = ("sana", "lumina2", "qwen")
SEEDS = (5, 6)
SIZE = {"height": 32, "width": 64}
LEFT, TOP = box_mask((0, 0, 0.5, 1)), box_mask((0, 0, 1, 0.5))
RED = Condition("a red circle on white", "blue", (Segment("red circle", LEFT),))
BLUE = Condition("a blue square", "", (Segment("square", TOP),))
PROMPTS = {"prompt": [RED.prompt, BLUE.prompt], "negative_prompt": ["blue", ""]}
CFG = {"sana": "guidance_scale", "lumina2": "guidance_scale", "qwen": "true_cfg_scale"}
SITES = {
    "sana": "transformer_blocks.1.attn2",
    "lumina2": "layers.1.attn",
    "qwen": "transformer_blocks.1.attn",
}


@cache
def pipeline(family):
    return getattr(miniatures, f"{family}_pipeline")()


def bare(family, cfg):
    """Images of the pipeline's own call, with a generator for each."""
    own = {"use_resolution_binning": False} if family == "sana" else {}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipeline(family)(
        generator=generators,
        num_inference_steps=3,
        output_type="pt",
        **{CFG[family]: cfg},
        **PROMPTS,
        **SIZE,
        **own,
    ).images


def drawing(family, *guidances, conditions=(RED, BLUE), seeds=SEEDS, **options):
    options = {"steps": 3} | SIZE | options
    return Sampling(pipeline(family), list(conditions), guidances, seeds=seeds, **options)


def flow_unipc(**config):
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, **config
    )


SCHEDULERS = [
    ("sana", None),
    ("sana", FlowMatchEulerDiscreteScheduler(shift=3.0)),
    ("lumina2", None),
    ("lumina2", FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
    ("qwen", None),
    ("qwen", flow_unipc(flow_shift=3.0)),
]


@pytest.mark.parametrize(("family", "scheduler"), SCHEDULERS)
def test_unguided_it_is_the_bare_pipeline(monkeypatch, family, scheduler):
    """Bit for bit but where the pipeline calls its model twice, for what is one call here."""
    if scheduler:
        monkeypatch.setattr(pipeline(family), "scheduler", scheduler)
    assert torch.equal(drawing(family, cfg=1.0).finish().images, bare(family, 1.0))
    images, expected = drawing(family, cfg=4.0).finish().images, bare(family, 4.0)
    assert (images - expected).abs().max() <= (0 if family == "sana" else 5e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_phrase_has_the_columns_whose_states_it_changes(family):
    """The text encoders are causal: the first state that changes is that of the first new word."""
    denoiser = Denoiser(pipeline(family))
    first, last = (Condition(RED.prompt, "", (Segment(p, LEFT),)) for p in ("red", "white"))
    for condition, other in ((first, "a blue circle on white"), (last, "a red circle on blue")):
        ((column,),) = segment_columns(denoiser.tokenizers, condition)
        one, two = denoiser.text([condition.prompt, other], (32, 64)).states
        changed = ((one - two).abs().amax(1) > 1e-5).nonzero()
        assert changed[0] == column
    real = real_tokens(denoiser.tokenizers, [RED], denoiser.text_length)
    given = denoiser.text([RED.prompt], (32, 64)).given
    mask = next((v for k, v in given.items() if k.endswith("mask") and v is not None), None)
    mask = torch.ones(given["encoder_hidden_states"].shape[:2]) if mask is None else mask
    assert torch.equal(real[:, : mask.shape[1]], mask.bool())
    assert real.sum() == mask.sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_the_softmax_in_the_columns_of_the_phrase(family):
    """Against eager softmax over the call as the model makes it, text and padding where it has."""
    zest, model, kept = Zest(sites=SITES[family]), pipeline(family).transformer, {}
    keep = lambda module, args, kwargs: kept.setdefault("call", (args, kwargs))  # noqa: E731
    sampling = drawing(family, zest, cfg=1.0, steps=2)
    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    step = next(iter(sampling))
    handle.remove()
    args, kwargs = kept["call"]
    seen = []
    show = lambda call: seen.append((call.query, call.key, call.mask))  # noqa: E731
    with torch.no_grad(), tap_attention(model, show, SITES[family]):
        model(*args, **kwargs)
    ((query, key, mask),) = seen
    logits = query @ key.mT * query.shape[-1] ** -0.5
    if mask is not None:
        logits = (
            torch.where(mask, logits, -torch.inf) if mask.dtype == torch.bool else logits + mask
        )
    (zest,) = step.run.guidances
    maps = step.cond.attention(zest._read)[SITES[family]]
    h, w = maps.shape[2:]
    lengths = {
        "sana": [0, 0],
        "qwen": [query.shape[2] - h * w] * 2,
        "lumina2": kwargs.get("encoder_attention_mask", torch.zeros(2, 1)).sum(1).tolist(),
    }[family]
    assert family != "lumina2" or lengths[0] != lengths[1]
    columns = [
        c for (c,) in (segment_columns(sampling.denoiser.tokenizers, x) for x in (RED, BLUE))
    ]
    for b, start in enumerate(lengths):
        p = logits[b].softmax(-1).mean(0)[start : start + h * w, columns[b]].sum(1)
        torch.testing.assert_close(maps[b, 0], p.unflatten(0, (h, w)), rtol=1e-4, atol=1e-6)


def energies(family, **options):
    sampling = drawing(family, Zest(stop=1.0, decay="constant", **options), steps=4).finish()
    return sampling, torch.tensor([row["energy"] for row in sampling.account.rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_zest_lowers_its_energy(family):
    sampling, guided = energies(family)
    _, idle = energies(family, scale=1e-9)
    assert guided.shape == (4, 2)
    assert sampling.account.acted("zest")
    assert (guided[-1] < guided[0]).all()
    assert (guided[-1] < idle[-1]).all()


GUIDED = [(family, g) for family in FAMILIES for g in (Zest(stop=1.0), PaintWithWords())]
GUIDED += [("lumina2", PerturbedAttention()), ("qwen", PerturbedAttention())]


@pytest.mark.parametrize(("family", "guidance"), GUIDED)
def test_guidance_acts_and_a_picture_does_not_depend_on_its_batch(family, guidance):
    guided = drawing(family, guidance).finish()
    assert guided.account.acted(guidance.name)
    assert (guided.images - drawing(family).finish().images).abs().max() > 1e-4
    alone = drawing(family, guidance, conditions=[BLUE], seeds=[6]).finish()
    assert (alone.images[0] - guided.images[1]).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cls", [Zest, PaintWithWords])
def test_the_pipeline_is_as_it_was(family, cls):
    """After a run, one that failed and one that was given up."""
    restored(Subject(cls, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_clean_estimate_is_where_the_last_step_goes(family):
    """With Euler to sigma 0; the sign of the velocity and the level have to be right for it."""
    sampling = drawing(family, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    *_, step = sampling
    assert 0 < step.level.s < 1
    torch.testing.assert_close(step.x0, sampling.latents, rtol=1e-4, atol=1e-5)


def test_lumina2_runs_from_0_to_1_and_away_from_noise():
    sampling = drawing("lumina2", cfg=1.0)
    _, step, _ = sampling
    model, text = pipeline("lumina2").transformer, sampling.run.text([RED.prompt, BLUE.prompt])
    time = torch.full((2,), 1 - step.level.s)
    with torch.no_grad():
        velocity = model(step.z, timestep=time, return_dict=False, **text.kwargs())[0]
    torch.testing.assert_close(step.x0, step.z + step.level.s * velocity, rtol=1e-4, atol=1e-5)


@dataclass(kw_only=True)
class Features(Guidance):
    """Reads a block."""

    graph = "features"
    sites: str

    def prepare(self, run):
        self.read = run.read(self, FeatureRead((self.sites,)))

    def energy(self, step):
        (self.found,) = step.cond.features(self.read).values()
        return self.found.float().mean((1, 2, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_the_pixels(family):
    """Also behind texts of two lengths."""
    guidance = Features(sites=SITES[family].rpartition(".")[0])
    step = next(iter(drawing(family, guidance, cfg=1.0)))
    both = step.run.guidances[0].found
    step = next(iter(drawing(family, guidance, cfg=1.0, conditions=[BLUE], seeds=[6])))
    assert both.shape[2:] == (8, 16)
    torch.testing.assert_close(both[1:], step.run.guidances[0].found, rtol=1e-4, atol=1e-5)


def test_padding_moves_between_text_and_pixels():
    order = aligned([2, 4], 7)
    assert order.tolist() == [[0, 1, 5, 6, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]
    x = torch.randn(2, 3, 7, 5)
    assert torch.equal(taken(x, order)[0], x[0][:, order[0]])
    assert torch.equal(taken(taken(x, order), order.argsort(1)), x)


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_have_latents(family):
    """Those that are decoded for guidance are those of the end, and can be encoded again."""
    denoiser, x0 = Denoiser(pipeline(family)), torch.randn(1, 4, 8, 16)
    pixels = denoiser.pixels(x0)
    expected = denoiser.decode(x0)
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-5)
    assert denoiser.latents(pixels).shape == x0.shape


def test_prompts_that_would_be_cut_are_refused():
    """Of Lumina2's 256 tokens the system prompt takes a part, but not from negative prompts."""
    words = "red " * 200
    with pytest.raises(GuidekitError, match="the text encoder reads 256"):
        drawing("lumina2", conditions=[Condition(words)], seeds=[0])
    drawing("lumina2", conditions=[Condition("red", words)], seeds=[0])
    for family, most in (("sana", 300), ("qwen", 512)):
        with pytest.raises(GuidekitError, match=f"the text encoder reads {most}"):
            drawing(family, conditions=[Condition("red " * 700)], seeds=[0])


def test_a_scheduler_that_cannot_shift_by_size_is_refused():
    """Where the pipeline's own does."""
    with pytest.raises(GuidekitError, match="SASolverScheduler cannot shift its steps by the size"):
        drawing("qwen", scheduler=make_scheduler(pipeline("qwen"), "sa"))


@pytest.mark.parametrize("family", ["lumina2", "qwen"])
def test_a_scheduler_without_sigmas_is_refused(family):
    with pytest.raises(GuidekitError, match="takes no sigmas"):
        drawing(family, scheduler=FlowMatchHeunDiscreteScheduler())
