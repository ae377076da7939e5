"""One step as guidances see it: noise level, branches, evaluations, prediction."""

from collections.abc import Callable
from functools import cached_property
from typing import cast

from torch import Tensor

from guidekit.branches import Branch
from guidekit.errors import NoPushError
from guidekit.levels import Move
from guidekit.noise import Level
from guidekit.reads import Eval
from guidekit.run import Run


class Step:
    """One call of the engine: level, branches, evaluations, prediction. Shapes are (B, C, h, w)."""

    def __init__(
        self,
        run: Run,
        call: Callable[..., Eval],
        z: Tensor,
        timestep: Tensor,
        index: int,
        n: int,
        repeat: int = 0,
    ):
        self.run, self._call = run, call  # call: the engine's answer to `denoise`
        self.z, self.timestep = z, timestep
        self.carried = z  # z as the scheduler left it, before it was refined
        self.index, self.n, self.repeat = index, n, repeat
        self.level: Level = run.levels.at(index)  # of z
        self.next_level: Level = run.levels.next(index)  # of the next z
        self.branches: list[Branch] = []
        self.evals: dict[str, Eval] = {}
        self.acting: dict[str, Tensor | None] = {}  # images (B,) that guidances act on, None: all
        self.groups: dict[str, Tensor] = {}  # combined outputs of groups other than "main"
        self.out: Tensor | None = None  # combined output of the branches
        self.change: Tensor | None = None  # of the combined output, asked for by the energies
        self.prediction: Tensor | None = None  # what scheduler.step is given
        self.variance: Tensor | None = None  # learned, what scheduler.step is given after it
        self.images: Tensor | None = None  # images in [0, 1], after the last step

    @property
    def frac(self) -> float:
        """Fraction of the denoiser calls that are done, from the noisy end."""
        return self.index / self.n

    @cached_property
    def move(self) -> Move:
        """The transition that the scheduler is about to make."""
        return self.run.levels.move(self.index, self.variance)

    @property
    def begins_step(self) -> bool:
        """Whether this call is the first one of its step of the solver, where z is refined."""
        return self.index == self.run.levels.step(self.index)[0]

    @property
    def ends_step(self) -> bool:
        """Whether this call is the last stage of its step of the solver, where a shift lasts."""
        return self.run.levels.ends_step(self.index)

    @property
    def informative(self) -> bool:
        """Whether z holds anything of the image, so that an author may divide by `level.a`.

        False where it is noise alone: the first step of flow models, and of a zero terminal SNR.
        """
        return self.level.informative

    def model_input(self, z: Tensor) -> Tensor:
        """What the denoiser takes for z (B, C, h, w) at this step's level, with gradient."""
        scheduler = self.run.scheduler
        if not hasattr(scheduler, "scale_model_input"):  # flow models take z as it is
            return z
        return cast(Tensor, scheduler.scale_model_input(z, self.timestep))

    @cached_property
    def x0(self) -> Tensor:
        """Clean estimate of the combined output, with its graph, in float32 or better."""
        return self.level.x0(cast(Tensor, self.out), self.z)

    def forget_x0(self) -> None:
        """Lets the graph of `x0` go; read again, it is that of the output as it is then."""
        vars(self).pop("x0", None)

    @property
    def cond(self) -> Eval:
        """The evaluation of the conditional branch."""
        return self.evals["cond"]

    def branch_x0(self, name: str) -> Tensor:
        """Clean estimate of one branch from its own input, with its graph."""
        evaluation = self.evals[name]
        return self.level.x0(cast(Tensor, evaluation.out), evaluation.branch.of(self.z))

    def denoise(
        self,
        x: Tensor,
        timestep: Tensor | int,
        guidance: object,
        branch: str | Branch = "cond",
        graph: bool = True,
        stop: bool = False,
    ) -> Eval:
        """A second denoiser call on model input x, with the guidance's own reads (main=False).

        Any hook of a step may call it. branch: one of this step by name, or another one, for what
        the model is told. graph: whether the evaluation has a gradient to x. stop=True ends the
        call after the last site; the output is then None (a compiled denoiser runs to its end).
        Raises GuidekitError for a branch that the step has not.
        """
        return self._call(self, x, timestep, guidance, branch, graph, stop)

    def decode(self, x0: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of clean latents, with gradient."""
        return self.run.denoiser.pixels(x0)

    def encode(self, pixels: Tensor) -> Tensor:
        """Clean latents of images (B, 3, H, W) in [-1, 1], with gradient."""
        return self.run.denoiser.latents(pixels)

    def shifted(self, out: Tensor, delta: Tensor, name: str) -> Tensor:
        """The output (B, C, h, w) that moves the next z by delta more, as `move.shift` does.

        For edits of x0 that keep the predicted noise, with delta = next_level.a * their change. The
        output itself, with a note for the guidance `name`, at a step that moves nothing.
        """
        try:
            return (out + self.move.shift(delta)).to(out.dtype)
        except NoPushError as error:
            self.run.account.note(f"{name} left out step {self.index}: {error}")
            return out

    def noise(self, tag: str) -> Tensor:
        """Noise like z per image from (seed, step, repeat, tag): no plugin moves another's."""
        return self.run.noise(self.run.latent_shape, self.index, self.repeat, tag)
