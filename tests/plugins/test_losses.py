"""Gradients of losses: what a step does is what the papers' formulas say, on three schedulers."""

import dataclasses
import functools
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import EulerDiscreteScheduler
from PIL import Image
from torch import nn

import exact
import guidekit
import tiny
from guidekit import Condition, Guidance, GuidekitError, Sampling
from guidekit.__main__ import main
from guidekit.testing.miniatures import ddpm_pipeline, sd3_pipeline
from guidekit.toolbox import Downsampling
from guidekit_ddnm import Ddnm
from guidekit_dps import Dps
from guidekit_energy import Energy
from guidekit_flowchef import FlowChef
from guidekit_freedom import FreeDom
from guidekit_mpgd import Mpgd
from guidekit_psld import Psld
from guidekit_tfg import TrainingFree
from guidekit_ugd import Universal

A = Downsampling(4)
Y = torch.linspace(-1, 1, 192).view(3, 8, 8)
CASES = {"ddim": tiny.sd_pipeline, "euler": tiny.sd_pipeline, "sd3": sd3_pipeline}


@functools.cache
def pipeline(build):
    return build().to(torch.float64)


def sampling(case, *guidances, steps=3, **options):
    pipe = pipeline(CASES[case])
    if case == "euler":
        options["scheduler"] = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    targets = {g.name: Y for g in guidances if not isinstance(g, Recorded)}
    condition = Condition("a red circle", targets=targets)
    return Sampling(pipe, condition, guidances, seeds=[5], steps=steps, cfg=5.0, **options)


def moves(case, guidance, **options):
    """Of every informative step: the step, and how far it moves the next z from the bare step."""
    run = sampling(case, guidance, **options)
    steps = list(run)
    after = [step.z for step in steps[1:]] + [run.latents]
    for step, z in zip(steps, after, strict=True):
        if step.informative:
            out = step.out.detach()
            x0, eps = step.level.x0(out, step.z), step.level.eps(out, step.z)
            yield step, x0, z - (step.next_level.a * x0 + step.next_level.s * eps)


def residual_gradient(step, x0, power=1):
    """Of |y - A D(x0)| at x0, or of its square."""
    with torch.enable_grad():
        x0 = x0.detach().requires_grad_()
        norm = (Y - A.forward(step.decode(x0))).flatten(1).norm(dim=1)
        return torch.autograd.grad((norm**power).sum(), x0)[0]


def vp(level):
    """a of the papers, where a^2 + s^2 = 1."""
    return level.a / level.norm


def close(found, expected):
    """To 1e-5, and to what the schedulers' tables, which are float32, round of z."""
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * size + 3e-6)


@pytest.mark.parametrize("case", CASES)
def test_mpgd_is_its_formula(case):
    """x0 - rho / a grad, then the step with the old noise."""
    seen = list(moves(case, Mpgd(scale=100.0)))
    assert len(seen) >= 2
    for step, x0, move in seen:
        expected = -step.next_level.a * 100 / vp(step.level) * residual_gradient(step, x0)
        close(move, expected)


@pytest.mark.parametrize("case", CASES)
def test_flowchef_is_its_formula(case):
    for step, x0, move in moves(case, FlowChef(scale=100.0, stop=1.0)):
        close(move, -100 * step.next_level.norm * residual_gradient(step, x0))


@pytest.mark.parametrize("case", CASES)
def test_tfg_without_the_denoisers_gradient(case):
    """Two ascents by mu on -|y - A x|^2; mu is constant over the run."""
    tfg = TrainingFree(rho=0.0, mu=5.0, sigma=0.0, inner=2, mu_shape="constant")
    for step, x0, move in moves(case, tfg):
        first = x0 - 5 * residual_gradient(step, x0, 2)
        second = first - 5 * residual_gradient(step, first, 2)
        close(move, step.next_level.a * (second - x0))


