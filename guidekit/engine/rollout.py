"""From the first z to finished latents with gradient: a run's steps, without guidances.

For methods that choose the noise: Ben-Hamu et al. 2024 (D-Flow, arXiv:2402.14017), Eyring et al.
2024 (ReNO, arXiv:2406.04312). Steps are the first-order ones between the run's levels,
z' = a' x0 + s' eps, which are those of DDIM without noise, Euler and flow matching's Euler; others
are approximated by them. Memory is that of one step, as each is computed again in backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from guidekit.branches import combination
from guidekit.engine.calls import own_branches
from guidekit.engine.capture import Call
from guidekit.engine.evaluator import Evaluator
from guidekit.noise import wide
from guidekit.run import Run


class Rollout:
    """Calling it with a first z (B, C, h, w) gives finished latents of that shape."""

    def __init__(self, run: Run, evaluator: Evaluator):
        self.run, self.evaluator = run, evaluator

    def __call__(self, z: Tensor) -> Tensor:
        """Finished latents (B, C, h, w), in float32 or better."""
        (z,) = wide(z)
        for calls in self.run.levels.steps:
            z = checkpoint(self._step, z, calls, use_reentrant=False)
        return z

    def _step(self, z: Tensor, calls: range) -> Tensor:
        """The next z, from the model's output at the first call of a step of the solver."""
        levels = self.run.levels
        level, following = levels.at(calls[0]), levels.next(calls[-1])
        out = self._output(z, calls[0])
        return following.a * level.x0(out, z) + following.s * level.eps(out, z)

    def _output(self, z: Tensor, index: int) -> Tensor:
        """The output of classifier-free guidance (B, C, h, w)."""
        run = self.run
        timestep: Any = run.scheduler.timesteps[run.levels.start + index]
        x = z / run.levels.at(index).norm  # what `scale_model_input` does, at any step
        branches = own_branches(run)
        calls = [
            Call(
                branch,
                x,
                timestep,
                run.told(branch, index, len(run.levels)),
                lengths=run.lengths(branch.prompts),
                graph=torch.is_grad_enabled(),
            )
            for branch in branches
        ]
        outs = {e.branch.name: e.out for e in self.evaluator.evaluate(calls)}
        combined = combination(branches, outs)
        return combined if len(outs) == 1 else run.denoiser.rescaled(combined, outs["cond"])
