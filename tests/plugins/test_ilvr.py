"""ILVR: the reference's low frequencies at the next level; schedulers that would lose them."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch

from guidekit import Condition, Guidance, Sampling, draw
from guidekit.backbones.loading import make_scheduler
from guidekit.backbones.schedulers import ONE_CALL, STARTS_FROM_Z, schedulers_for
from guidekit.errors import GuidekitError
from guidekit.references import read_references
from guidekit.testing.miniatures import ddpm_pipeline, sd3_pipeline
from guidekit_ilvr import Ilvr, low_pass

SCENE = Path("scene-3")


@pytest.fixture(scope="module")
def pipe():
    pipe = ddpm_pipeline()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False)
    return pipe


def run(pipe, *guidances, scheduler="ddpm", steps=4):
    scheduler = make_scheduler(pipe, scheduler)
    return Sampling(pipe, Condition(), guidances, seeds=(0,), steps=steps, scheduler=scheduler)


class Kept(Ilvr):
    """Keeps what it was given and what it made of it."""

    kept: ClassVar[list] = []

    def edit_sample(self, step, z):
        out = super().edit_sample(step, z)
        self.kept.append((step, z, out))
        return out


def test_low_frequencies_are_those_of_the_reference_at_the_next_level(pipe):
    guidance = Kept(image=SCENE, down=4)
    guidance.kept.clear()
    drawn = run(pipe, guidance).finish()
    reference = read_references([SCENE], (16, 16))
    for step, before, after in guidance.kept:
        y = step.next_level.a * reference + step.next_level.s * step.noise("kept")
        torch.testing.assert_close(after, before + low_pass(y, 4) - low_pass(before, 4))
    assert torch.equal(drawn.latents, guidance.kept[-1][2])
    # The last level has no noise: the image's coarse colours are nearly the reference's.
    plain = run(pipe).finish().latents
    found, plain = (low_pass(x - reference, 4).norm() for x in (drawn.latents, plain))
    assert found < 0.3 * plain


def test_each_image_may_have_a_reference_of_its_own(pipe):
    """As one batch with both, and as each alone."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    own = [Condition(targets={"ilvr": image}) for image in images]
    options = {"steps": 3, "scheduler": make_scheduler(pipe, "ddpm")}
    both = Sampling(pipe, own, [Ilvr()], seeds=(0, 1), **options).finish().images
    told = Sampling(pipe, Condition(), [Ilvr().towards(images)], seeds=(0, 1), **options).finish()
    assert torch.equal(both, told.images)
    alone = draw(pipe, own, [Ilvr()], seeds=(0, 1), batch=1, **options)
    torch.testing.assert_close(alone, both, atol=1e-5, rtol=1e-4)


def test_low_pass_keeps_what_is_flat_and_drops_what_is_fine():
    flat = torch.full((1, 2, 16, 16), 0.3)
    torch.testing.assert_close(low_pass(flat, 4), flat)
    fine = torch.ones(1, 1, 16, 16)
    fine[..., ::2] = -1
    assert low_pass(fine, 4).abs().max() < 0.1


class Reads(Guidance):
    """Notes whether every step starts from the z that it is given."""

    found: ClassVar[list] = []

    def edit_prediction(self, step, out):
        self.found.append(step.move.reads_sample)
        return out


@pytest.mark.parametrize("name", schedulers_for(ddpm_pipeline().scheduler))
def test_the_list_of_schedulers_is_what_their_steps_do(pipe, name):
    reads = Reads()
    reads.found.clear()
    sampling = run(pipe, reads, scheduler=name, steps=6).finish()
    assert all(reads.found) == (name in STARTS_FROM_Z)
    assert all(len(step) == 1 for step in sampling.run.levels.steps) == (name in ONE_CALL)


@pytest.fixture(scope="module")
def flow_pipe():
    return sd3_pipeline()


@pytest.mark.parametrize("name", schedulers_for(sd3_pipeline().scheduler))
def test_the_list_of_flow_schedulers_is_what_their_steps_do(flow_pipe, name):
    reads = Reads()
    reads.found.clear()
    sampling = run(flow_pipe, reads, scheduler=name, steps=6).finish()
    assert all(reads.found) == (name in STARTS_FROM_Z)
    assert all(len(step) == 1 for step in sampling.run.levels.steps) == (name in ONE_CALL)


def test_flow_models_follow_the_reference_too(flow_pipe):
    guidance = Ilvr(image=SCENE, down=4)
    drawn = run(flow_pipe, guidance, scheduler="flow-euler").finish()
    found, (guidance,) = drawn.latents, drawn.guidances
    plain = run(flow_pipe, scheduler="flow-euler").finish().latents
    found, plain = (low_pass(z - guidance._reference, 4).norm() for z in (found, plain))
    assert found < 0.3 * plain


def test_flow_schedulers_that_would_lose_it_are_refused(flow_pipe):
    with pytest.raises(GuidekitError, match="use --scheduler deis, dpm"):
        run(flow_pipe, Ilvr(image=SCENE), scheduler="flow-heun")


def test_other_schedulers_are_refused_with_the_names_of_those_that_work(pipe):
    with pytest.raises(GuidekitError, match="use --scheduler ddim, ddpm"):
        run(pipe, Ilvr(image=SCENE), scheduler="heun")


@pytest.mark.parametrize(
    ("guidance", "says"),
    [(Ilvr(), "needs a reference"), (Ilvr(image=SCENE, down=32), "down=32 is more")],
)
def test_what_cannot_act_says_so(pipe, guidance, says):
    with pytest.raises(GuidekitError, match=says):
        run(pipe, guidance)


def test_scale_is_a_share(pipe):
    half, whole = (Kept(image=SCENE, scale=s) for s in (0.5, 1.0))
    moves = []
    for guidance in (half, whole):
        guidance.kept.clear()
        next(iter(run(pipe, guidance)))
        _, before, after = guidance.kept[0]
        moves.append(after - before)
    torch.testing.assert_close(2 * moves[0], moves[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(GuidekitError, match="at least 2"):
        Ilvr(down=1)