@dataclass(kw_only=True)
class Recorded(Guidance):
    """Keeps the gradient of the residual through the denoiser, and moves nothing."""

    power: int = 1

    def energy(self, step):
        value = (Y - A.forward(step.decode(step.x0))).flatten(1).norm(dim=1) ** self.power
        self.grad = torch.autograd.grad(value.sum(), step.z, retain_graph=True)[0]
        return value

    def push(self, step, grad):
        return torch.zeros_like(grad)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("guidance", [Dps(scale=100.0), TrainingFree(rho=20.0, mu=0.0, sigma=0.0)])
def test_gradients_through_the_denoiser(case, guidance):
    """DPS and TFG: z' moves against the gradient, by zeta or rho a' / a, of the model's input."""
    start = 0.3 if case == "sd3" else 0.0  # its first z holds nothing of the image
    guidance = dataclasses.replace(guidance, start=start)
    step, _, move = next(found for found in moves(case, guidance) if found[0].frac >= start)
    recorded = Recorded(power=1 if isinstance(guidance, Dps) else 2, start=start)
    run = sampling(case, recorded)
    next(s for s in run if s.index == step.index)
    levels, grad = run.run.levels, run.guidances[0].grad
    if isinstance(guidance, Dps):
        rho = 100 * step.next_level.norm
    else:
        ratios = [(vp(levels.at(k)) / vp(levels.next(k))) ** 2 for k in range(3)]
        rho = 20 * ratios[step.index] / (sum(ratios) / 3) / vp(step.level)
        rho = rho * step.next_level.a
    close(move, -rho * grad * step.level.norm)


@pytest.mark.parametrize("case", ["ddim", "sd3"])
def test_freedom_moves_by_the_contrast(case):
    """Each move is scale * cfg * the norm of the contrast of eps long, whatever the gradient."""
    for step, _, move in moves(case, FreeDom(times=1)):
        null, cond = (step.level.eps(e.out, step.z) for e in (step.evals["null"], step.cond))
        wanted = 0.2 * 5 * float((cond - null).norm()) * step.next_level.norm
        assert float(move.norm()) == pytest.approx(wanted, rel=1e-3)


def test_freedom_repeats_in_the_middle():
    guidance, seen = FreeDom(loss=brightness, times=2, again=(0.3, 0.6)), []
    run = Sampling(ddpm_pipeline(), Condition(), [guidance], steps=3)
    own = run.guidances[0]
    own.push = lambda step, grad: _seen(seen, own, step, grad)
    run.finish()
    assert seen == [(0, 0), (1, 0), (1, 1), (2, 0)]


def _seen(seen, guidance, step, grad):
    seen.append((step.index, step.repeat))
    return FreeDom.push(guidance, step, grad)


def test_universal_guidance_descends_and_reads_eps_anew():
    guidance = Universal(scale=1e-9, backward=8, rate=0.1)
    run = sampling("ddim", guidance)
    for step in run:
        before = step.level.x0(step.out.detach(), step.z)
        after = step.level.x0(step.prediction, step.z)
        norms = [(Y - A.forward(step.decode(x))).norm() for x in (before, after)]
        assert norms[1] < norms[0]


def test_psld_on_pixels_is_dps_twice():
    """Without an autoencoder both norms are the measurement's: |A^+ r| is 4 |r| here."""
    given = {"seeds": [5], "steps": 3}
    pipe, y = ddpm_pipeline(), Y[:, :4, :4]
    ours, plain = (
        Sampling(pipe, Condition(targets={g.name: y}), [g], **given).finish().latents
        for g in (Psld(gluing=0.25), Dps(scale=2.0))
    )
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_measurements_are_files(tmp_path):
    """What they show where an operator measures; a mask is white where nothing is known."""
    image = Image.radial_gradient("L").resize((8, 8)).convert("RGB")
    image.save(tmp_path / "y.png")
    mask = Image.new("L", (8, 8))
    mask.paste(255, (2, 2, 6, 6))
    mask.save(tmp_path / "holes.png")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    cases = {
        "inpainting": Ddnm(operator="inpainting", mask=tmp_path / "holes.png"),
        "hole": Ddnm(operator="inpainting", hole=(0.25, 0.25, 0.75, 0.75)),
        "grey": Ddnm(operator="grey"),
    }
    drawn = {}
    for name, guidance in cases.items():
        guidance = dataclasses.replace(guidance, measurement=tmp_path / "y.png")
        pipe = exact.pipeline(exact.Gaussian)
        run = Sampling(pipe, Condition(), [guidance], seeds=[5], steps=3).finish()
        operator = run.guidances[0]._linear
        drawn[name] = run.latents
        torch.testing.assert_close(
            operator.forward(run.latents), operator.forward(pixels[None]), rtol=0, atol=1e-4
        )
    assert torch.equal(drawn["inpainting"], drawn["hole"])


