"""ZestGuide: its maps, its losses, and the size of its move under every kind of scheduler."""

import copy
import itertools
import math
from typing import ClassVar, get_args

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import tiny
from guidekit import Condition, Sampling, Segment, box_mask
from guidekit.errors import GuidekitError
from guidekit.options import option_kinds
from guidekit.testing import miniatures
from guidekit_zest import PRESETS, Zest


def choices(option):
    return get_args(option_kinds(Zest)[option])


LEFT, CORNER = box_mask((0, 0, 0.5, 1)), box_mask((0.5, 0.5, 1, 1))
SEGMENTS = (Segment("red circle", LEFT), Segment("blue", CORNER, strength=0.5))
BOTH = Condition("a red circle and a blue square", segments=SEGMENTS)
ONE = Condition("a green circle", segments=(Segment("green", CORNER),))


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


def first_step(pipe, guidance, condition=BOTH, seeds=(0,), **options):
    """The first guided step of a run of four."""
    return next(iter(Sampling(pipe, condition, [guidance], seeds=seeds, steps=4, **options)))


def test_maps_are_the_softmax_over_all_tokens_summed_over_the_phrase(pipe):
    site = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    guidance = Zest(sites=site, loss="bce_plain")
    kept, module = {}, pipe.unet.get_submodule(site)

    def keep(module, args, kwargs):
        kept.setdefault("in", (args[0], kwargs["encoder_hidden_states"]))

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    step = first_step(pipe, guidance, seeds=(0, 1), cfg=1.0)
    handle.remove()
    pixels, text = kept["in"]
    with torch.no_grad():
        q, k = (
            p.unflatten(-1, (module.heads, -1)).transpose(1, 2)
            for p in (module.to_q(pixels), module.to_k(text))
        )
    p = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).mean(1)  # (B, N, T)
    # Columns: start, a, red, circle, and, a, blue, square.
    expected = torch.stack([p[..., 2] + p[..., 3], p[..., 6]], 1).unflatten(-1, (16, 16))
    (guidance,) = step.run.guidances
    maps = step.cond.attention(guidance._read)[site]
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-6)
    masks = torch.zeros(2, 16, 16)
    masks[0, :, :8], masks[1, 8:, 8:] = 1, 1
    loss = -(masks * expected.log() + (1 - masks) * (1 - expected).log()).mean((2, 3))
    energy = torch.tensor(step.run.account.rows[0]["energy"])
    torch.testing.assert_close(energy, loss[:, 0] + 0.5 * loss[:, 1], rtol=1e-4, atol=1e-5)


def predictions(pipe, name, choices, **options):
    """Guided output for each choice of a field."""
    return {c: first_step(pipe, Zest(**{name: c}, **options)).prediction for c in choices}


@pytest.mark.parametrize(
    "name, choices, options",
    [
        ("aggregate", choices("aggregate"), {"top": 3}),
        ("loss", choices("loss"), {"dead_zone": 0.0, "normaliser": "l2"}),
        ("normaliser", choices("normaliser"), {}),
        ("tokens", choices("tokens"), {}),
        ("negatives", ("", "green", "green, white square"), {}),
        ("resolutions", ("", "16", "8"), {}),
        ("sites", ("", "*up_blocks.1*attn2"), {}),
        ("without", ("", "fine-encoder"), {}),
        ("resize", choices("resize"), {}),
        ("grid", choices("grid"), {}),
        ("gain", (1.0, 10.0), {}),
        ("gate", (0.0, 0.2), {}),
        ("gate_normalised", (0.0, 0.9), {}),
        ("preset", ("", *PRESETS), {}),
    ],
)
def test_every_choice_runs_and_differs(pipe, name, choices, options):
    if name == "preset":  # `paper` is the default
        choices = [c for c in choices if c != "paper"]
    found = predictions(pipe, name, choices, **options)
    assert all(torch.isfinite(p).all() for p in found.values())
    for (a, one), (b, other) in itertools.combinations(found.items(), 2):
        assert (one - other).abs().max() > 1e-6, (a, b)


def test_decays_differ_after_the_first_step(pipe):
    rows = {}
    for decay in choices("decay"):
        sampling = Sampling(pipe, BOTH, [Zest(decay=decay, stop=0.9)], steps=4).finish()
        rows[decay] = sampling.latents
    for one, other in itertools.combinations(rows.values(), 2):
        assert (one - other).abs().max() > 1e-4
    assert [Zest(stop=0.5).schedule(f) for f in (0.0, 0.25)] == [1.0, 0.5]
    assert [Zest(decay="constant").schedule(f) for f in (0.0, 0.25)] == [1.0, 1.0]


