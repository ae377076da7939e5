"""Jumps of several steps back: levels, the scheduler's state, and a law that they leave."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler

import exact
import guidekit
import tiny
from guidekit import Condition, Guidance, Sampling
from guidekit.errors import GuidekitError

RED = Condition("a red circle")


@dataclass(kw_only=True)
class Travel(Guidance):
    """RePaint's schedule: after every `length` steps it goes back over them, `times` times."""

    length: int = 2
    times: int = 2

    def prepare(self, run):
        self.seen = []

    def edit_prediction(self, step, out):
        self.seen.append((step.index, step.repeat, step.z))
        return out

    def jumps(self, step):
        ends = step.index % self.length == self.length - 1
        return self.length if ends and step.repeat + 1 < self.times else 0


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


def sampling(pipe, guidance, cls=DDIMScheduler, **options):
    scheduler = cls.from_config(pipe.scheduler.config)
    guidances = options.pop("guidances", [guidance] if guidance else [])
    options = {"seeds": [5], "steps": 4, "cfg": 5.0, "scheduler": scheduler, **options}
    return Sampling(pipe, RED, guidances, **options)


def test_the_steps_and_their_noise(pipe):
    run = sampling(pipe, Travel())
    yielded = [(step.index, step.repeat) for step in run]
    (guidance,) = run.guidances
    order = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]
    assert yielded == order == [seen[:2] for seen in guidance.seen]
    assert run.account.edits == {"travel": 2}
    assert run.images.shape == (1, 3, 32, 32)
    levels, z = run.run.levels, {seen[:2]: seen[2] for seen in guidance.seen}
    gain = levels.at(0).a / levels.at(2).a
    std = (levels.at(0).s ** 2 - (gain * levels.at(2).s) ** 2) ** 0.5
    noise = run.run.noise((4, 16, 16), 0, 1, "recurrence")
    plain = sampling(pipe, None)
    (third,) = [step.z for step in plain if step.index == 2]
    torch.testing.assert_close(z[0, 1], gain * third + std * noise)


@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, HeunDiscreteScheduler])
def test_the_scheduler_is_as_it_was_there(pipe, cls):
    """Done again from the very same z, the steps give the very same samples."""
    run = sampling(pipe, Travel(length=3), cls)
    again = run._again
    again.back = lambda z, first, last, own=again.back: (own(z, first, last), start)[1]
    steps = iter(run)
    start, seen = None, []
    for step in steps:
        start = step.z if step.index == 0 and start is None else start
        seen.append((step.index, step.repeat, step.z))
        if step.repeat and step.index == 2:
            break
    second = {index: z for index, repeat, z in seen if repeat}
    assert all(torch.equal(second[index], z) for index, repeat, z in seen if index in second)


def test_no_jump_is_none_and_wrong_ones_are_refused(pipe):
    with pytest.warns(UserWarning, match="travel never acted"):
        idle = sampling(pipe, Travel(times=1)).finish()
    assert torch.equal(idle.latents, sampling(pipe, None).finish().latents)

    class Far(Travel):
        def jumps(self, step):
            return 2

    with pytest.raises(
        GuidekitError, match="far jumps 2 steps back from step 0; it may from 0 to 1"
    ):
        sampling(pipe, Far()).finish()
    with pytest.raises(GuidekitError, match="travel jumps back, which a pipeline's own loop"):
        with guidekit.attach(pipe, [Travel()]):
            pass


@dataclass(kw_only=True)
class Twice(Guidance):
    """Does every step of its window twice."""

    def repeats(self, step):
        return 2


@pytest.mark.parametrize(
    "guidances, kept",
    [
        ([], [[], [], [], []]),
        ([Twice(start=0.25, stop=0.75)], [[], [1], [2], []]),
        ([Travel()], [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]),
        ([Travel(times=1, stop=0.5)], [[0], [0, 1], [], []]),
        ([Travel(times=1, stop=0.25), Twice(start=0.5)], [[0], [], [2], [3]]),
    ],
    ids=["nobody", "repeats", "jumps", "jumps early", "both"],
)
def test_schedulers_are_kept_only_while_somebody_may_go_back(pipe, guidances, kept):
    run = sampling(pipe, None, guidances=guidances)
    found = {}
    for step in run:
        found.setdefault(step.index, sorted(run._again.kept))
    assert list(found.values()) == kept


def test_steps_without_an_end_are_refused(monkeypatch):
    monkeypatch.setattr("guidekit.engine.recurrence.MOST", 3)
    with pytest.raises(GuidekitError, match="step 0 was done 3 times; end its repeats or jumps"):
        Sampling(exact.pipeline(), Condition(), [Travel(times=9)], steps=4).finish()


def test_jumps_leave_the_law():
    """An exact model's samples stay those of the mixture."""
    given = {"seeds": range(64), "steps": 50}
    with torch.no_grad():
        z = Sampling(exact.pipeline(), Condition(), [Travel(length=5)], **given).finish().latents
    assert float(z.mean()) == pytest.approx(0, abs=0.02)
    assert float(z.std()) == pytest.approx((exact.MEAN**2 + exact.STD**2) ** 0.5, abs=0.05)
