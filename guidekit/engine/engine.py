"""One guided step: branches, taps, energies, one backward per push rule, the changed output.

Guidance enters as a change of the model's own output before `scheduler.step`, which is right for
every scheduler (see noise.py). The engine knows no method by name.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from guidekit.backbones.denoiser import Denoiser, Text
from guidekit.branches import Branch, combination
from guidekit.engine.capture import Capture, StopForward
from guidekit.errors import GuidekitError, NonFiniteError, NoPushError
from guidekit.guidance import Guidance
from guidekit.reads import Eval
from guidekit.run import Run
from guidekit.step import Step
from guidekit.taps import open_attention, open_blocks

# Gradients of maps underflow in half precision, those through two calls overflow; the scale is
# divided out again in float32, and what overflowed is tried with the next one.
LOSS_SCALES = {torch.float16: (2.0**12, 2.0**6, 1.0, 2.0**-6)}
# Branches in one denoiser call: a panorama has hundreds of windows.
CALL_BRANCHES = 8


def missing(guidance: Guidance, denoiser: Denoiser) -> str | None:
    """What the guidance needs of a model and this one has not, in words."""
    if "text" in guidance.needs and not denoiser.reads_text:
        return "a prompt that pixels attend to"
    if "cross-attention" in guidance.needs and denoiser.family.order != "cross":
        return "attention modules where pixels read text alone"
    return None


class Engine:
    """Turns z and a timestep into the guided prediction; taps are open only inside `predict`."""

    def __init__(self, run: Run, guidances: list[Guidance]):
        self.run, self.guidances = run, guidances
        self.backwards = 0  # for the account and the tests
        self._capture: Capture | None = None
        for guidance in guidances:
            guidance.check_contract()
            if lack := missing(guidance, run.denoiser):
                raise GuidekitError(
                    f"{guidance.name} needs {lack}, and {type(run.denoiser.pipeline).__name__} "
                    "has none"
                )
            guidance.prepare(run)

    def active(self, step: Step) -> list[Guidance]:
        """The guidances whose window this step is in."""
        found = [g for g in self.guidances if g.active(step.frac)]
        return [g for g in found if step.ends_step or g.acts_at == "calls"]

    def predict(self, z: Tensor, timestep: Tensor, index: int, n: int, repeat: int = 0) -> Step:
        """The guided step at z (B, C, h, w); its prediction goes to `scheduler.step`."""
        step = self.evaluate(z, timestep, index, n, repeat)
        return self.inject(step, step.out.detach())

    def evaluate(self, z: Tensor, timestep: Tensor, index: int, n: int, repeat: int = 0) -> Step:
        """The step with its branches, their combined output and the change that energies ask for.

        `inject` makes the prediction of it; a pipeline does its own combination in between.
        """
        step = Step(self.run, self.second_call, z, timestep, index, n, repeat)
        active = self.active(step)
        energies = [g for g in active if g.has_energy]
        if energies:
            wide = torch.promote_types(z.dtype, torch.float32)
            step.z = z.detach().to(wide).requires_grad_()
        # The caller may have gradients off, as is usual round a pipeline.
        with torch.set_grad_enabled(bool(energies)), self._taps(active):
            step.branches = self._branches(step, active)
            self._evaluate(step, active, energies)
            step.out = self._combine(step, active)
            step.variance = self._variance(step)
            if energies:
                step.change = self._push(step, energies)
        step.z = z
        return step

    def inject(self, step: Step, out: Tensor) -> Step:
        """Puts the changes into the combined output (B, C, h, w), which becomes the prediction.

        Raises GuidekitError where the scheduler would lose the last edit of z.
        """
        step.prediction = out if step.change is None else (out + step.change).to(out.dtype)
        for guidance in self.active(step):
            step.prediction = guidance.edit_prediction(step, step.prediction)
        self._check_edits(step)
        return step

    def edit_sample(self, step: Step, z: Tensor) -> Tensor:
        """The next z (B, C, h, w) as the active guidances leave it."""
        for guidance in self.active(step):
            z = guidance.edit_sample(step, z)
        return z

    def _check_edits(self, step: Step) -> None:
        before = (step.index - 1) / step.n
        editors = [
            g
            for g in self.guidances
            if type(g).edit_sample is not Guidance.edit_sample and g.active(before)
        ]
        if step.index and editors and not step.move.reads_sample:
            raise GuidekitError(
                f"{editors[0].name} edits samples, and {type(step.run.scheduler).__name__} does not"
                " start every step from the sample it is given; use --scheduler ddim"
            )

    def _branches(self, step: Step, active: list[Guidance]) -> list[Branch]:
        """Null and conditional branch, then what the guidances make of them."""
        conditions, cfg = self.run.conditions, self.run.cfg
        cond = Branch("cond", [self.run.denoiser.content(c) for c in conditions], weight=cfg)
        null = Branch("null", [c.negative for c in conditions], null=True)
        branches = [null, cond] if cfg > 1 else [cond]
        if cfg <= 1:
            cond.weight = None
        for guidance in active:
            branches = guidance.branches(step, branches)
        self._check_branches(branches, active)
        return branches

    def _check_branches(self, branches: list[Branch], active: list[Guidance]) -> None:
        """Raises GuidekitError for two branches of one name, or if the one to be read is gone."""
        names = [b.name for b in branches]
        if doubled := sorted({n for n in names if names.count(n) > 1}):
            raise GuidekitError(f"two branches are called {doubled[0]!r}; give each its own name")
        readers = [g.name for g in self.run.reads.readers(active)]
        if readers and "cond" not in names:
            raise GuidekitError(
                f"{readers[0]} reads the branch 'cond', which another plugin has replaced by "
                f"{', '.join(names)}; use them in two windows of steps, or without each other"
            )

    @contextlib.contextmanager
    def _taps(self, active: list[Guidance]) -> Iterator[None]:
        """Opens the taps that the active guidances asked for."""
        run = self.run
        attention, blocks = (run.reads.sites(active, kind) for kind in ("attention", "block"))
        model = run.denoiser.model
        with contextlib.ExitStack() as stack:
            if attention:
                show = self._show("attention")
                stack.enter_context(open_attention(model, show, attention, run.attention))
            if blocks:
                stack.enter_context(open_blocks(model, self._show("block"), blocks))
            yield

    def _show(self, kind: str) -> Callable:
        """Passes a tapped call on to the capture of the denoiser call that is running."""
        return lambda call: None if self._capture is None else getattr(self._capture, kind)(call)

    def _evaluate(self, step: Step, active: list[Guidance], energies: list[Guidance]) -> None:
        """Calls the denoiser, one batch for all branches that are treated alike."""
        scopes = {g.graph for g in energies}
        groups: dict[tuple, list[Branch]] = {}
        for i, branch in enumerate(step.branches):
            reads = self._reads(branch, active, main=True)
            editors = [g for g in active if self.run.reads.edits(g) and g.touches(branch)]
            graph = "x0" in scopes or (
                branch.name == "cond" and bool(scopes & {"attention", "features"})
            )
            alone = i if reads or editors else -1
            shape = (branch.view or (0, 0, *self.run.grid))[2:]
            groups.setdefault((graph, alone, shape), []).append(branch)
        for (graph, *_), branches in groups.items():
            cut = graph and "x0" not in scopes
            for i in range(0, len(branches), CALL_BRANCHES):
                part = branches[i : i + CALL_BRANCHES]
                outs = self._call_group(step, active, part, graph, cut)
                step.evals |= {b.name: e for b, e in zip(part, outs, strict=True)}

    def _reads(self, branch: Branch, active: list[Guidance], main: bool) -> list:
        """What the active guidances want to read of a branch."""
        if branch.name != "cond":
            return []
        return self.run.reads.of(active, main)

    def _call_group(
        self, step: Step, active: list[Guidance], branches: list[Branch], graph: bool, cut: bool
    ) -> list[Eval]:
        """One denoiser call for branches that share it."""
        run = self.run
        x = torch.cat([self._input(step, active, branch) for branch in branches])
        texts = [run.text(branch.prompts, branch.null) for branch in branches]
        text = type(texts[0]).cat(texts)
        branch = branches[0]
        editors = [g for g in active if run.reads.edits(g) and g.touches(branch)]
        reads = self._reads(branch, active, main=True)
        capture = Capture(step, branch, reads, editors, cut=cut and bool(reads))
        with torch.set_grad_enabled(graph):
            out = self._call(x, step.timestep, text, capture, graph)
        parts = zip(branches, out.chunk(len(branches)), strict=True)
        return [self._eval(branch, part, capture) for branch, part in parts]

    def _eval(self, branch: Branch, out: Tensor, capture: Capture) -> Eval:
        """The evaluation of a branch from the model's output (B, C or 2C, h, w)."""
        channels = self.run.latent_shape[0]
        variance = out[:, channels:] if out.shape[1] > channels else None
        return Eval(branch, out[:, :channels], capture.found, variance)

    def _input(self, step: Step, active: list[Guidance], branch: Branch) -> Tensor:
        """Scaled model input of a branch (B, C, h, w) in the denoiser's type."""
        x = branch.of(step.z).to(self.run.denoiser.dtype)
        if hasattr(self.run.scheduler, "scale_model_input"):
            x = self.run.scheduler.scale_model_input(x, step.timestep)
        for guidance in active:
            x = guidance.edit_input(step, branch, x)
        return x

    def _call(
        self, x: Tensor, timestep: Tensor, text: Text, capture: Capture, graph: bool
    ) -> Tensor:
        """The denoiser with a capture behind the taps; checkpointed where memory is low."""
        low = graph and self.run.memory == "low"
        with _Capturing(self, capture), _checkpointed(self, low):
            return self.run.denoiser(x, timestep, text)

    def second_call(self, step, x, timestep, guidance, branch, graph, stop) -> Eval:
        """See `Step.denoise`."""
        known = {b.name: b for b in step.branches}
        found = branch if isinstance(branch, Branch) else known[branch]
        reads = self.run.reads.of([guidance], main=False)
        capture = Capture(step, found, reads, [], cut=False, stop=stop)
        text = self.run.text(found.prompts, found.null)
        with torch.set_grad_enabled(graph), contextlib.suppress(StopForward):
            return self._eval(found, self._call(x, timestep, text, capture, graph), capture)
        return Eval(found, None, capture.found)

    def _combine(self, step: Step, active: list[Guidance]) -> Tensor:
        """The combination of every group of branches, then what the guidances make of them."""
        outs = {name: e.out for name, e in step.evals.items()}
        groups: dict[str, list[Branch]] = {}
        for branch in step.branches:
            groups.setdefault(branch.group, []).append(branch)
        step.groups = {name: combination(members, outs) for name, members in groups.items()}
        combined = step.groups.pop("main", None)
        if [b.name for b in groups.get("main", [])] == ["null", "cond"]:
            combined = self.run.denoiser.rescaled(combined, outs["cond"])
        for guidance in active:
            combined = guidance.combine(step, outs, combined)
        return combined

    def _variance(self, step: Step) -> Tensor | None:
        """The learned variance of the conditional branch, where the scheduler reads one."""
        scheduler = self.run.scheduler
        learned = str(scheduler.config.get("variance_type")).startswith("learned")
        reads = learned and hasattr(scheduler, "_get_variance")
        found = step.evals["cond"].variance if reads and "cond" in step.evals else None
        return None if found is None else found.detach()

    def _push(self, step: Step, energies: list[Guidance]) -> Tensor:
        """The sum of the changes of the output that the energies ask for; one backward a rule."""
        rules: dict[tuple, list[Guidance]] = {}
        for guidance in energies:
            rules.setdefault(guidance.rule, []).append(guidance)
        change = torch.zeros_like(step.z)
        for left, members in zip(reversed(range(len(rules))), rules.values(), strict=True):
            change = change + self._push_rule(step, members, keep=left > 0)
        return change.detach()

    def _push_rule(self, step: Step, members: list[Guidance], keep: bool) -> Tensor:
        """Energies of one rule, their gradient, their change of the output."""
        started = time.perf_counter()
        shared = not members[0].overrides("push")
        with torch.enable_grad():
            values = [self._energy(step, g) for g in members]
            factors = [g.scale * g.schedule(step.frac) if shared else 1.0 for g in members]
            total = sum(f * v for f, v in zip(factors, values, strict=True))
            grad = self._gradient(step, total, members, keep)
        with torch.no_grad():
            change = self._change(step, members[0], grad)
        norm = grad.flatten(1).norm(dim=1)
        ratio = change.float().flatten(1).norm(dim=1) / step.out.float().flatten(1).norm(dim=1)
        seconds = time.perf_counter() - started
        for guidance, value in zip(members, values, strict=True):
            self.run.account.energy(
                guidance.name,
                step.index,
                step.repeat,
                value,
                grad_norm=norm,
                update_ratio=ratio,
                seconds=seconds,
            )
        return change

    def _change(self, step: Step, guidance: Guidance, grad: Tensor) -> Tensor:
        """The guidance's change of the output; zero, with a note, at a step that has no push."""
        try:
            return guidance.push(step, grad)
        except NoPushError as error:
            self.run.account.note(f"{guidance.name} left out step {step.index}: {error}")
            return torch.zeros_like(grad)

    def _energy(self, step: Step, guidance: Guidance) -> Tensor:
        """One guidance's energy, checked."""
        value = guidance.energy(step)
        if value.shape != (len(step.z),):
            raise GuidekitError(
                f"the energy of {guidance.name} has shape {tuple(value.shape)}; it must be one "
                f"number per picture, ({len(step.z)},)"
            )
        if not value.requires_grad:
            raise GuidekitError(
                f"the energy of {guidance.name} does not depend on z; compute it from step.z, "
                f"step.x0 or its reads (its graph is {guidance.graph!r})"
            )
        return value

    def _gradient(self, step: Step, total: Tensor, members: list[Guidance], keep: bool) -> Tensor:
        """d total / dz (B, C, h, w); what is not finite follows the policy."""
        scales = LOSS_SCALES.get(self.run.denoiser.model.dtype, (1.0,))
        grad, finite = torch.full_like(step.z, torch.nan), torch.zeros(len(step.z), dtype=bool)
        for scale in scales:
            again = keep or scale != scales[-1]
            self.backwards += 1
            (found,) = torch.autograd.grad(total.sum() * scale, step.z, retain_graph=again)
            # Row by row, so that no picture depends on its batch.
            grad = torch.where(finite[:, None, None, None].to(grad.device), grad, found / scale)
            finite = torch.isfinite(grad).flatten(1).all(1).cpu()
            if finite.all():
                return grad
        names = " + ".join(g.name for g in members)
        bad = [self.run.seeds[b] for b in (~finite).nonzero().flatten().tolist()]
        text = f"gradient of {names} is not finite at step {step.index} for seeds {bad}"
        if self.run.nonfinite == "raise":
            raise NonFiniteError(
                f"{text}; lower its scale, run in float32, or set nonfinite to 'zero' to skip"
            )
        self.run.account.note(f"{text}; those pictures were not pushed at that step")
        return torch.where(finite[:, None, None, None].to(grad.device), grad, 0.0)