def test_presets_fill_fields_that_were_left_alone():
    assert Zest(preset="paper") == Zest(preset="paper", scale=1.0, loss="bce")
    released = Zest(preset="like-sd14")
    assert (released.scale, released.decay, released.eps) == (0.3, "noise", 1e-3)
    assert (released.resize, released.gain, released.gate) == ("logits", 10.0, 0.01)
    assert Zest(preset="like-sdxl", scale=0.7).scale == 0.7
    assert Zest(preset="like-sd14", scale=1.0).scale == 1.0
    assert Zest(preset="like-sdxl").aggregate == "top"
    assert [Zest(preset="like-sdxl").schedule(f) for f in (0.0, 0.25, 0.5)] == [1.0, 0.75, 0.5]


class Measured(Zest):
    """Zest that steps copies of the scheduler with its output and with the unguided one."""

    moves: ClassVar[list] = []

    def edit_prediction(self, step, out):
        samples = []
        for chosen in (out, step.out.detach()):
            scheduler = copy.deepcopy(step.run.scheduler)
            samples.append(scheduler.step(chosen, step.timestep, step.z).prev_sample)
        self.moves.append((step, samples[0] - samples[1]))
        return out


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler])
def test_the_largest_move_of_the_next_z_is_scale_times_weight(pipe, cls):
    guidance = Measured(scale=0.3, stop=0.75)
    guidance.moves.clear()
    scheduler = cls.from_config(pipe.scheduler.config)
    Sampling(pipe, [BOTH, ONE], [guidance], seeds=[0, 1], steps=8, scheduler=scheduler).finish()
    assert len(guidance.moves) == 6
    for step, move in guidance.moves:
        sigma = step.next_level.s / step.next_level.a
        units = math.sqrt(1 + sigma**2) if cls is EulerDiscreteScheduler else 1.0
        expected = 0.3 * (1 - step.index / 6) * units
        largest = move.abs().flatten(1).amax(1)
        torch.testing.assert_close(largest, torch.full((2,), expected), rtol=2e-3, atol=1e-5)


def directions(guidance, grads):
    """What a guidance makes of gradients, one step after the other, as shares of `scale`."""
    guidance._largest = guidance._direction = None
    return [guidance._directed(grad) for grad in grads]


def test_a_damped_step_is_proportional_to_a_small_gradient_and_never_longer():
    grad = torch.tensor([[1.0, -2.0], [0.5, 4.0]]).view(2, 1, 1, 2)
    grads = [grad * size for size in (1.0, 0.5, 1e-6, 3.0)]
    found = directions(Zest(damping=1.0), grads)
    longest = torch.stack([d.abs().amax((1, 2, 3)) for d in found])
    # g (1 + c) / (|g| + c m) for c = 1 and |g| / m = 1, 1/2, 1e-6 and, the largest itself, 1.
    expected = torch.tensor([1.0, 2 * 0.5 / 1.5, 2e-6, 1.0])[:, None].expand(4, 2)
    torch.testing.assert_close(longest, expected)
    plain = directions(Zest(), grads)
    assert all(torch.equal(d, grad / torch.tensor([2.0, 4.0]).view(2, 1, 1, 1)) for d in plain[:1])


def test_momentum_is_a_moving_average_of_directions():
    grads = [torch.tensor([x, 1.0]).view(1, 1, 1, 2) for x in (1.0, -1.0, 1.0)]
    first, second, third = (d.flatten().tolist() for d in directions(Zest(momentum=0.5), grads))
    assert (first, second, third) == ([1.0, 1.0], [0.0, 1.0], [0.5, 1.0])


@pytest.mark.parametrize("option", [{"damping": -1}, {"momentum": 1.0}, {"momentum": -0.1}])
def test_a_rule_that_there_is_not(option):
    with pytest.raises(GuidekitError, match="zest.damping must be at least 0"):
        Zest(**option)


