"""The branches of a step, and what each asks of the denoiser."""

from functools import partial

import torch
from torch import Tensor

from guidekit.branches import Branch
from guidekit.engine.acting import acting
from guidekit.engine.capture import Call, Edit
from guidekit.engine.hooks import Hooks
from guidekit.engine.sparse import check_images
from guidekit.errors import GuidekitError, blame
from guidekit.guidance import Guidance
from guidekit.run import Run
from guidekit.step import Step


def own_branches(run: Run) -> list[Branch]:
    """The branches of classifier-free guidance, or the conditional one alone."""
    cond = Branch("cond", [run.denoiser.content(c) for c in run.conditions])
    if run.cfg <= 1:
        return [cond]
    cond.weight = run.cfg
    return [Branch("null", [c.negative for c in run.conditions], null=True), cond]


def check_branches(run: Run, branches: list[Branch], active: list[Guidance]) -> None:
    """Raises GuidekitError for two branches of one name, or if one to be read is gone."""
    names = [b.name for b in branches]
    if doubled := sorted({n for n in names if names.count(n) > 1}):
        raise GuidekitError(f"two branches are called {doubled[0]!r}; give each its own name")
    check_images(branches, len(run.seeds))
    for guidance in active:
        for read in run.reads.of([guidance]):
            if read.branch not in names:
                raise GuidekitError(
                    f"{guidance.name} reads the branch {read.branch!r}, which is not among "
                    f"{', '.join(names)}; where another plugin has replaced it use them in two "
                    "windows of steps, or without each other"
                )


def branch_calls(hooks: Hooks, energies: list[Guidance]) -> list[Call]:
    """A denoiser call for each branch of the step."""
    step, run = hooks.step, hooks.step.run
    return [
        Call(
            branch,
            branch.of(step.z),
            step.timestep,
            run.told(branch, step.index, step.n),
            ready=partial(_scaled, hooks, branch),
            reads=run.reads.of(hooks.active, branch=branch.name),
            edits=_edits(hooks, branch),
            lengths=run.token_counts(branch),
            twin=_twin(hooks, branch),
            **_graph(run, branch, energies),
        )
        for branch in step.branches
    ]


def second_call(
    step: Step,
    x: Tensor,
    timestep: Tensor | int,
    guidance: Guidance,
    branch: str | Branch,
    graph: bool,
    stop: bool,
) -> Call:
    """The call of `Step.denoise`: the guidance's own reads, and nobody's edits."""
    run, known = step.run, {b.name: b for b in step.branches}
    if not isinstance(branch, Branch) and branch not in known:
        raise GuidekitError(
            f"{guidance.name} denoises the branch {branch!r}; this step has {', '.join(known)}"
        )
    found = branch if isinstance(branch, Branch) else known[branch]
    reads, text = run.reads.of([guidance], main=False), run.told(found, step.index, step.n)
    lengths = run.token_counts(found)
    return Call(found, x, timestep, text, reads=reads, lengths=lengths, graph=graph, stop=stop)


def _twin(hooks: Hooks, branch: Branch) -> str | None:
    """An earlier branch with the same input and the same words, which no hook tells apart."""
    if any(guidance.overrides("edit_input") for guidance in hooks.active):
        return None
    names = ("prompts", "null", "x", "view", "images", "text", "controlled")
    for other in hooks.step.branches:
        if other is branch:
            return None
        if all(getattr(other, name) is getattr(branch, name) for name in names):
            return other.name
    return None


def _scaled(hooks: Hooks, branch: Branch, x: Tensor) -> Tensor:
    """Scaled model input of a branch (B, C, h, w)."""
    return hooks.chain("edit_input", hooks.step.model_input(x), branch)


def _edits(hooks: Hooks, branch: Branch) -> list[Edit]:
    """The hooks that change attention and blocks of a branch, in the user's order."""
    step, ledger = hooks.step, hooks.step.run.reads
    return [
        Edit(
            guidance.name,
            _blamed(step, branch, guidance, f"edit_{kind}"),
            kind,
            sites,
            acting(step, guidance),
        )
        for guidance in hooks.active
        for kind in ("attention", "block")
        if (sites := ledger.edited(guidance, kind)) and guidance.touches(branch)
    ]


def _blamed(step: Step, branch: Branch, guidance: Guidance, name: str):
    """A hook on tapped calls whose exceptions say whose they are."""
    hook = partial(getattr(guidance, name), step, branch)

    def blamed(call):
        if torch.compiler.is_compiling():  # the step's number would be a constant of the graph
            return hook(call)
        with blame(guidance.name, name, step.index):
            return hook(call)

    return blamed


def _graph(run: Run, branch: Branch, energies: list[Guidance]) -> dict[str, bool]:
    """Whether a branch needs a graph, and whether that ends after its last read.

    Energies of x0 need that of all branches, those of attention and features that of the branches
    that they read or edit; "cond" where they do neither by the engine.
    """
    ledger = run.reads
    if any(g.graph == "x0" for g in energies):
        return {"graph": True, "cut": False}
    inner = [g for g in energies if g.graph in ("attention", "features")]
    readers = [g for g in inner if ledger.of([g], branch=branch.name)]
    others = [g for g in inner if not ledger.of([g])]
    editors = [g for g in others if ledger.edits(g) and g.touches(branch)]
    idle = branch.name == "cond" and any(not ledger.edits(g) for g in others)
    return {
        "graph": bool(readers or editors or idle),
        "cut": bool(readers) and not (editors or idle),
    }