def test_in_a_pipeline():
    pipe, guidance = tiny.sd_pipeline(), Mpgd(measurement="scene-3", scale=3.0)
    with guidekit.attach(pipe, [guidance]):
        found = pipe(
            "a red circle",
            num_inference_steps=3,
            guidance_scale=5.0,
            output_type="latent",
            generator=[torch.Generator().manual_seed(5)],
        ).images
    given = {"seeds": [5], "steps": 3, "cfg": 5.0}
    ours = Sampling(pipe, Condition("a red circle"), [guidance], **given).finish().latents
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)


def brightness(images):
    return -images.mean((1, 2, 3))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, images):
        return -(images.mean((2, 3)) * self.weight).mean(1)


def test_any_loss_by_name_function_or_network():
    pipe, network = ddpm_pipeline(), Network()
    given = {"seeds": [5, 6], "steps": 3}
    losses = ("test_losses:brightness", brightness, network)
    runs = [Sampling(pipe, Condition(), [Energy(loss=x, scale=30)], **given) for x in losses]
    found = [run.finish().latents for run in runs]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)
    assert network.weight.requires_grad
    assert network.weight.grad is None
    assert found[0].mean() > Sampling(pipe, Condition(), **given).finish().latents.mean()
    with pytest.raises(GuidekitError, match=r"energy.loss gives \(\)"):
        Sampling(pipe, Condition(), [Energy(loss=lambda x: x.mean())], **given).finish()
    with pytest.raises(GuidekitError, match="energy.loss 'beauty': write MODULE:NAME"):
        Sampling(pipe, Condition(), [Energy(loss="beauty")], **given)


def test_what_cannot_be_measured_is_refused():
    pipe, given = ddpm_pipeline(), {"seeds": [5], "steps": 3}
    wrong = {
        "needs a measurement: --set dps.measurement=FILE": Dps(),
        "does not divide": Dps(down=5),
        "write MODULE:NAME, downsampling, inpainting, grey": Dps(operator="blur"),
    }
    for match, guidance in wrong.items():
        with pytest.raises(GuidekitError, match=match):
            Sampling(pipe, Condition(), [guidance], **given)
    with pytest.raises(GuidekitError, match=r"the measurement is \(3, 8, 8\), and its operator"):
        Sampling(pipe, Condition(targets={"dps": Y}), [Dps()], **given)
    with pytest.raises(GuidekitError, match="hole is left, top, right and bottom"):
        Dps(hole=(0.5, 0.5, 0.2, 1.0))


def test_a_file_names_no_code(tmp_path):
    """A run.json of a stranger imports nothing; the user's own --set does."""
    config = tmp_path / "run.json"
    config.write_text(json.dumps({"plugin": {"energy": {"loss": "antigravity:fly"}}}))
    args = ["sample", "--config", str(config), "--model", "digits-ddpm", "--out", str(tmp_path)]
    refused = CliRunner().invoke(main, args)
    assert refused.exit_code == 2
    assert "antigravity" not in __import__("sys").modules
    assert "say so by --set energy.loss=antigravity:fly" in refused.output
    count = [*args, "--set", "energy.loss=test_losses:brightness", "--count", "2"]
    planned = CliRunner().invoke(main, count)
    assert planned.exit_code == 2
    assert "a plan names no code" in planned.output
    own = [*args, "--set", "energy.loss=test_losses:brightness", "--steps", "2", "--seeds", "1"]
    assert CliRunner().invoke(main, own).exit_code == 0