@pytest.mark.parametrize("options", [{"damping": 1.0}, {"momentum": 0.5}])
def test_what_a_rule_keeps_is_of_one_run(pipe, options):
    """And of each image: the same alone, in a batch, and with an object that was used before."""
    guidance = Zest(stop=1.0, **options)
    both = Sampling(pipe, [BOTH, ONE], [guidance], seeds=[0, 1], steps=3).finish()
    alone = Sampling(pipe, ONE, [guidance], seeds=[1], steps=3).finish()
    torch.testing.assert_close(alone.latents[0], both.latents[1], rtol=1e-3, atol=1e-3)
    plain = Sampling(pipe, ONE, [Zest(stop=1.0)], seeds=[1], steps=3).finish()
    assert (plain.latents - alone.latents).abs().max() > 0.05


@pytest.mark.parametrize(
    "cls",
    [
        DDIMScheduler,
        pytest.param(EulerDiscreteScheduler, marks=pytest.mark.full),
        pytest.param(UniPCMultistepScheduler, marks=pytest.mark.full),
    ],
)
def test_energies_fall_against_the_unguided_run(pipe, cls):
    def energies(scale):
        guidance = Zest(scale=scale, decay="constant", stop=1.0)
        scheduler = cls.from_config(pipe.scheduler.config)
        sampling = Sampling(
            pipe, BOTH, [guidance], seeds=[0, 1, 2, 3], steps=6, scheduler=scheduler, cfg=1.0
        )
        rows = sampling.finish().account.rows
        return torch.tensor([row["energy"] for row in rows])  # (steps, images)

    unguided, guided, away = energies(1e-9), energies(0.1), energies(-0.1)
    torch.testing.assert_close(guided[0], unguided[0])  # before the first move
    assert (guided[1:].mean(0) < unguided[1:].mean(0)).all()
    assert away[1:].mean() > unguided[1:].mean()


def test_power4_leaves_small_errors_alone():
    guidance = Zest(loss="power4", dead_zone=0.2)
    maps = torch.tensor([0.1, 0.6]).view(1, 2, 1, 1).expand(1, 2, 4, 4).clone().requires_grad_()
    masks = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    loss = guidance._loss(maps, masks)
    torch.testing.assert_close(loss, torch.tensor([[0.0, 0.4**4]]))
    loss.sum().backward()
    assert (maps.grad[:, 0] == 0).all()
    assert (maps.grad[:, 1] < 0).all()


def test_bce_is_the_papers_two_terms():
    maps = torch.tensor([[0.1, 0.4], [0.2, 0.3]])[None, None]
    masks = torch.tensor([[0.0, 1.0], [0.0, 1.0]])[None, None]

    def entropy(s):
        return -(masks * s.log() + (1 - masks) * (1 - s).log()).mean()

    clamped = (maps / 0.4).clamp(1e-4, 1 - 1e-4)
    expected = entropy(maps) + entropy(clamped)
    torch.testing.assert_close(Zest()._loss(maps, masks)[0, 0], expected)


def test_negatives_and_padding_take_part_in_the_softmax(pipe):
    def maps(**options):
        step = first_step(pipe, Zest(**options))
        (guidance,) = step.run.guidances
        return torch.stack([m.mean() for m in step.cond.attention(guidance._read).values()])

    plain, negatives, real = maps(), maps(negatives=("green", "white")), maps(tokens="real")
    assert (negatives < plain).all()
    assert (negatives > 0.8 * plain).all()
    assert (real > 2 * plain).all()  # 10 of 77 tokens are not padding


def test_the_output_does_not_see_negatives(pipe):
    plain, other = (first_step(pipe, Zest(negatives=n)) for n in ("", "green"))
    torch.testing.assert_close(plain.out, other.out, rtol=1e-4, atol=1e-5)


def released_maps(pipe, guidance, condition):
    """The plugin's maps (sites, B, S, h, w), and the mean as the release has it (S, h, w).

    Logits from the inputs of the modules are resized, softmaxed over all tokens, averaged over
    modules and heads, and summed over the tokens of each phrase.
    """
    kept = {}

    def keep(site):
        def hook(module, args, kwargs):
            kept.setdefault(site, (module, args[0], kwargs["encoder_hidden_states"]))

        return hook

    run = Sampling(pipe, condition, [guidance], seeds=[0], steps=4, cfg=1.0)
    read = run.guidances[0]._read
    handles = [
        pipe.unet.get_submodule(site).register_forward_pre_hook(keep(site), with_kwargs=True)
        for site in read.sites
    ]
    step = next(iter(run))
    for handle in handles:
        handle.remove()
    maps = []
    for site, (module, pixels, text) in kept.items():
        q, k = (
            p.unflatten(-1, (module.heads, -1)).transpose(1, 2)
            for p in (module.to_q(pixels), module.to_k(text))
        )
        logits = (q @ k.mT * module.scale)[0].mT.unflatten(-1, read.sites[site])
        maps.append(F.interpolate(logits, (16, 16), mode="bilinear").softmax(1).mean(0))
    mean = torch.stack(maps).mean(0)
    found = torch.stack(list(step.cond.attention(read).values()))
    return found, torch.stack([mean[[2, 3]].sum(0), mean[6]]).detach()


