"""Groups of images: batches, resampling with the scheduler's history, and what may not meet."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

import guidekit
import tiny
from guidekit import Condition, Guidance, Sampling, draw
from guidekit.errors import GuidekitError
from guidekit.groups import batches, systematic, with_particles
from guidekit.testing import check_guidance
from guidekit.testing.miniatures import sd3_pipeline

SCHEDULERS = [
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
]
RED = Condition("a red circle")


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


@dataclass(kw_only=True)
class Swap(Guidance):
    """Exchanges the images of a group at one call."""

    index: int = 2
    rows: tuple[int, ...] = (1, 0)

    def resample(self, step, z):
        return torch.tensor(self.rows) if step.index == self.index else None


@pytest.mark.parametrize("cls", [*SCHEDULERS, None])
def test_the_history_goes_with_the_image(pipe, cls):
    """Images that change places after a call end in each other's place, bit for bit."""
    pipe = sd3_pipeline() if cls is None else pipe
    scheduler = pipe.scheduler if cls is None else cls.from_config(pipe.scheduler.config)
    given = {"seeds": [5, 6], "steps": 5, "cfg": 1.0, "scheduler": scheduler}
    plain = Sampling(pipe, RED, **given).finish()
    swapped = Sampling(pipe, RED, [Swap()], particles=2, **given).finish()
    torch.testing.assert_close(swapped.latents, plain.latents.flip(0), rtol=1e-5, atol=1e-5)
    assert swapped.account.edits == {"swap": 1}


def test_sasolvers_history_goes_too(pipe):
    scheduler = SASolverScheduler.from_config(pipe.scheduler.config, tau_func=lambda t: 0)
    given = {"seeds": [5, 6], "steps": 5, "cfg": 1.0, "scheduler": scheduler}
    plain = Sampling(pipe, RED, **given).finish()
    swapped = Sampling(pipe, RED, [Swap()], particles=2, **given).finish()
    torch.testing.assert_close(swapped.latents, plain.latents.flip(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rows, message",
    [
        ((0, 2, 2, 3), r"continues image 1 from image 2, which is not of its group; .*\[2, 3\]"),
        ((0, 1, 2, 7), "from image 7"),
        ((0, 1), "give a row's number for each image"),
    ],
)
def test_groups_do_not_meet(pipe, rows, message):
    with pytest.raises(GuidekitError, match=message):
        Sampling(pipe, RED, [Swap(rows=rows)], seeds=range(4), steps=4, particles=2).finish()


def test_a_batch_cuts_no_group():
    conditions = [replace(RED, group=g) for g in ("a", "b", "a", None, "b", "c", "c", "c")]
    assert batches(conditions, 4) == [[0, 2, 1, 4], [3, 5, 6, 7]]
    assert batches(conditions, 3) == [[0, 2], [1, 4, 3], [5, 6, 7]]
    assert batches(conditions, 1) == [[0, 2], [1, 4], [3], [5, 6, 7]]
    assert batches([RED] * 5, 2) == [[0, 1], [2, 3], [4]]


@dataclass(kw_only=True)
class Seen(Guidance):
    """Notes the seeds of every run and their groups."""

    runs: ClassVar[list] = []

    def prepare(self, run):
        self.runs.append((list(run.seeds), run.groups))

    def edit_prediction(self, step, out):
        return 0.99 * out


def test_draw_keeps_groups_and_the_order_of_seeds(pipe):
    Seen.runs.clear()
    images = draw(pipe, RED, [Seen()], seeds=range(6), batch=3, particles=2, steps=2)
    assert Seen.runs == [([0, 1], [[0, 1]]), ([2, 3], [[0, 1]]), ([4, 5], [[0, 1]])]
    plain = draw(pipe, RED, [Seen()], seeds=range(6), batch=6, steps=2)
    assert (images - plain).abs().max() < 1e-4
    with pytest.raises(GuidekitError, match="would cut groups"):
        draw(pipe, RED, seeds=range(4), particles=2, tries=2)


def test_wrong_particles_are_refused(pipe):
    with pytest.raises(GuidekitError, match="3 images are no groups of 2 particles"):
        with_particles([RED] * 3, 2)
    with pytest.raises(GuidekitError, match="have groups already"):
        with_particles([replace(RED, group=1)] * 2, 2)
    with pytest.raises(GuidekitError, match="particles must be at least 1, not 0"):
        Sampling(pipe, RED, particles=0)
    with pytest.raises(
        GuidekitError, match="swap resamples particles, which a pipeline's own loop"
    ):
        with guidekit.attach(pipe, [Swap()]):
            pass


def test_systematic_resampling_draws_by_weight():
    weights = torch.tensor([0.5, 0.3, 0.2])
    draws = [systematic(weights, torch.Generator().manual_seed(s)).tolist() for s in range(2000)]
    assert all(1 <= rows.count(0) <= 2 and len(rows) == 3 for rows in draws)
    shares = torch.tensor([[rows.count(i) / 3 for i in range(3)] for rows in draws]).mean(0)
    torch.testing.assert_close(shares, weights, rtol=0, atol=0.02)


def test_on_the_command_line(model, tmp_path):
    from click.testing import CliRunner

    from guidekit.__main__ import main

    args = ["sample", "--model", str(model), "--prompt", "a red circle", "--steps", "3"]
    args += ["--seeds", "0-3", "--particles", "2", "--batch", "3", "--eta", "1", "--no-compare"]
    args += ["--plugin", "fk", "--set", "fk.scale=100", "--set", "fk.at=0,0.34", "--json"]
    result = CliRunner().invoke(main, [*args, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    assert kept["sample"]["particles"] == 2
    rows = kept["record"]["account"]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(len(row["reward"]) == len(row["parent"]) == 4 for row in rows)


@dataclass(kw_only=True)
class Blend(Guidance):
    """Mixes all images of a batch, whatever group they are of (2026)."""

    grouped = True

    def edit_prediction(self, step, out):
        return out + 0.1 * out.mean(0, keepdim=True)


@pytest.mark.full
def test_the_suite_finds_groups_that_meet():
    with pytest.raises(AssertionError, match="group 0 differs by .* beside another group"):
        check_guidance(Blend, ["groups"])
