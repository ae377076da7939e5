"""One training loop for every task: device and processes by accelerate, EMA, exact resume.

A step's data, noise and dropout are functions of (seed, step, process), and the learning rate is a
function of the step, so a run that is killed and started again continues exactly as if it had not
been: on a CPU to the bit, on a GPU but for the order of sums in algorithms that are chosen anew.
Several processes and machines: `accelerate launch`, data parallel or FSDP2 by its configuration.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn

from guidekit.errors import GuidekitError
from guidekit.seeds import derived_seed
from guidekit.system.progress import Progress
from guidekit.train.batches import Source, batches
from guidekit.train.checkpoint import Checkpoint, last_checkpoint, write_checkpoint
from guidekit.train.held_out import export_best, offer
from guidekit.train.interrupt import Agreement, Interrupt, Stop
from guidekit.train.metrics import Metrics
from guidekit.train.optimizers import make_optimizer
from guidekit.train.options import Options, lr_at
from guidekit.train.precision import (
    fast_attention,
    keep_inputs,
    searched_convolutions,
    warn_of_slow_bf16,
)
from guidekit.train.processes import processes
from guidekit.train.shards import dealt_like, is_shard, own, whole

# Steps in a row without a finite gradient after which a training gives up: on the way, at its end.
MOST_SKIPPED, DIVERGED = 50, 3


class Task(Source, Protocol):
    """What the loop needs of a task."""

    net: nn.Module  # all trained weights; called as net(**batch) and returns named losses
    # `ready(end)`, which may be left out, is called by all processes before the batches are used
    # whose numbers lie below `end`. `held_out()`, which may be left out too, is the loss on data
    # that chooses the weights that are exported, or None.

    def whole_net(self) -> nn.Module:
        """A second net of the same form, needed by FSDP2 alone, whose nets are in shards."""

    def preview(self) -> Image.Image:
        """An image that shows where the training stands; the weights are the averaged ones."""

    def export(self, folder: Path) -> None:
        """Writes the finished model."""


class Loop:
    """Trains `task.net`; the state of the last two saves lies in `folder`."""

    def __init__(self, task: Task, options: Options, folder: Path, quiet: bool = False):
        self.task, self.options, self.folder, self.quiet = task, options, Path(folder), quiet
        # accelerate keeps the first precision of a process, which an earlier stage may have had. It
        # has no public way to forget it; one loop of a process trains at a time.
        AcceleratorState._reset_state()
        processes()
        self.accelerator = Accelerator(
            mixed_precision=options.precision,
            gradient_accumulation_steps=options.accumulate,
            log_with=options.tracker or None,
            project_dir=self.folder,
        )
        keep_inputs(self.accelerator)
        warn_of_slow_bf16(self.accelerator)
        self.folder.mkdir(parents=True, exist_ok=True)
        on_gpu = self.accelerator.device.type == "cuda"  # where many small kernels cost most
        optimizer = make_optimizer(task.net, options, on_gpu)
        self.net, self.optimizer = self.accelerator.prepare(task.net, optimizer)
        # After prepare: FSDP2 puts shards in the place of the weights.
        self.weights = [p for p in task.net.parameters() if p.requires_grad]
        self.metrics = Metrics(self.folder, options, self.accelerator)
        self.sharded = any(map(is_shard, self.weights))
        # foreach copies no shards.
        self.ema = EMAModel(self.weights, decay=options.ema, foreach=on_gpu and not self.sharded)
        self.ema.to(self.accelerator.device)
        self.skipped = self._skipped_in_a_row = 0
        self._saved = -1  # the step of the last checkpoint
        self.step = self._load()

    def run(self) -> None:
        """Trains from the last checkpoint to the end.

        A kill loses at most `save_every` steps. Ctrl-C and SIGTERM lose none: all processes agree
        on the step after which they save, and end with KeyboardInterrupt or with exit code 0.
        """
        progress = Progress(
            self.folder.name,
            total=self.options.steps,
            done=self.step,
            silent=self.quiet or not self.accelerator.is_main_process,
        )
        agreement = Agreement(self.accelerator, self.options.agree_every, self.options.minutes)
        self.metrics.begin(self.step)
        with contextlib.ExitStack() as stack:
            stack.enter_context(progress)
            stack.enter_context(self._taking_batches())
            stack.enter_context(self._own_draws())
            stack.enter_context(searched_convolutions())
            signals = stack.enter_context(Interrupt())
            words = ""
            if self.step == 0:
                self.validate()
            while True:
                done = self.step >= self.options.steps
                reason = agreement.reached(0 if done else self.step, signals.asked)
                if reason > Stop.TIME:
                    self._leave(reason)
                if done or reason:
                    break
                self._make_ready()
                losses = self._train_step()
                self.step += 1
                if self.step % self.options.log_every == 0 or self.step == self.options.steps:
                    values = self.metrics.write(self.step, losses, self.skipped)
                    words = ", ".join(f"{k} {v:.4f}" for k, v in values.items())
                progress(self.step, words=words)
                if self.step % self.options.save_every == 0 and not self._skipped_in_a_row:
                    self.validate()
                    self.save()
                if self.step % self.options.preview_every == 0:
                    self.preview()
        self._check_converging(DIVERGED)
        self.validate()
        self.save()
        self.preview()
        self.metrics.end()

    def _make_ready(self) -> None:
        """Lets a task that makes its data on the way make what the next step reads."""
        if ready := getattr(self.task, "ready", None):
            turns = (self.step + 1) * self.options.accumulate * self.accelerator.num_processes
            ready(turns * self.options.batch)

    def _leave(self, reason: Stop) -> None:
        """Saves and ends the process, as all of them do after the same step."""
        if not self._skipped_in_a_row:  # else what was saved before is better
            self.save()
        self.accelerator.wait_for_everyone()
        if reason == Stop.INT:
            raise KeyboardInterrupt
        if self.accelerator.is_main_process:
            print(
                f"stopped  {self.folder} at step {self.step} of {self.options.steps} by SIGTERM; "
                "the same command goes on from there",
                file=sys.stderr,
            )
        raise SystemExit(0)

    def _train_step(self) -> dict[str, Tensor]:
        """One move of the weights over `accumulate` batches; returns their mean losses."""
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.step, options)
        means: dict[str, Tensor] = {}
        for turn in range(options.accumulate):
            batch = self._on_device(next(self._batches))
            self._seed_draws(self.step * options.accumulate + turn)
            with self.accelerator.accumulate(self.net), fast_attention(self.accelerator.device):
                with self._autocast():
                    losses = self.net(**batch)
                self.accelerator.backward(sum(losses.values()))
                if self.accelerator.sync_gradients:
                    self._move()
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach() / options.accumulate
        return means

    def _move(self) -> None:
        """Moves weights and averages by the gradient; not by one that is nan or infinite."""
        norm = whole(self.accelerator.clip_grad_norm_(self.weights, self.options.clip))
        finite, scaler = bool(torch.isfinite(norm)), self.accelerator.scaler
        if finite or scaler is not None:  # which skips the step too, and lowers its scale
            self.optimizer.step()
        self.optimizer.zero_grad()
        if finite:
            self.ema.step(self.weights)
            self._skipped_in_a_row = 0
            return
        self.skipped += 1
        self._skipped_in_a_row += 1
        self._check_converging(MOST_SKIPPED)
        if scaler is None and self.accelerator.is_main_process:
            warnings.warn(
                f"{self.folder.name}: the gradient of step {self.step} is not finite; the step is "
                f"skipped, {self.skipped} so far",
                stacklevel=2,
            )

    def _check_converging(self, most: int) -> None:
        """Raises GuidekitError where the last `most` steps had no finite gradient."""
        if self._skipped_in_a_row >= most:
            raise GuidekitError(
                f"{self.folder}: the gradient was not finite in {self._skipped_in_a_row} steps one "
                f"after another, at step {self.step}; lower lr or clip, and start again: it "
                "continues from the last checkpoint"
            )

    @contextlib.contextmanager
    def _own_draws(self):
        """The global generators, which dropout draws from, are the loop's while it trains."""
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield

    def _seed_draws(self, turn: int) -> None:
        """What the net draws in a turn is a function of seed, turn and process alone."""
        own = (self.options.seed, turn, self.accelerator.process_index)
        torch.manual_seed(derived_seed("net", *own))

    def _autocast(self):
        """FSDP2 casts the weights and needs the inputs cast too; elsewhere prepare saw to both."""
        return self.accelerator.autocast() if self.sharded else contextlib.nullcontext()

    @contextlib.contextmanager
    def _taking_batches(self):
        """This process's inputs of what is left of the training; their makers end with it."""
        options = self.options
        turns = range(self.step * options.accumulate, options.steps * options.accumulate)
        self._batches = iter(
            batches(
                self.task, options.batch, options.seed, self.accelerator, turns, options.workers
            )
        )
        try:
            yield
        finally:
            del self._batches

    def _on_device(self, batch: dict) -> dict:
        return {k: v.to(self.accelerator.device, non_blocking=True) for k, v in batch.items()}

    def save(self) -> None:
        """Writes weights, buffers, averages and optimizer state as one safetensors file.

        Raises GuidekitError, and leaves what was saved before, if one of them is not finite.
        """
        if self._saved == self.step:
            return
        tensors = {f"weight.{i}": p.detach() for i, p in enumerate(self.weights)}
        tensors |= {f"ema.{i}": p for i, p in enumerate(self.ema.shadow_params)}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{key}": value for key, value in state.items()}
        self._check_finite(tensors)
        tensors |= {f"buffer.{k}": v for k, v in self._buffers().items()}
        # Every process takes part in gathering shards; the first one keeps and writes them.
        main = self.accelerator.is_main_process
        wholes = ((k, whole(v)) for k, v in tensors.items())
        tensors = {k: v.cpu().contiguous() for k, v in wholes if main}
        self._saved = self.step
        if main:
            scaler = self.accelerator.scaler  # of gradients in fp16
            write_checkpoint(
                self.folder,
                tensors,
                {
                    "step": self.step,
                    "scaler": scaler.state_dict() if scaler else {},
                    "averaged": self.ema.optimization_step,
                    "skipped": self.skipped,
                },
            )

    def _buffers(self) -> dict[str, Tensor]:
        """What the net keeps beside its weights, such as running means."""
        weights = {name for name, _ in self.task.net.named_parameters(remove_duplicate=False)}
        return {k: v for k, v in self.task.net.state_dict().items() if k not in weights}

    def _check_finite(self, tensors: dict[str, Tensor]) -> None:
        """Raises GuidekitError, in all processes, if a number of one of them is not finite."""
        bad = [k for k, v in tensors.items() if not torch.isfinite(own(v)).all()]
        count = torch.tensor(float(len(bad)), device=self.accelerator.device)
        if float(self.accelerator.reduce(count, "sum")) > 0:
            raise GuidekitError(
                f"{self.folder}: {', '.join(bad[:3]) or 'a shard'} is not finite at step "
                f"{self.step}, so nothing is saved; lower lr or raise eps, and start again: it "
                "continues from the last checkpoint"
            )

    def _load(self) -> int:
        """Reads the last checkpoint if there is one and returns the number of finished steps."""
        found = last_checkpoint(self.folder, quiet=not self.accelerator.is_main_process)
        step = 0 if found is None else found.step
        self._check_one_step(step)
        if found is not None:
            self._restore(found)
            self._saved = step
        self.accelerator.wait_for_everyone()  # before the first one's next save
        self.metrics.cut(step)
        return step

    def _check_one_step(self, step: int) -> None:
        """Raises GuidekitError where the processes found checkpoints of different steps."""
        mine = torch.tensor([step], device=self.accelerator.device)
        found = sorted(set(self.accelerator.gather(mine).tolist()))
        if len(found) > 1:
            raise GuidekitError(
                f"the processes found checkpoints of steps {found} in {self.folder}; it must lie "
                "where all of them read the same files"
            )

    def _restore(self, found: Checkpoint) -> None:
        """Takes over weights, buffers, averages and optimizer state."""
        if found.shapes("weight.") != {
            f"weight.{i}": tuple(p.shape) for i, p in enumerate(self.weights)
        }:
            raise GuidekitError(
                f"{found.path} is of another model; train into another folder (--out), or remove it"
            )
        adam: dict[int, dict[str, Tensor]] = {}
        buffers = self._buffers()
        with torch.no_grad():
            for name in found.names():
                kind, place = name.split(".", 1)
                if kind == "buffer":
                    buffers[place].copy_(found.tensor(name))
                    continue
                i, _, key = place.partition(".")
                value = dealt_like(self.weights[int(i)], found.tensor(name))
                if kind == "weight":
                    self.weights[int(i)].copy_(value)
                elif kind == "ema":
                    self.ema.shadow_params[int(i)].copy_(value)
                else:
                    adam.setdefault(int(i), {})[key] = value
        if scaling := found.facts.get("scaler"):
            self.accelerator.scaler.load_state_dict(scaling)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": adam, "param_groups": groups})
        self.ema.optimization_step = found.facts.get("averaged", found.step)
        self.skipped = found.facts.get("skipped", 0)

    @contextlib.contextmanager
    def averaged(self):
        """The averaged weights in place of the trained ones."""
        self.ema.store(self.weights)
        self.ema.copy_to(self.weights)
        try:
            yield
        finally:
            self.ema.restore(self.weights)

    def preview(self) -> None:
        """Saves the task's preview image of the averaged weights."""
        self._on_whole_weights(
            lambda: self.task.preview().save(self.folder / f"preview-{self.step:06d}.png")
        )

    def validate(self) -> None:
        """Keeps the averaged weights if the task's loss on what is held out is the lowest yet."""
        if hasattr(self.task, "held_out"):
            self._on_whole_weights(lambda: offer(self.folder, self.step, self.task))

    def export(self, folder: Path) -> None:
        """Writes the finished model with the averaged weights, the best if some are held out."""
        self._on_whole_weights(lambda: export_best(self.folder, self.task, folder))
        self.accelerator.wait_for_everyone()  # what follows may read it

    def _on_whole_weights(self, action: Callable[[], None]) -> None:
        """Runs `action` on the first process with the averaged weights.

        Shards are gathered for each of its layers as they run, in which all processes take part.
        """
        if not (self.sharded or self.accelerator.is_main_process):
            return
        # Not compiled: what is drawn once in a while is not worth a second compilation.
        with self.averaged(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            if self.sharded:
                self._on_a_copy(action)
            else:
                action()

    def _on_a_copy(self, action: Callable[[], None]) -> None:
        """Runs `action` on the first process with a task whose net is whole."""
        state = {k: whole(v).cpu() for k, v in self.task.net.state_dict().items()}
        if self.accelerator.is_main_process:
            copy = self.task.whole_net().to(self.accelerator.device)
            sharded, self.task.net = self.task.net, copy
            try:
                self.task.net.load_state_dict(state)
                action()
            finally:
                self.task.net = sharded
