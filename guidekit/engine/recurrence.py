"""Steps that are done again: the scheduler as it was before them, and how often each was done.

One step over: FreeDoM, Yu et al. 2023 (arXiv:2303.09833), Algorithm 2; several at once: RePaint,
Lugmayr et al. 2022 (arXiv:2201.09865), section 4.2.
"""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.run import Run

MOST = 1000  # times that one step may be done


class Recurrence:
    """The ways back of a run. Places are numbers of the solver's steps.

    A scheduler is kept only while somebody may go back to it: before a step that is repeated until
    the next one, before others until the last step from which a guidance may jump.
    """

    def __init__(self, run: Run, guidances: Sequence[Guidance]):
        self._run = run
        self._before: dict[int, Any] = {}  # by place, the scheduler before its step
        self._done: dict[int, int] = {}  # by place, how often its step was done
        steps = run.levels.steps
        self._repeated = {
            place for place, calls in enumerate(steps) if _acts(run, guidances, "repeats", calls[0])
        }
        jumping = [p for p, calls in enumerate(steps) if _acts(run, guidances, "jumps", calls[-1])]
        self._last_jump = max(jumping, default=-1)

    @property
    def kept(self) -> dict[int, Any]:
        """The schedulers of the places that a run may go back to."""
        return self._before

    def enter(self, place: int) -> int:
        """Before the step at `place` is done: how often it was already.

        Raises GuidekitError for one that never ends.
        """
        if place > self._last_jump:
            self._before.clear()
        if place <= self._last_jump or place in self._repeated:
            self._before[place] = copy.deepcopy(self._run.scheduler)
        repeat = self._done.get(place, 0)
        if repeat == MOST:
            call = self._run.levels.steps[place][0]
            raise GuidekitError(f"step {call} was done {MOST} times; end its repeats or jumps")
        self._done[place] = repeat + 1
        return repeat

    def back(self, z: Tensor, first: int, last: int) -> Tensor:
        """From the level after the step at `last` back to the one before the step at `first`.

        The run's scheduler is again as it was there.
        """
        run, calls = self._run, self._run.levels.steps[first]
        run.scheduler = copy.deepcopy(self._before[first])
        noisier, cleaner = run.levels.at(calls[0]), run.levels.next(run.levels.steps[last][-1])
        gain = noisier.a / cleaner.a
        std: float = max(noisier.s**2 - (gain * cleaner.s) ** 2, 0.0) ** 0.5
        fresh = run.noise(run.latent_shape, calls[0], self._done[first], "recurrence")
        return gain * z + std * fresh.to(z.dtype)


def _acts(run: Run, guidances: Sequence[Guidance], hook: str, index: int) -> bool:
    """Whether a guidance with the hook acts at a call."""
    frac, level = index / len(run.levels), run.levels.at(index)
    return any(g.overrides(hook) and g.active(frac, level) for g in guidances)
