"""Calls in, evaluations out: as few denoiser calls as the edits allow, with the same results."""

from dataclasses import dataclass, field

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig

import tiny
from guidekit import (
    AttentionRead,
    Branch,
    Condition,
    FeatureRead,
    Guidance,
    Sampling,
    Segment,
    attach,
    box_mask,
)
from guidekit.engine import evaluator
from guidekit.errors import GuidekitError
from guidekit.testing import miniatures
from guidekit_autoguidance import Autoguidance
from guidekit_pag import PerturbedAttention
from guidekit_pww import PaintWithWords
from guidekit_seg import SmoothedEnergy
from guidekit_slg import SkipLayer
from guidekit_zest import Zest

SEGMENTS = (Segment("red circle", box_mask((0, 0, 0.5, 1))),)
RED = Condition("a red circle and a blue square", segments=SEGMENTS)
BLUE = Condition("a blue square", "red", (Segment("blue", box_mask((0, 0, 1, 0.5))),))
SPLIT = {"null+cond*": "split"}


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


@pytest.fixture(scope="module")
def wide():
    return tiny.sd_pipeline().to(torch.float64)


FULL = [
    pytest.param(family, marks=pytest.mark.full)
    for family in ("sdxl", "pixart", "sd3", "flux", "qwen", "lumina2")
]


def edits():
    return [
        PaintWithWords(),
        PerturbedAttention(),
        SmoothedEnergy(blur=1.0),
        SkipLayer.example(),
        Autoguidance(),
    ]


def drawn(pipe, guidances, conditions=(RED, BLUE), seeds=(5, 6), **options):
    given = {"steps": 3, "cfg": 5.0} | options
    return Sampling(pipe, list(conditions), guidances, seeds=seeds, **given).finish()


@pytest.mark.parametrize("family", ["sd", *FULL])
def test_edits_of_all_branches_ride_in_one_call(family, monkeypatch):
    """And they are those of a call for each branch."""
    pipe = getattr(miniatures, f"{family}_pipeline")().to(torch.float64)
    size = {} if family in ("sd", "sdxl") else {"height": 32, "width": 48}
    options = {"cfg": 1.0 if family == "flux" else 4.0, "steps": 2} | size
    guidances = [g for g in edits() if family in ("sd", "sdxl") or g.name != "seg"]
    together = drawn(pipe, guidances, **options)
    if family not in ("qwen", "lumina2"):  # texts of two lengths
        assert together.engine.evaluator.count == 2
    monkeypatch.setattr(evaluator, "ROWS", 4)
    apart = drawn(pipe, guidances, **options)
    assert apart.engine.evaluator.count > together.engine.evaluator.count
    torch.testing.assert_close(together.latents, apart.latents, rtol=1e-8, atol=1e-8)


@pytest.mark.full
def test_rows_do_not_mix(wide):
    """In float64 an image is the same alone and beside others, edits of all kinds on."""
    both = drawn(wide, edits())
    for i, condition in enumerate((RED, BLUE)):
        alone = drawn(wide, edits(), [condition], [5 + i])
        torch.testing.assert_close(alone.latents[0], both.latents[i], rtol=1e-6, atol=1e-6)


def test_more_rows_than_fit_are_several_calls(pipe):
    sampling = drawn(pipe, edits(), [RED] * 8, range(8), steps=1)
    assert sampling.engine.evaluator.count == 3  # 6 branches of 8 rows, 16 in a call


def test_a_step_outside_of_all_windows_is_called_as_the_bare_pipeline(pipe):
    rows = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(args[0].clone()))
    try:
        list(Sampling(pipe, RED, [Autoguidance(start=0.5)], seeds=[5], steps=4, cfg=5.0))
        guided, rows[:] = list(rows), []
        generator = [torch.Generator().manual_seed(5)]
        pipe(RED.prompt, num_inference_steps=4, guidance_scale=5.0, generator=generator)
    finally:
        handle.remove()
    assert [len(x) for x in guided] == [2, 2, 3, 3]
    assert all(torch.equal(a, b) for a, b in zip(guided[:2], rows[:2], strict=True))


