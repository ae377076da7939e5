"""Energies to their gradient to the change of the model's output; one backward per push rule."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit.engine.acting import acting, any_of
from guidekit.engine.hooks import Hooks
from guidekit.engine.rows import rows
from guidekit.errors import GuidekitError, NonFiniteError, NoPushError
from guidekit.guidance import Guidance
from guidekit.run import Run
from guidekit.step import Step


@dataclass
class _Flag:
    """Which gradients of a step are finite (B,), not read yet."""

    finite: Tensor
    names: str
    index: int


class Injector:
    """Makes the change of a step's output that its energies ask for, and lets their graph go.

    A gradient that is not finite is left out of its image's push, and then raises NonFiniteError or
    is noted, as the run says. On a GPU the flag is read a step later, when it costs no wait.
    """

    def __init__(self, run: Run):
        self.run = run
        #: Backwards so far, for tests and benchmarks.
        self.backwards = 0
        self._flags: list[_Flag] = []

    def change(self, hooks: Hooks, energies: list[Guidance]) -> Tensor:
        """The sum of the changes of the output (B, C, h, w); one backward a rule."""
        self.settle()
        step, rules = hooks.step, _by_rule(energies)
        change = torch.zeros_like(step.z)
        try:
            for left, members in zip(reversed(range(len(rules))), rules, strict=True):
                change = change + self._push(hooks, members, keep=left > 0)
        finally:
            _release(step)
        return change.detach()

    def settle(self) -> None:
        """Reads the flags of earlier steps; raises NonFiniteError where the run says so."""
        flags, self._flags = self._flags, []
        for flag in flags:
            finite = flag.finite.tolist()
            bad = [seed for seed, fine in zip(self.run.seeds, finite, strict=True) if not fine]
            if not bad:
                continue
            text = f"gradient of {flag.names} is not finite at step {flag.index} for seeds {bad}"
            if self.run.nonfinite == "raise":
                raise NonFiniteError(
                    f"{text}; lower its scale, run in float32, or set nonfinite to 'zero' to skip"
                )
            self.run.account.note(f"{text}; those images were not pushed at that step")

    def _push(self, hooks: Hooks, members: list[Guidance], keep: bool) -> Tensor:
        """Energies of one rule, their gradient, their change of the output."""
        started, step = time.perf_counter(), hooks.step
        shared = not members[0].overrides("push")
        with torch.enable_grad():
            values = [self._energy(hooks, g) for g in members]
            factors = [g.scale * g.schedule(step.frac) if shared else 1.0 for g in members]
            masks = [acting(step, g) for g in members]
            own = [rows(m, v, torch.zeros_like(v)) for m, v in zip(masks, values, strict=True)]
            total = sum(f * v for f, v in zip(factors, own, strict=True))
            self.backwards += 1
            (grad,) = torch.autograd.grad(total.sum(), step.z, retain_graph=keep)
        with torch.no_grad():
            pushed, nothing = any_of(masks), torch.zeros_like(grad)
            grad = self._finite(rows(pushed, grad, nothing), members, step)
            change = rows(pushed, self._change(hooks, members[0], grad), nothing)
            norms = [x.float().flatten(1).norm(dim=1) for x in (change, step.out)]
            found = {"grad_norm": grad.flatten(1).norm(dim=1), "update_ratio": norms[0] / norms[1]}
        found["seconds"] = time.perf_counter() - started
        for guidance, value in zip(members, values, strict=True):
            self.run.account.energy(guidance.name, step.index, step.repeat, value, **found)
        return change

    def _energy(self, hooks: Hooks, guidance: Guidance) -> Tensor:
        """One guidance's energy, checked."""
        step, value = hooks.step, hooks.ask(guidance, "energy", hooks.step)
        if value.shape != (len(step.z),):
            raise GuidekitError(
                f"the energy of {guidance.name} has shape {tuple(value.shape)}; it must be one "
                f"number per image, ({len(step.z)},)"
            )
        if not value.requires_grad:
            raise GuidekitError(
                f"the energy of {guidance.name} does not depend on z; compute it from step.z, "
                f"step.x0 or its reads (its graph is {guidance.graph!r})"
            )
        return value

    def _finite(self, grad: Tensor, members: list[Guidance], step: Step) -> Tensor:
        """The gradient, zero for images whose own is not finite."""
        # Row by row, so that no image depends on its batch.
        finite = torch.isfinite(grad).flatten(1).all(1)
        names = " + ".join(g.name for g in members)
        self._flags.append(_Flag(finite, names, step.index))
        if finite.device.type == "cpu":
            self.settle()
        return torch.where(finite[:, None, None, None], grad, 0.0)

    def _change(self, hooks: Hooks, guidance: Guidance, grad: Tensor) -> Tensor:
        """The guidance's change of the output; zero, with a note, at a step that has no push."""
        try:
            return hooks.ask(guidance, "push", hooks.step, grad)
        except NoPushError as error:
            self.run.account.note(f"{guidance.name} left out step {hooks.step.index}: {error}")
            return torch.zeros_like(grad)


def _by_rule(energies: list[Guidance]) -> list[list[Guidance]]:
    """Guidances whose rules are equal, together."""
    groups: list[tuple[object, list[Guidance]]] = []
    for guidance in energies:
        rule = guidance.rule
        known = next((members for other, members in groups if other == rule), None)
        if known is None:
            groups.append((rule, [guidance]))
        else:
            known.append(guidance)
    return [members for _, members in groups]


def _release(step: Step) -> None:
    """Lets the graph of a step go, also out of what later hooks will look at."""
    for evaluation in step.evals.values():
        evaluation.release()
    narrow = next((e.narrow for e in step.evals.values() if e.narrow), None)
    step.groups = {name: _freed(out, narrow) for name, out in step.groups.items()}
    step.out = _freed(step.out, narrow)
    step.forget_x0()


def _freed(out: Tensor, narrow: torch.dtype | None) -> Tensor:
    """An output without its graph, in the model's type where it was in float32 for that."""
    return out.detach() if narrow is None else out.detach().to(narrow)
