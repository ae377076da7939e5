"""One training loop for every task: device and processes by accelerate, EMA, exact resume.

A step's data and noise are functions of (seed, step, process), and the learning rate is a function
of the step, so a run that is killed and started again continues exactly as if it had not been.
"""

import contextlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm


class Task(Protocol):
    """What the loop needs of a task."""

    net: nn.Module  # all trained weights; called as net(**batch) and returns named losses

    def batch(self, numbers: range, generator: torch.Generator) -> dict:
        """Inputs of one process for one step, from the numbers of its scenes."""

    def preview(self) -> Image.Image:
        """A picture that shows where the training stands; the weights are the averaged ones."""

    def export(self, folder: Path) -> None:
        """Writes the finished model."""


@dataclass(kw_only=True)
class Options:
    """How long and how fast a stage trains."""

    steps: int
    batch: int = 32  # per process and accumulation step
    accumulate: int = 1  # batches whose gradients are added before the weights move
    lr: float = 1e-3  # reached after `warmup` steps, then a cosine down to 1% of it
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.999
    seed: int = 0
    save_every: int = 500
    preview_every: int = 1000
    log_every: int = 20
    precision: str = "no"  # no | bf16 | fp16, as accelerate names them
    minutes: float = math.inf  # wall time after which the cosine is cut short and the stage ends


def lr_at(step: int, options: Options) -> float:
    """Learning rate of a step: linear warm-up, then half a cosine."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(options.steps - options.warmup, 1)
    return options.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


class Loop:
    """Trains `task.net`; the state lies in `folder/checkpoint.safetensors`, replaced atomically."""

    def __init__(self, task: Task, options: Options, folder: Path, quiet: bool = False):
        self.task, self.options, self.folder, self.quiet = task, options, Path(folder), quiet
        self.accelerator = Accelerator(
            mixed_precision=options.precision, gradient_accumulation_steps=options.accumulate
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.weights = [p for p in task.net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            self.weights, lr=options.lr, betas=(0.9, 0.99), weight_decay=options.weight_decay
        )
        self.net, self.optimizer = self.accelerator.prepare(task.net, optimizer)
        self.ema = EMAModel(self.weights, decay=options.ema)
        self.ema.to(self.accelerator.device)
        self.step = self._load()

    def run(self) -> None:
        """Trains from the last checkpoint to the end; a kill loses at most `save_every` steps."""
        bar = tqdm(
            total=self.options.steps,
            initial=self.step,
            desc=self.folder.name,
            disable=self.quiet or not self.accelerator.is_main_process,
        )
        self.started, self.first = time.monotonic(), self.step
        try:
            while self.step < self.options.steps and not self._out_of_time():
                losses = self._train_step()
                self.step += 1
                bar.update()
                if self.step % self.options.log_every == 0 or self.step == self.options.steps:
                    bar.set_postfix({k: f"{v:.4f}" for k, v in self._log(losses).items()})
                if self.step % self.options.save_every == 0:
                    self.save()
                if self.step % self.options.preview_every == 0:
                    self.preview()
        except KeyboardInterrupt:
            self.save()
            raise
        finally:
            bar.close()
        self.save()
        self.preview()

    def _train_step(self) -> dict[str, Tensor]:
        """One move of the weights over `accumulate` batches."""
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.step, options)
        for part in range(options.accumulate):
            batch = self._batch(part)
            with self.accelerator.accumulate(self.net), _fast_attention(self.accelerator.device):
                losses = self.net(**batch)
                self.accelerator.backward(sum(losses.values()))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.weights, options.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.ema.step(self.weights)
        return losses

    def _batch(self, part: int) -> dict:
        """This process's inputs of this step, on its device."""
        options, place = self.options, self.accelerator
        index = (self.step * options.accumulate + part) * place.num_processes + place.process_index
        generator = torch.Generator().manual_seed(hash((options.seed, index)) % 2**63)
        numbers = range(index * options.batch, (index + 1) * options.batch)
        batch = self.task.batch(numbers, generator)
        return {key: value.to(place.device) for key, value in batch.items()}

    def _out_of_time(self) -> bool:
        """True on every process as soon as the first one says that the time is spent."""
        if math.isinf(self.options.minutes):
            return False
        spent = [time.monotonic() - self.started > self.options.minutes * 60]
        return broadcast_object_list(spent)[0]

    def _log(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Appends the losses, averaged over processes, and the speed to metrics.jsonl."""
        values = {k: float(self.accelerator.reduce(v.detach(), "mean")) for k, v in losses.items()}
        if self.accelerator.is_main_process:
            done = self.step - self.first
            images = done * self.options.batch * self.options.accumulate
            images *= self.accelerator.num_processes
            row = {"step": self.step, **values, "lr": lr_at(self.step - 1, self.options)}
            row["images_per_second"] = images / (time.monotonic() - self.started)
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        return values

    def save(self) -> None:
        """Writes weights, averages and optimizer state as one safetensors file."""
        if not self.accelerator.is_main_process:
            return
        tensors = {f"weight.{i}": p.detach() for i, p in enumerate(self.weights)}
        tensors |= {f"ema.{i}": p for i, p in enumerate(self.ema.shadow_params)}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{key}": value for key, value in state.items()}
        tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
        path = self.folder / "checkpoint.safetensors"
        save_file(tensors, str(path) + ".part", metadata={"step": str(self.step)})
        os.replace(str(path) + ".part", path)

    def _load(self) -> int:
        """Reads the checkpoint if there is one and returns the number of finished steps."""
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return 0
        adam: dict[int, dict[str, Tensor]] = {}
        with safe_open(path, "pt") as file, torch.no_grad():
            step = int(file.metadata()["step"])
            for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                kind, i, *rest = key.split(".")
                value = file.get_tensor(key)
                if kind == "weight":
                    self.weights[int(i)].copy_(value)
                elif kind == "ema":
                    self.ema.shadow_params[int(i)].copy_(value)
                else:
                    adam.setdefault(int(i), {})[rest[0]] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": adam, "param_groups": groups})
        self.ema.optimization_step = step
        _cut_log(self.folder / "metrics.jsonl", step)
        return step

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
        if self.accelerator.is_main_process:
            with self.averaged(), torch.no_grad():
                self.task.preview().save(self.folder / f"preview-{self.step:06d}.png")

    def export(self, folder: Path) -> None:
        """Writes the finished model with the averaged weights."""
        if self.accelerator.is_main_process:
            with self.averaged(), torch.no_grad():
                self.task.export(folder)


def _fast_attention(device: torch.device):
    """On a CPU the backward of fused attention is slower than plain matrix products (3 times)."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def _cut_log(path: Path, step: int) -> None:
    """Drops the rows of steps that the checkpoint does not hold; they will be written again."""
    if path.exists():
        rows = [row for row in path.read_text().splitlines() if json.loads(row)["step"] <= step]
        path.write_text("".join(row + "\n" for row in rows))