class _Capturing:
    """Tapped calls go to `capture` for a while.

    It can be entered again and again: each backward through a checkpoint enters it.
    """

    def __init__(self, engine: Engine, capture: Capture | None):
        self.engine, self.capture = engine, capture
        self.before: list[Capture | None] = []

    def __enter__(self) -> None:
        self.before.append(self.engine._capture)
        self.engine._capture = self.capture

    def __exit__(self, *_) -> None:
        self.engine._capture = self.before.pop()


@contextlib.contextmanager
def _checkpointed(engine: Engine, active: bool) -> Iterator[None]:
    """Gradient checkpointing whose second run of a block goes to the same capture as the first."""
    model = engine.run.denoiser.model
    if not active:
        yield
        return
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    modules = [m for m in model.modules() if hasattr(m, names[0])]
    before = [{name: vars(m)[name] for name in names if name in vars(m)} for m in modules]

    def run_block(module, *args):
        capture = engine._capture
        contexts = lambda: (contextlib.nullcontext(), _Capturing(engine, capture))  # noqa: E731
        call = partial(checkpoint, use_reentrant=False, context_fn=contexts)
        return call(module.__call__, *args)

    model.enable_gradient_checkpointing(run_block)
    try:
        yield
    finally:
        for module, values in zip(modules, before, strict=True):
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(values)
