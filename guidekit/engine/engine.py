"""The order of one guided step; it knows no method by name.

Guidance enters as a change of the model's own output before `scheduler.step`, which is right for
every scheduler (see noise.py).
"""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from guidekit.backbones.denoiser import Denoiser
from guidekit.backbones.schedulers import lost_edit
from guidekit.backbones.storage import check_storage
from guidekit.branches import Branch, combination
from guidekit.engine.acting import acting, check_hooks
from guidekit.engine.calls import branch_calls, check_branches, own_branches, second_call
from guidekit.engine.devices import check_devices
from guidekit.engine.evaluator import Evaluator
from guidekit.engine.hooks import Hooks, copied
from guidekit.engine.injector import Injector
from guidekit.engine.refinement import refined
from guidekit.engine.rollout import Rollout
from guidekit.engine.sparse import dense, sparse
from guidekit.errors import GuidekitError, blame
from guidekit.groups import checked_rows, permute_history
from guidekit.guidance import Guidance
from guidekit.noise import wide
from guidekit.reads import Eval
from guidekit.run import Run
from guidekit.step import Step
from guidekit.taps import installed


def lack(guidance: Guidance, denoiser: Denoiser) -> str | None:
    """What the guidance needs of a model and this one has not, in words."""
    if "text" in guidance.needs and not denoiser.reads_text:
        return "a prompt that pixels attend to"
    if "cross-attention" in guidance.needs and denoiser.family.order != "cross":
        return "attention modules where pixels read text alone"
    return None


