"""Unconditional pixel models in the own loop: the bare pipeline's images, energies, refusals."""

import json
from dataclasses import dataclass

import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler

from guidekit import Condition, Guidance, Sampling, Segment, box_mask, load
from guidekit.__main__ import main
from guidekit.errors import GuidekitError
from guidekit.reads import FeatureRead
from guidekit.testing.miniatures import ddpm_pipeline
from guidekit_multidiffusion import MultiDiffusion
from guidekit_zest import Zest

ANY = Condition()


def generators(seeds=(5, 6)):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("learned", [False, True])
def test_ddpm_is_the_bare_pipeline(learned):
    pipe = ddpm_pipeline(learned)
    expected = pipe(
        batch_size=2, generator=generators(), num_inference_steps=4, output_type="pt"
    ).images
    ours = Sampling(pipe, ANY, seeds=[5, 6], steps=4).finish()
    assert torch.equal(ours.images, expected)
    assert ours.run.cfg == 1


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_is_the_bare_pipeline(eta):
    pipe = DDIMPipeline(ddpm_pipeline().unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        batch_size=2, generator=generators(), num_inference_steps=4, eta=eta, output_type="pt"
    ).images
    ours = Sampling(pipe, ANY, seeds=[5, 6], steps=4, eta=eta).finish()
    assert torch.equal(ours.images, expected)


@dataclass(kw_only=True)
class Dark(Guidance):
    """Darkens, by a shift of the mean of DDPM's next step, and reads features."""

    scale: float = 1.0

    def prepare(self, run):
        self.read = run.read(self, FeatureRead(("mid_block",)))

    def energy(self, step):
        assert step.cond.features(self.read)["mid_block"].shape[1:] == (64, 8, 8)
        pixels = step.decode(step.x0)
        assert pixels.shape[1:] == (3, 16, 16)
        return step.encode(pixels).sum((1, 2, 3))

    @property
    def rule(self):
        return (type(self), self.scale)

    def push(self, step, grad):
        return step.move.mean(-self.scale * grad)


@pytest.mark.parametrize("learned", [False, True])
def test_energies_of_x0_and_features(learned):
    pipe = ddpm_pipeline(learned)
    plain = Sampling(pipe, ANY, seeds=[5, 6], steps=4).finish()
    guided = Sampling(pipe, ANY, [Dark()], seeds=[5, 6], steps=4).finish()
    assert guided.latents.mean() < plain.latents.mean() - 0.1
    alone = Sampling(pipe, ANY, [Dark()], seeds=[6], steps=4).finish()
    assert (alone.images[0] - guided.images[1]).abs().max() < 1e-4


def test_a_mean_is_moved_by_the_learned_variance():
    """The next z moves by variance * grad, the variance being that of the step's noise."""
    pipe = ddpm_pipeline(learned=True)
    step = next(iter(Sampling(pipe, ANY, [Dark()], seeds=[5, 6], steps=4)))
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(4)

    def stepped(out):
        out = torch.cat([out, step.variance], 1)
        return scheduler.step(out, step.timestep, step.z, generator=generators()).prev_sample

    grad = torch.randn_like(step.z)
    change = step.move.mean(grad)
    moved = stepped(step.out + change) - stepped(step.out)
    # The same step with noise of one sample and another, whose mean it shares.
    log = scheduler._get_variance(int(step.timestep), predicted_variance=step.variance)
    torch.testing.assert_close(moved, log.exp() * grad, rtol=1e-3, atol=1e-4)


def test_plugins_without_text():
    pipe = ddpm_pipeline()
    plain = Sampling(pipe, ANY, steps=3).finish()
    guided = Sampling(pipe, ANY, [MultiDiffusion(window=8, stride=4)], steps=3).finish()
    assert not torch.equal(guided.images, plain.images)
    wide = Sampling(pipe, ANY, steps=2, height=16, width=32).finish()
    assert wide.images.shape == (1, 3, 16, 32)


SEGMENT = Segment("red", box_mask((0, 0, 0.5, 1)))


@pytest.mark.parametrize(
    "condition, guidances, options, message",
    [
        (Condition("a fox"), [], {}, "reads no prompt; leave it out"),
        (Condition(negative="a fox"), [], {}, "reads no negative"),
        (Condition(segments=(SEGMENT,)), [], {}, "reads no segments"),
        (Condition(label=3), [], {}, "no class labels"),
        (ANY, [], {"cfg": 3.0}, "no classifier-free guidance; leave cfg at 1"),
        (ANY, [], {"embedded_cfg": 3.0}, "no guidance scale as an input"),
        (ANY, [], {"height": 15}, "multiples of 2"),
        (ANY, [Zest()], {}, "zest needs a prompt that pixels attend to, and DDPMPipeline has none"),
    ],
)
def test_what_has_no_meaning_is_refused(condition, guidances, options, message):
    with pytest.raises(GuidekitError, match=message):
        Sampling(ddpm_pipeline(), condition, guidances, steps=2, **options)


def test_the_command_line_needs_no_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ddpm_pipeline().save_pretrained("model")
    assert type(load("model")).__name__ == "DDPMPipeline"
    args = ["sample", "--model", "model", "--steps", "2", "--seeds", "0-1"]
    result = CliRunner().invoke(main, [*args, "--out", "o"])
    assert result.exit_code == 0, result.stderr
    assert "prompt" not in result.stdout
    assert "cfg 1" in result.stdout
    run = json.loads((tmp_path / "o/run.json").read_text())
    assert run["sample"]["prompt"] == ""
    assert run["record"]["tokens"] == []
    again = CliRunner().invoke(main, ["sample", "--config", "o/run.json", "--out", "p"])
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "o/1.png").read_bytes()[-4000:] == (tmp_path / "p/1.png").read_bytes()[
        -4000:
    ]
    refused = CliRunner().invoke(main, [*args, "--prompt", "a fox"])
    assert refused.exit_code == 2
    assert "reads no prompt" in refused.stderr
