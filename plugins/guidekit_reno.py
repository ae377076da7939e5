"""ReNO: the first noise is chosen so that a one-step model's image has a higher reward.

Eyring, Karthik, Roth, Dosovitskiy, Akata: ReNO: Enhancing One-step Text-to-Image Models through
Reward-based Noise Optimization, NeurIPS 2024, arXiv:2406.04312. Gradient ascent on a differentiable
reward of the image, through the model, with a term that keeps the noise's norm where a normal
distribution has it (section 3); the best noise of all iterations is drawn. With more steps than one
it goes through all of them, as D-Flow does (Ben-Hamu et al. 2024, arXiv:2402.14017).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit import Guidance, GuidekitError, Run, hookimpl
from guidekit.toolbox import ImportPath, Reward, RewardFunction, guiding, rewarded


@dataclass(kw_only=True)
class Reno(Guidance):
    """Begins with noise of a higher reward; each image by itself."""

    plugin = "reno"

    scale: float = 1.0  # factor on the reward; 0 switches it off
    # brightness, contrast, or MODULE:NAME of a Reward or a function of images in [-1, 1]; in Python
    # one of these
    reward: ImportPath | Reward | RewardFunction = "contrast"
    iterations: int = 50  # gradient steps
    rate: float = 5.0  # size of a gradient step
    bound: float = 0.1  # largest norm of an image's gradient
    momentum: float = 0.9  # Nesterov's
    prior: float = 0.01  # weight of the negative logarithm of the norm's density

    def __post_init__(self):
        super().__post_init__()
        if self.iterations < 0 or not self.bound > 0 or not 0 <= self.momentum < 1:
            raise GuidekitError(
                f"{self.name}: iterations is at least 0, bound above 0, momentum from 0 to below 1"
            )

    def begin(self, run: Run) -> Tensor | None:
        """The first z of the best noise, by the reward alone."""
        if not self.iterations:
            return None
        reward = guiding(self.reward, self.name, run.account.guided)
        unit = run.first_std
        noise = run.first.detach().float() / unit
        speed = torch.zeros_like(noise)
        best, most = noise, torch.full((len(noise),), -math.inf, device=noise.device)
        for step in range(self.iterations + 1):
            noise = noise.detach().requires_grad_()
            with torch.enable_grad():
                images = run.denoiser.pixels(run.rollout(noise * unit))
                found = rewarded(reward, images, self.name)
                loss = self.prior * _surprise(noise) - self.scale * found
                (grad,) = torch.autograd.grad(loss.sum(), noise)
            better = (found > most).detach()
            best = torch.where(better[:, None, None, None], noise.detach(), best)
            most = torch.where(better, found.detach(), most)
            run.account.reward(self.name, 0, step, found)
            norm = grad.flatten(1).norm(dim=1)[:, None, None, None]
            grad = grad * (self.bound / norm.clamp(min=self.bound))
            speed = self.momentum * speed + grad
            noise = noise.detach() - self.rate * (grad + self.momentum * speed)
        return best * unit

    @classmethod
    def example(cls) -> "Reno":
        """Two iterations."""
        return cls(iterations=2)


def _surprise(noise: Tensor) -> Tensor:
    """Minus the log-density (B,) of the norm of normal noise (B, C, h, w), but for a constant."""
    norm = noise.flatten(1).norm(dim=1)
    return norm**2 / 2 - (noise[0].numel() - 1) * norm.log()


@hookimpl
def register_guidance(register):
    """Offers `reno`."""
    register("reno", Reno)