@pytest.mark.parametrize(
    "guidances",
    [[], pytest.param([PaintWithWords()], marks=pytest.mark.full), [PerturbedAttention()]],
)
def test_batched_and_split_calls_give_one_gradient(wide, guidances):
    def run(mode):
        kind = "null+cond*+pag" if guidances and guidances[0].name == "pag" else "null+cond*"
        found = drawn(wide, [Zest(stop=1.0), *guidances], calls={kind: mode})
        assert found.account.calls == {kind: mode}
        return found

    batched, split = run("batched"), run("split")
    assert batched.engine.evaluator.count < split.engine.evaluator.count
    torch.testing.assert_close(batched.latents, split.latents, rtol=1e-7, atol=1e-7)


def test_the_faster_way_is_measured_once_and_recorded(pipe, monkeypatch):
    monkeypatch.setattr(evaluator, "_MEASURED", {})
    first = drawn(pipe, [Zest(stop=1.0)])
    (kind, mode), *others = first.account.calls.items()
    assert (kind, others) == ("null+cond*", [])
    assert mode in ("batched", "split")
    own = 3 if mode == "batched" else 6
    assert first.engine.evaluator.count == own + 5  # split, batched, split
    again = drawn(pipe, [Zest(stop=1.0)])
    assert again.engine.evaluator.count == own
    assert torch.equal(first.latents, again.latents)
    assert len(first.account.rows) == 3
    replay = drawn(pipe, [Zest(stop=1.0)], calls=first.account.calls)
    assert torch.equal(first.latents, replay.latents)
    assert replay.engine.evaluator.count == own


def test_low_memory_keeps_branches_without_a_graph_apart(pipe, monkeypatch):
    monkeypatch.setattr(evaluator, "_MEASURED", {})
    sampling = drawn(pipe, [Zest(stop=1.0)], memory="low")
    assert sampling.account.calls == {}
    assert sampling.engine.evaluator.count == 6


@dataclass(kw_only=True)
class Reads(Guidance):
    """Keeps maps and features of a branch."""

    branch: str = "null"
    attention: dict = field(default_factory=dict, init=False)
    features: dict = field(default_factory=dict, init=False)

    def prepare(self, run):
        weights = torch.eye(77)[None, :, :4].expand(len(run.seeds), -1, -1)
        self.maps = run.read(self, AttentionRead(weights, run.sites(), branch=self.branch))
        self.blocks = run.read(self, FeatureRead(("mid_block", "up_blocks.*"), branch=self.branch))

    def combine(self, step, outs, combined):
        found = step.evals[self.branch]
        self.attention |= found.attention(self.maps)
        self.features |= found.features(self.blocks)
        return combined


def test_any_branch_can_be_read(pipe):
    """What is read of null is what a conditional branch with its prompt gives."""
    swapped = Condition(RED.negative, RED.prompt)
    null = drawn(pipe, [Reads(branch="null")], [RED], [5], steps=1).guidances[0]
    cond = drawn(pipe, [Reads(branch="cond")], [swapped], [5], steps=1).guidances[0]
    for kind in ("attention", "features"):
        one, other = getattr(null, kind), getattr(cond, kind)
        assert one.keys() == other.keys()
        assert one
        for site, maps in one.items():
            torch.testing.assert_close(maps, other[site], rtol=1e-4, atol=1e-5)
    perturbed = drawn(pipe, [PerturbedAttention(), Reads(branch="pag")], [RED], [5], steps=1)
    assert perturbed.guidances[1].attention
    with pytest.raises(GuidekitError, match="reads reads the branch 'region'.*among null, cond"):
        drawn(pipe, [Reads(branch="region")])


def test_a_branch_that_is_read_for_an_energy_has_the_graph(pipe):
    class Pull(Reads):
        graph = "attention"

        def energy(self, step):
            return sum(m.mean((1, 2, 3)) for m in step.evals["null"].attention(self.maps).values())

    sampling = drawn(pipe, [Pull()], calls={"null*+cond": "split"})
    assert all(norm > 0 for row in sampling.account.rows for norm in row["grad_norm"])


def test_an_edit_may_return_the_output(wide):
    class Shut(Guidance):
        def prepare(self, run):
            run.tap_attention(self, "mid_block*attn1")

        def edit_attention(self, step, branch, call):
            return call.value * 1.0

    class Same(Shut):
        def edit_attention(self, step, branch, call):
            call.identity()

    one, other = drawn(wide, [Shut()]), drawn(wide, [Same()])
    torch.testing.assert_close(one.latents, other.latents, rtol=1e-9, atol=1e-9)
    assert one.account.edits == {"shut": 3}
    with pytest.raises(GuidekitError, match="whose output another plugin has made already"):
        drawn(wide, [Shut(), Same()])


