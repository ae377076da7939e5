"""Feynman-Kac steering: particles of one prompt, those with more reward going on.

Singhal, Horvitz, Teehan, Ren, Yu, McKeown, Ranganath: A General Framework for Inference-time
Scaling and Steering of Diffusion Models, 2025, arXiv:2501.06848. At chosen steps each particle's
clean estimate has a reward, a potential of it is a weight, and the particles of a group are
resampled by their weights (sections 3 and 4). What comes out follows p(x) exp(scale * r(x)) as
their number grows. Weights are kept in logarithms, also over steps that resample nobody.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from guidekit import Guidance, GuidekitError, Run, Step, hookimpl
from guidekit.toolbox import (
    ImportPath,
    Reward,
    RewardFunction,
    derived_seed,
    guiding,
    other_scheduler,
    rewarded,
    schedulers_for,
    systematic,
)

NOISY = ("ddpm", "euler-a", "sa")


@dataclass(kw_only=True)
class FeynmanKac(Guidance):
    """Resamples the particles of a group by rewards; `--particles` says how many a group has.

    Copies of a particle part only where the solver adds noise: ddpm, euler-a, or ddim with eta.
    """

    plugin = "fk"

    scale: float = 2.0  # lambda, the factor on rewards in the exponent; 0 switches it off
    # brightness, contrast, or MODULE:NAME of a Reward or a function of images in [-1, 1]; in Python
    # one of these
    reward: ImportPath | Reward | RewardFunction = "contrast"
    potential: Literal["max", "diff", "sum"] = "max"  # of a particle's rewards so far
    at: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)  # fractions of the steps; the end comes with them
    ess: float = 1.0  # resamples where the effective share of particles is at most this

    own_loop = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.ess <= 1 or any(not 0 <= f < 1 for f in self.at):
            raise GuidekitError(
                f"{self.name}: ess lies above 0 up to 1, and `at` from 0 to below 1"
            )

    def prepare(self, run: Run) -> None:
        """Finds the reward, and notes where copies of a particle would stay copies."""
        self._reward = guiding(self.reward, self.name, run.account.guided)
        count, device = len(run.seeds), run.device
        zero = torch.zeros(count, dtype=torch.float64, device=device)
        #: Log-weights since the last resampling, of all potentials so far; rewards seen by them.
        self._weight, self._spent, self._seen = zero, zero, None
        middle = run.levels.move(len(run.levels) // 2)
        if max(map(len, run.groups)) > 1 and middle.noise_std == 0:
            run.account.note(
                f"{self.name}: the solver adds no noise, so copies of a particle stay copies; "
                + other_scheduler(run.scheduler, NOISY)
                + (", or ddim with --eta 1" if "ddim" in schedulers_for(run.scheduler) else "")
            )

    def resample(self, step: Step, z: Tensor) -> Tensor | None:
        """The particles that go on, at the steps of `at` and at the last one."""
        last = step.index == step.n - 1
        if not last and step.index not in {round(f * step.n) for f in self.at}:
            return None
        if not last and not step.informative:
            return None
        reward = self._rewards(step, z, last)
        self._weight = self._weight + self._potential(reward, last)
        rows, shares = torch.arange(len(z)), torch.ones(len(z))
        for members in step.run.groups:
            own = torch.tensor(members)
            weights = self._weight[own.to(z.device)].cpu().softmax(0)
            shares[own] = float(1 / (len(members) * weights.square().sum()))
            if len(members) > 1 and shares[members[0]] <= self.ess:
                seed = derived_seed(step.run.seeds[members[0]], step.index, step.repeat, self.name)
                rows[own] = own[systematic(weights, torch.Generator().manual_seed(seed))]
                self._weight[own.to(z.device)] = 0.0
        self._move(rows.to(z.device))
        parent = [step.run.seeds[row] for row in rows]
        step.run.account.reward(
            self.name, step.index, step.repeat, reward, share=shares.tolist(), parent=parent
        )
        return rows

    def _rewards(self, step: Step, z: Tensor, last: bool) -> Tensor:
        """Rewards (B,) of the clean estimates, at the end of the images themselves."""
        x0 = z if last else step.level.x0(step.prediction, step.z)
        return rewarded(self._reward, step.decode(x0), self.name).double()

    def _potential(self, reward: Tensor, last: bool) -> Tensor:
        """The logarithm of a step's potential (B,): all of a run make scale * its last reward."""
        if self.potential == "diff":
            value = reward if self._seen is None else reward - self._seen
            self._seen = reward
        else:
            join = torch.maximum if self.potential == "max" else torch.add
            self._seen = reward if self._seen is None else join(self._seen, reward)
            value = reward if last else self._seen
        found = self.scale * value
        if last and self.potential != "diff":
            found = found - self._spent
        self._spent = self._spent + found
        return found

    def _move(self, rows: Tensor) -> None:
        """What is kept of a particle goes with it; its weight was spent on being chosen."""
        self._spent, self._seen = self._spent[rows], self._seen[rows]

    @classmethod
    def example(cls) -> "FeynmanKac":
        """A strong reward at every step of a short run."""
        return cls(scale=2000.0, at=(0.0, 0.34, 0.67))


@hookimpl
def register_guidance(register):
    """Offers `fk`."""
    register("fk", FeynmanKac)