class Engine:
    """Turns z and a timestep into the guided prediction, with the run's own copies of guidances."""

    def __init__(self, run: Run, guidances: list[Guidance]):
        check_storage(run.denoiser.model)
        self.run, self.guidances = run, copied(guidances)
        run.guidances = self.guidances
        adds = any(guidance.overrides("branches") for guidance in self.guidances)
        blocks = run.denoiser.fork_blocks if adds else []
        self.evaluator = Evaluator(
            run.denoiser, run.latent_shape[0], run.attention, run.memory, run.account.calls, blocks
        )
        self.injector = Injector(run)
        run.rollout = Rollout(run, self.evaluator)
        for guidance in self.guidances:
            guidance.check_contract()
            check_hooks(guidance)
            if lacking := lack(guidance, run.denoiser):
                raise GuidekitError(
                    f"{guidance.name} needs {lacking}, and {type(run.denoiser.pipeline).__name__} "
                    "has none"
                )
            with blame(guidance.name, "prepare"):
                guidance.prepare(run)
        check_devices(run, self.guidances)
        kinds = ("attention", "block")
        self._sites = {kind: run.reads.sites(self.guidances, kind) for kind in kinds}
        self._sites["block"] = list(dict.fromkeys([*self._sites["block"], *blocks]))

    def opened(self) -> contextlib.AbstractContextManager[None]:
        """The run's taps; a run keeps them open, and a single step opens them for itself."""
        return installed(self.run.denoiser.model, self._sites)

    def active(self, step: Step) -> list[Guidance]:
        """The guidances whose window this step is in."""
        found = [g for g in self.guidances if g.active(step.frac, step.level)]
        return [g for g in found if step.ends_step or g.acts_at == "calls"]

    def predict(self, z: Tensor, timestep: Tensor, index: int, n: int, repeat: int = 0) -> Step:
        """The guided step at z (B, C, h, w); its prediction goes to `scheduler.step`."""
        step = self.evaluate(z, timestep, index, n, repeat)
        return self.inject(step, step.out.detach())

    def evaluate(self, z: Tensor, timestep: Tensor, index: int, n: int, repeat: int = 0) -> Step:
        """The step with its branches, their combined output and the change that energies ask for.

        `inject` makes the prediction of it; a pipeline does its own combination in between. The
        step's z is the refined one, which `scheduler.step` is to be given.
        """
        step = Step(self.run, self.denoise, z, timestep, index, n, repeat)
        z = refined(step, self.guidances, self.opened)
        hooks = Hooks(step, self.active(step))
        energies = [g for g in hooks.active if g.overrides("energy")]
        if energies:
            step.z = wide(z.detach())[0].requires_grad_()
        # The caller may have gradients off, as is usual round a pipeline.
        with torch.set_grad_enabled(bool(energies)), self.opened():
            step.branches = own_branches(self.run)  # a hook may denoise one of them
            step.branches = hooks.chain("branches", step.branches)
            check_branches(self.run, step.branches, hooks.active)
            self._evaluate_branches(hooks, energies)
            step.out = self._combine(hooks)
            step.variance = self._variance(step)
            if energies:
                step.change = self.injector.change(hooks, energies)
        step.z = z
        return step

    def inject(self, step: Step, out: Tensor) -> Step:
        """Puts the changes into the combined output (B, C, h, w), which becomes the prediction.

        Raises GuidekitError where the scheduler would lose the last edit of z.
        """
        hooks = Hooks(step, self.active(step))
        out = out if step.change is None else (out + step.change).to(out.dtype)
        with self.opened():
            step.prediction = hooks.chain("edit_prediction", out)
        self._check_edits(step)
        return step

    def resample(self, step: Step, z: Tensor, kept: Iterable[Any] = ()) -> Tensor:
        """The next z (B, C, h, w), each image's from the image of its group that it goes on from.

        kept: schedulers as they were before steps that may be done again; their histories go with
        the images too. Raises GuidekitError for an image of another group.
        """
        hooks = Hooks(step, self.active(step))
        for guidance in [g for g in hooks.active if g.overrides("resample")]:
            with self.opened(), torch.no_grad():
                rows = hooks.ask(guidance, "resample", step, z)
            if rows is None or rows.tolist() == list(range(len(z))):
                continue
            if (mask := acting(step, guidance)) is not None:
                rows = torch.where(mask.to(rows.device), rows, torch.arange(len(z)).to(rows))
            rows = checked_rows(rows, self.run.groups, guidance.name).to(z.device)
            z = z[rows]
            for scheduler in (self.run.scheduler, *kept):
                permute_history(scheduler, rows, len(z))
            hooks.changed(guidance.name)
        return z

    def edit_sample(self, step: Step, z: Tensor) -> Tensor:
        """The next z (B, C, h, w) as the active guidances leave it."""
        with self.opened():
            return Hooks(step, self.active(step)).chain("edit_sample", z)

    def repeats(self, step: Step) -> int:
        """How often the solver's step is done that begins with `step`."""
        hooks = Hooks(step, [g for g in self.guidances if g.active(step.frac, step.level)])
        wanted = {g.name: hooks.ask(g, "repeats", step) for g in hooks.active}
        for name, times in wanted.items():
            if times > 1:
                hooks.changed(name)
        return max([1, *wanted.values()])

    def jumps(self, step: Step, done: int) -> int:
        """How many steps of the solver, of the `done` up to this one, are done again after it.

        Raises GuidekitError for more than that.
        """
        hooks = Hooks(step, [g for g in self.guidances if g.active(step.frac, step.level)])
        wanted = {g.name: hooks.ask(g, "jumps", step) for g in hooks.active}
        for name, back in wanted.items():
            if not 0 <= back <= done:
                raise GuidekitError(
                    f"{name} jumps {back} steps back from step {step.index}; it may from 0 to "
                    f"{done}"
                )
            if back:
                hooks.changed(name)
        return max([0, *wanted.values()])

    def denoise(self, step: Step, x, timestep, guidance, branch, graph, stop) -> Eval:
        """See `Step.denoise`."""
        call = second_call(step, x, timestep, guidance, branch, graph, stop)
        with self.opened(), torch.set_grad_enabled(graph):
            return self.evaluator.evaluate([call])[0]

    def close(self) -> None:
        """The end of a run: what was left unread until then is read."""
        self.injector.settle()
        self.run.account.warn_idle(self.guidances)

    def _evaluate_branches(self, hooks: Hooks, energies: list[Guidance]) -> None:
        """The denoiser's outputs for the branches, and what was read and changed on the way."""
        calls, account = branch_calls(hooks, energies), self.run.account
        edits_input = any(g.overrides("edit_input") for g in hooks.active)
        numbers, made = zip(*sparse(calls, edits_input), strict=True)
        evals = dense(calls, dict(zip(numbers, self.evaluator.evaluate(made), strict=True)))
        hooks.step.evals = {e.branch.name: e for e in evals}
        for call, evaluation in zip(calls, evals, strict=True):
            for edit in call.edits:
                if edit.changed:
                    hooks.changed(edit.name)
            for site, implementation in evaluation.implementations.items():
                account.attended(site, implementation)

    def _combine(self, hooks: Hooks) -> Tensor:
        """The combination of every group of branches, then what the guidances make of them."""
        step = hooks.step
        outs = {name: e.out for name, e in step.evals.items()}
        groups: dict[str, list[Branch]] = {}
        for branch in step.branches:
            groups.setdefault(branch.group, []).append(branch)
        step.groups = {name: combination(members, outs) for name, members in groups.items()}
        combined = step.groups.pop("main", None)
        if [b.name for b in groups.get("main", [])] == ["null", "cond"]:
            combined = self.run.denoiser.rescaled(combined, outs["cond"])
        return hooks.chain("combine", combined, outs)

    def _variance(self, step: Step) -> Tensor | None:
        """The learned variance of the conditional branch, where the scheduler reads one."""
        scheduler = self.run.scheduler
        learned = str(scheduler.config.get("variance_type")).startswith("learned")
        reads = learned and hasattr(scheduler, "_get_variance")
        found = step.evals["cond"].variance if reads and "cond" in step.evals else None
        return None if found is None else found.detach()

    def _check_edits(self, step: Step) -> None:
        if not step.index:
            return
        frac, level = (step.index - 1) / step.n, self.run.levels.at(step.index - 1)
        editing = [g for g in self.guidances if g.overrides("edit_sample")]
        editors = [g for g in editing if g.active(frac, level)]
        if editors and not step.move.reads_sample:
            raise lost_edit(step.run.scheduler, f"{editors[0].name} edits z")
