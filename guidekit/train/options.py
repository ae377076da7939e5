"""How long and how fast a training goes: the options of its loop, and the learning rate."""

import math
from dataclasses import dataclass

from guidekit.errors import GuidekitError


@dataclass(kw_only=True)
class Options:
    """How long and how fast a stage trains."""

    steps: int
    batch: int = 32  # per process and accumulation step
    accumulate: int = 1  # batches whose gradients are added before the weights move
    optimizer: str = "adamw"  # adamw | muon: fewer steps, each a little dearer; not for FSDP2
    lr: float = 1e-3  # reached after `warmup` steps
    decay: str = "cosine"  # what follows: cosine, down to 1% of it | constant
    warmup: int = 100
    cooldown: int = 0  # last steps, in which a constant rate falls to 1% of it along a line
    weight_decay: float = 0.01
    eps: float = 1e-8  # of Adam
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.999
    seed: int = 0
    save_every: int = 500
    preview_every: int = 1000
    log_every: int = 20
    precision: str = "no"  # no | bf16 | fp16, as accelerate names them
    workers: int = 0  # processes that make batches ahead; 0: the training's own makes them
    tracker: str = ""  # tensorboard, wandb, ...: what accelerate reports to, beside metrics.jsonl
    minutes: float = math.inf  # wall time after which the cosine is cut short and the stage ends
    agree_every: int = 10  # steps between two questions of all processes whether to stop
    changed: str = "refuse"  # refuse | allow: a stage that was begun with other options or data

    def __post_init__(self):
        _one_of("decay", self.decay, ("cosine", "constant"))
        _one_of("optimizer", self.optimizer, ("adamw", "muon"))
        _one_of("precision", self.precision, ("no", "bf16", "fp16"))
        _one_of("changed", self.changed, ("refuse", "allow"))
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise GuidekitError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("eps", "clip", "minutes"):
            if not getattr(self, name) > 0:
                raise GuidekitError(f"{name} must be above 0, not {getattr(self, name):g}")
        for name in ("lr", "warmup", "cooldown", "weight_decay", "workers"):
            if not getattr(self, name) >= 0:
                raise GuidekitError(f"{name} must be 0 or more, not {getattr(self, name):g}")
        if not 0 <= self.ema < 1:
            raise GuidekitError(f"ema must be 0 or more and below 1, not {self.ema:g}")


COUNTS = ("steps", "batch", "accumulate", "save_every", "preview_every", "log_every", "agree_every")


def _one_of(name: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise GuidekitError(f"{name} must be {' or '.join(values)}, not {value!r}")


def lr_at(step: int, options: Options) -> float:
    """Learning rate of a step: linear warm-up, then half a cosine, or no change until `cooldown`.

    A constant rate may be cooled down whenever a training is to end: it is started again with the
    steps at which it shall end, so nothing that ran before depends on that number.
    """
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    if options.decay == "constant":
        left = min((options.steps - step) / options.cooldown, 1.0) if options.cooldown else 1.0
        return options.lr * (0.01 + 0.99 * max(left, 0.0))
    done = (step - options.warmup) / max(options.steps - options.warmup, 1)
    return options.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
