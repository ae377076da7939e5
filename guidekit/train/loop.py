"""One training loop for every task: device and processes by accelerate, EMA, exact resume.

A step's data and noise are functions of (seed, step, process), and the learning rate is a function
of the step, so a run that is killed and started again continues exactly as if it had not been: on a
CPU to the bit, on a GPU but for the order of sums in algorithms that are chosen anew.
Several processes and machines: `accelerate launch`, data parallel or FSDP2 by its configuration.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm.auto import tqdm

from guidekit.train.batches import Source, batches
from guidekit.train.interrupt import Interrupt
from guidekit.train.muon import Muon
from guidekit.train.options import Options, lr_at
from guidekit.train.precision import (
    fast_attention,
    keep_inputs,
    searched_convolutions,
    warn_of_slow_bf16,
)
from guidekit.train.processes import processes


class Task(Source, Protocol):
    """What the loop needs of a task."""

    net: nn.Module  # all trained weights; called as net(**batch) and returns named losses

    def whole_net(self) -> nn.Module:
        """A second net of the same form, needed by FSDP2 alone, whose nets are in shards."""

    def preview(self) -> Image.Image:
        """A picture that shows where the training stands; the weights are the averaged ones."""

    def export(self, folder: Path) -> None:
        """Writes the finished model."""


class Loop:
    """Trains `task.net`; the state lies in `folder/checkpoint.safetensors`, replaced atomically."""

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
        optimizer = _optimizer(task.net, options, on_gpu)
        self.net, self.optimizer = self.accelerator.prepare(task.net, optimizer)
        # After prepare: FSDP2 puts shards in the place of the weights.
        self.weights = [p for p in task.net.parameters() if p.requires_grad]
        if options.tracker:
            self._start_tracker()
        self.sharded = any(isinstance(p, DTensor) for p in self.weights)
        # foreach copies no shards.
        self.ema = EMAModel(self.weights, decay=options.ema, foreach=on_gpu and not self.sharded)
        self.ema.to(self.accelerator.device)
        self.step = self._load()

    def _start_tracker(self) -> None:
        """accelerate's tracker of the options' name; ValueError where it is not installed."""
        name = self.options.tracker
        self.accelerator.init_trackers("guidekit", _plain(self.options))
        if self.accelerator.is_main_process and not self.accelerator.trackers:
            raise ValueError(f"the tracker {name!r} is not installed: pip install {name}")

    def run(self) -> None:
        """Trains from the last checkpoint to the end.

        A kill loses at most `save_every` steps; Ctrl-C loses none and takes effect after the step.
        """
        bar = tqdm(
            total=self.options.steps,
            initial=self.step,
            desc=self.folder.name,
            disable=self.quiet or not self.accelerator.is_main_process,
        )
        self.started, self.first = time.monotonic(), self.step
        with bar, self._taking_batches(), searched_convolutions(), Interrupt() as stop:
            while self.step < self.options.steps and not self._out_of_time():
                losses = self._train_step()
                self.step += 1
                bar.update()
                if self.step % self.options.log_every == 0 or self.step == self.options.steps:
                    bar.set_postfix({k: f"{v:.4f}" for k, v in self._log(losses).items()})
                asked = self._agreed(stop.asked)
                if self.step % self.options.save_every == 0 or asked:
                    self._finite_means(losses)
                    self.save()
                if asked:
                    raise KeyboardInterrupt
                if self.step % self.options.preview_every == 0:
                    self.preview()
        self.save()
        self.preview()
        for tracker in self.accelerator.trackers:  # end_training would end the processes' group
            tracker.finish()

    def _train_step(self) -> dict[str, Tensor]:
        """One move of the weights over `accumulate` batches; returns their mean losses."""
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.step, options)
        means: dict[str, Tensor] = {}
        for _ in range(options.accumulate):
            batch = self._on_device(next(self._batches))
            with self.accelerator.accumulate(self.net), fast_attention(self.accelerator.device):
                with self._autocast():
                    losses = self.net(**batch)
                self.accelerator.backward(sum(losses.values()))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.weights, options.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach() / options.accumulate
        self.ema.step(self.weights)
        return means

    def _autocast(self):
        """FSDP2 casts the weights and needs the inputs cast too; elsewhere prepare saw to both."""
        return self.accelerator.autocast() if self.sharded else contextlib.nullcontext()

    @contextlib.contextmanager
    def _taking_batches(self):
        """This process's inputs of what is left of the training; their makers end with it."""
        options = self.options
        turns = range(self.step * options.accumulate, options.steps * options.accumulate)
        self._batches = iter(batches(
            self.task, options.batch, options.seed, self.accelerator, turns, options.workers
        ))  # fmt: skip
        try:
            yield
        finally:
            del self._batches

    def _on_device(self, batch: dict) -> dict:
        return {k: v.to(self.accelerator.device, non_blocking=True) for k, v in batch.items()}

    def _out_of_time(self) -> bool:
        """True on every process as soon as the first one says that the time is spent."""
        if math.isinf(self.options.minutes):
            return False
        spent = [time.monotonic() - self.started > self.options.minutes * 60]
        return broadcast_object_list(spent)[0]

    def _log(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Appends the losses, averaged over processes, and the speed to metrics.jsonl."""
        values = self._finite_means(losses)
        if self.accelerator.is_main_process:
            done = self.step - self.first
            images = done * self.options.batch * self.options.accumulate
            images *= self.accelerator.num_processes
            row = {"step": self.step, **values, "lr": lr_at(self.step - 1, self.options)}
            row["images_per_second"] = images / (time.monotonic() - self.started)
            left = (self.options.steps - self.step) / done
            row["eta_seconds"] = round(left * (time.monotonic() - self.started), 1)
            if self.options.tracker:
                self.accelerator.log({k: v for k, v in row.items() if k != "step"}, self.step)
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        return values

    def _finite_means(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """The losses averaged over processes; ValueError before a save if one is nan or inf."""
        values = {k: float(self.accelerator.reduce(v.detach(), "mean")) for k, v in losses.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"{self.folder}: the loss {name} is {value} at step {self.step}; lower lr or "
                    "clip, and start again: it continues from the last checkpoint"
                )
        return values

    def _agreed(self, asked: bool) -> bool:
        """Whether any process was asked to stop, where all of them take part in saving."""
        if not self.sharded:
            return asked
        flag = torch.tensor(float(asked), device=self.accelerator.device)
        return float(self.accelerator.reduce(flag, "sum")) > 0

    def save(self) -> None:
        """Writes weights, averages and optimizer state as one safetensors file."""
        tensors = {f"weight.{i}": p.detach() for i, p in enumerate(self.weights)}
        tensors |= {f"ema.{i}": p for i, p in enumerate(self.ema.shadow_params)}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{key}": value for key, value in state.items()}
        # Every process takes part in gathering shards; the first one keeps and writes them.
        main = self.accelerator.is_main_process
        wholes = ((k, _whole(v)) for k, v in tensors.items())
        tensors = {k: v.cpu().contiguous() for k, v in wholes if main}
        if not main:
            return
        path = self.folder / "checkpoint.safetensors"
        scaler = self.accelerator.scaler  # of gradients in fp16
        facts = {"step": self.step, "scaler": scaler.state_dict() if scaler else {}}
        facts["options"] = self._deciding()
        facts = {k: json.dumps(v) for k, v in facts.items()}
        save_file(tensors, str(path) + ".part", metadata=facts)
        os.replace(str(path) + ".part", path)

    def _load(self) -> int:
        """Reads the checkpoint if there is one and returns the number of finished steps."""
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            if self.accelerator.is_main_process:
                _cut_log(self.folder / "metrics.jsonl", 0)
            return 0
        adam: dict[int, dict[str, Tensor]] = {}
        with safe_open(path, "pt") as file, torch.no_grad():
            facts = {k: json.loads(v) for k, v in file.metadata().items()}
            step = facts["step"]
            self._check_same_net(file)
            self._warn_of_other_options(facts.get("options", {}))
            for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                kind, i, *rest = key.split(".")
                value = _like(self.weights[int(i)], file.get_tensor(key))
                if kind == "weight":
                    self.weights[int(i)].copy_(value)
                elif kind == "ema":
                    self.ema.shadow_params[int(i)].copy_(value)
                else:
                    adam.setdefault(int(i), {})[rest[0]] = value
        if scaling := facts.get("scaler"):
            self.accelerator.scaler.load_state_dict(scaling)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": adam, "param_groups": groups})
        self.ema.optimization_step = step
        self.accelerator.wait_for_everyone()  # before the first one's next save
        if self.accelerator.is_main_process:
            _cut_log(self.folder / "metrics.jsonl", step)
        return step

    def _check_same_net(self, file) -> None:
        """ValueError if the checkpoint's weights are not of this net's shapes."""
        kept = [k for k in file.keys() if k.startswith("weight.")]  # noqa: SIM118
        shapes = {k: tuple(file.get_slice(k).get_shape()) for k in kept}
        if shapes != {f"weight.{i}": tuple(p.shape) for i, p in enumerate(self.weights)}:
            raise ValueError(
                f"{self.folder}/checkpoint.safetensors is of another model; train into another "
                "folder (--out), or remove it"
            )

    def _deciding(self) -> dict[str, str]:
        """Options that decide the batches and their losses, as text."""
        own = getattr(self.task, "options", None)
        names = {n: getattr(self.options, n) for n in ("batch", "accumulate", "seed")}
        names |= {"processes": self.accelerator.num_processes}
        names |= dataclasses.asdict(own) if dataclasses.is_dataclass(own) else {}
        return {name: str(value) for name, value in names.items()}

    def _warn_of_other_options(self, before: dict[str, str]) -> None:
        now = self._deciding()
        other = [f"{k} was {v}, is {now.get(k)}" for k, v in before.items() if now.get(k) != v]
        if other:
            warnings.warn(
                f"{self.folder} goes on with other options: {'; '.join(other)}", stacklevel=3
            )

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
        """Saves the task's preview picture of the averaged weights."""
        self._on_whole_weights(
            lambda: self.task.preview().save(self.folder / f"preview-{self.step:06d}.png")
        )

    def export(self, folder: Path) -> None:
        """Writes the finished model with the averaged weights."""
        self._on_whole_weights(lambda: self.task.export(folder))
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
        state = {k: _whole(v).cpu() for k, v in self.task.net.state_dict().items()}
        if self.accelerator.is_main_process:
            whole = self.task.whole_net().to(self.accelerator.device)
            sharded, self.task.net = self.task.net, whole
            try:
                self.task.net.load_state_dict(state)
                action()
            finally:
                self.task.net = sharded


def _optimizer(net: nn.Module, options: Options, on_gpu: bool) -> torch.optim.Optimizer:
    """What the options name, over the weights that are trained."""
    shared = {"lr": options.lr, "betas": (0.9, 0.99), "eps": options.eps}
    shared |= {"weight_decay": options.weight_decay}
    if options.optimizer == "muon":
        return Muon(net, **shared)
    weights = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.AdamW(weights, **shared, fused=on_gpu or None)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all processes where each holds a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(weight: Tensor, value: Tensor) -> Tensor:
    """The value cut into shards as the weight is; a step counter stays whole."""
    if not isinstance(weight, DTensor) or value.shape != weight.shape:
        return value
    value = value.to(weight.device)
    return distribute_tensor(value, weight.device_mesh, weight.placements)


def _plain(options: Options) -> dict:
    """The options as trackers take them."""
    return {k: v for k, v in dataclasses.asdict(options).items() if v != math.inf}


def _cut_log(path: Path, step: int) -> None:
    """Drops the rows of steps that the checkpoint does not hold; they will be written again."""
    if path.exists():
        # A kill may have torn the last row.
        rows = [row for row in path.read_text().splitlines() if row.endswith("}")]
        rows = [row for row in rows if json.loads(row)["step"] <= step]
        part = path.with_name(path.name + ".part")
        part.write_text("".join(row + "\n" for row in rows))
        part.replace(path)
