"""A loop that a guidance owns, from the hook `solve`: levels in any order, nobody steps."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from guidekit.backbones.schedulers import ONE_CALL, other_scheduler
from guidekit.engine.engine import Engine
from guidekit.errors import GuidekitError, blame
from guidekit.guidance import Guidance
from guidekit.levels import Levels
from guidekit.step import Step

#: Hooks of other guidances that are about the scheduler's own step.
STEPPING = ("edit_sample", "jumps", "push", "repeats", "resample")


def solver_of(guidances: Sequence[Guidance], levels: Levels, scheduler: Any) -> Guidance | None:
    """The guidance that draws by a loop of its own, None if the scheduler does.

    Raises GuidekitError for two, beside others that act on the scheduler's step, and for a solver
    whose steps have several calls.
    """
    found = [g for g in guidances if g.overrides("solve")]
    if not found:
        return None
    solver, *more = found
    if more:
        raise GuidekitError(f"{solver.name} and {more[0].name} both draw by a loop of their own")
    for guidance in guidances:
        hooks = [hook for hook in STEPPING if guidance.overrides(hook)]
        if guidance is not solver and hooks:
            raise GuidekitError(
                f"{guidance.name} acts on the scheduler's step ({hooks[0]}), and {solver.name} "
                "draws by a loop of its own; leave one of them out"
            )
    if any(len(step) > 1 for step in levels.steps):
        raise GuidekitError(
            f"{solver.name} draws by a loop of its own, over the levels of a scheduler of one call "
            f"a step; {other_scheduler(scheduler, ONE_CALL)}"
        )
    return solver


def solved(
    engine: Engine, solver: Guidance, z: Tensor, timesteps: Sequence[Tensor]
) -> Iterator[tuple[Step, Tensor]]:
    """The steps of a guidance's own loop, each with z (B, C, h, w) after it."""
    run, kind, done = engine.run, z.dtype, [0] * len(timesteps)
    scheduler = run.scheduler

    def predict(z: Tensor, index: int) -> Step:
        """The guided step of a call; how often it was made before is its repeat."""
        run.levels.at(index)  # refuses a call that there is not
        run.scheduler = _placed(scheduler, run.levels.start + index)
        done[index] += 1
        timestep, repeat = timesteps[index], done[index] - 1
        return engine.predict(z.to(kind), timestep, index, len(timesteps), repeat)

    loop = solver.solve(run, z, predict)
    while True:
        with blame(solver.name, "solve"):
            found = next(loop, None)
        if found is None:
            return
        step, after = found
        if after.shape != z.shape:
            raise GuidekitError(
                f"{solver.name} draws {tuple(after.shape)}; this run has {tuple(z.shape)}"
            )
        run.account.changed(solver.name, step.index, step.repeat)
        yield step, after.detach().to(kind)


def _placed(scheduler: Any, position: int) -> Any:
    """A copy that has not stepped yet and begins at a position of its timesteps."""
    placed = copy.copy(scheduler)
    if hasattr(placed, "set_begin_index"):  # DDIM and its like ask the timestep alone
        placed.set_begin_index(position)
    return placed