HOOKS = ("branches", "combine", "energy", "push", "edit_prediction", "edit_sample", "repeats")


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_may_denoise(pipe, hook):
    class Asks(Guidance):
        def prepare(self, run):
            self.read = run.read(self, FeatureRead(("mid_block",)), main=False)
            self.found = []

        def look(self, step):
            found = step.denoise(step.run.noise((4, 16, 16), "x"), 7, self, graph=False)
            self.found.append((found.out, found.features(self.read)["mid_block"]))

    def asking(self, step, *given):
        self.look(step)
        if hook == "energy":
            return step.x0.flatten(1).mean(1)
        return getattr(Guidance, hook)(self, step, *given)

    members = {hook: asking}
    if hook == "push":
        members["energy"] = lambda self, step: step.x0.flatten(1).mean(1)
    kind = type("Asking", (Asks,), members)
    (guidance,) = drawn(pipe, [kind()], [RED], [5], steps=1).guidances
    ((out, features),) = guidance.found
    with torch.no_grad():
        text = drawn(pipe, [], [RED], [5], steps=1).run.text([RED.prompt])
        x = drawn(pipe, [], [RED], [5], steps=1).run.noise((4, 16, 16), "x")
        expected = pipe.unet(x, 7, text.states).sample
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert features.shape == (1, 64, 8, 8)


def test_reads_and_branches_that_are_not_there_are_named(pipe):
    class Wrong(Guidance):
        def prepare(self, run):
            self.read = run.read(self, FeatureRead(("mid_block",)))

        def edit_prediction(self, step, out):
            step.denoise(step.z, 7, self, graph=False).features(self.read)
            return out

    class Nowhere(Guidance):
        def edit_prediction(self, step, out):
            step.denoise(step.z, 7, self, branch="sky", graph=False)
            return out

    with pytest.raises(GuidekitError, match="evaluated without this read.*main=False"):
        drawn(pipe, [Wrong()])
    with pytest.raises(GuidekitError, match="denoises the branch 'sky'; this step has null, cond"):
        drawn(pipe, [Nowhere()])


@pytest.mark.full
def test_gradient_checkpointing_of_the_user_stays_and_changes_nothing():
    pipe = tiny.sd_pipeline()
    guidances = [PaintWithWords(), Zest(stop=1.0)]
    plain = drawn(pipe, guidances, calls=SPLIT)
    pipe.unet.enable_gradient_checkpointing()
    own = drawn(pipe, guidances, calls=SPLIT)
    assert pipe.unet.is_gradient_checkpointing
    torch.testing.assert_close(own.latents, plain.latents, rtol=1e-4, atol=1e-5)
    with attach(pipe, guidances, segments=SEGMENTS):
        pipe(RED.prompt, num_inference_steps=2, output_type="latent")


@pytest.fixture
def cached():
    pipe = miniatures.flux_pipeline()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    yield pipe
    pipe.transformer.disable_cache()


def test_the_own_loop_runs_with_a_cache_as_the_pipeline_does(cached):
    options = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent"}
    generator = [torch.Generator().manual_seed(5)]
    bare = cached("a red circle", generator=generator, **options).images
    own = Sampling(cached, Condition("a red circle"), seeds=[5], steps=3, height=32, width=32)
    assert torch.equal(own.denoiser.pack(own.finish().latents), bare)


@pytest.mark.parametrize("guidance", [Zest(stop=1.0), PaintWithWords()])
def test_a_site_that_a_cache_leaves_out_is_named(cached, guidance):
    options = {"num_inference_steps": 3, "height": 32, "width": 32}
    with attach(cached, [guidance], segments=SEGMENTS):
        with pytest.raises(GuidekitError, match="did not run in the branch 'cond'.*disable_cache"):
            cached("a red circle", **options)


def test_branches_of_other_sizes_have_calls_of_their_own(pipe):
    class Window(Guidance):
        def branches(self, step, branches):
            window = Branch("window", branches[-1].prompts, view=(0, 0, 8, 16), group="window")
            return [*branches, window]

    sampling = drawn(pipe, [Window(), PerturbedAttention()], steps=1)
    assert sampling.engine.evaluator.count == 2
    assert sampling.latents.shape == (2, 4, 16, 16)