def test_logits_are_resized_before_the_softmax_as_in_the_release(pipe):
    found, expected = released_maps(pipe, Zest(resize="logits"), BOTH)
    assert found.shape[-2:] == (16, 16)
    torch.testing.assert_close(found.mean(0)[0], expected, rtol=1e-4, atol=1e-6)
    paper = first_step(pipe, Zest(), cfg=1.0).run.account.maps["attention before"][0]
    assert (paper - expected).abs().max() > 1e-4


def test_negatives_are_refused_where_keys_are_not_of_clips_states(monkeypatch):
    asked = Condition("a red circle", segments=(Segment("red circle", LEFT),))
    for build in (miniatures.pixart_pipeline, miniatures.sana_pipeline, miniatures.qwen_pipeline):
        with pytest.raises(GuidekitError, match="zest.negatives .* leave them out"):
            Sampling(build(), asked, [Zest(negatives=("green",))], steps=2)


def test_gates_leave_low_pixels_alone_and_gain_moves_the_target():
    maps = torch.tensor([[[[0.004, 0.2, 0.05]]]], requires_grad=True)
    masks = torch.tensor([[[[0.0, 0.0, 1.0]]]])
    guide = Zest(loss="bce_plain", gain=10.0, gate=0.05, eps=1e-3)
    (grad,) = torch.autograd.grad(guide._loss(maps, masks).sum(), maps)
    # 10 * 0.004 is below the gate, 10 * 0.2 is clipped at 1 - eps, 10 * 0.05 pulls up.
    assert grad.flatten().sign().tolist() == [0.0, 0.0, -1.0]
    (grad,) = torch.autograd.grad(Zest(loss="bce_plain")._loss(maps, masks).sum(), maps)
    assert grad.flatten().sign().tolist() == [1.0, 1.0, -1.0]


def test_the_report_has_maps_before_and_after(pipe):
    sampling = Sampling(pipe, BOTH, [Zest(stop=1.0)], steps=3).finish()
    pictures = sampling.account.maps
    assert pictures["attention before"].shape == pictures["attention after"].shape == (1, 2, 16, 16)
    assert not torch.equal(pictures["attention before"], pictures["attention after"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"aggregate": "all"}, "aggregate must be one of"),
        ({"loss": "l1"}, "loss must be one of"),
        ({"decay": "cosine"}, "decay must be one of"),
        ({"normaliser": "l3"}, "normaliser must be one of"),
        ({"tokens": "some"}, "tokens must be one of"),
        ({"preset": "sd3"}, "no preset"),
        ({"eps": 0.5}, "eps"),
        ({"top": 0}, "top"),
        ({"gain": 0.0}, "gain is a positive factor"),
        ({"without": ("decoder",)}, "without must be"),
        ({"resize": "queries"}, "resize must be one of"),
        ({"scale": float("inf")}, "finite"),
        ({"start": 0.6, "stop": 0.5}, "start <= stop"),
    ],
)
def test_wrong_values_raise(options, message):
    with pytest.raises(GuidekitError, match=message):
        Zest(**options)


@pytest.mark.parametrize(
    "options, condition, message",
    [
        ({}, Condition("a red circle"), "needs segments"),
        ({"sites": "nowhere"}, BOTH, "matches no attention site"),
        ({"resolutions": "64"}, BOTH, "the sites have 8, 16"),
        ({"sites": "mid_block*attn2", "without": "middle"}, BOTH, "no site is left of mid_block"),
        ({}, Condition("a circle", segments=(Segment("red", LEFT),)), "does not occur"),
    ],
)
def test_what_matches_nothing_raises_before_the_run(pipe, options, condition, message):
    with pytest.raises(GuidekitError, match=message):
        Sampling(pipe, condition, [Zest(**options)])
