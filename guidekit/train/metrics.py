"""What a training says of itself: metrics.jsonl, and a tracker where one is named."""

import dataclasses
import json
import math
import time
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.train.options import Options, lr_at


class Metrics:
    """Rows of losses and speed; the first process writes them.

    Raises GuidekitError for a tracker that is not installed.
    """

    def __init__(self, folder: Path, options: Options, accelerator: Accelerator):
        self.path, self.options = folder / "metrics.jsonl", options
        self.accelerator = accelerator
        if options.tracker:
            plain = {k: v for k, v in dataclasses.asdict(options).items() if v != math.inf}
            accelerator.init_trackers("guidekit", plain)
            if accelerator.is_main_process and not accelerator.trackers:
                name = options.tracker
                raise GuidekitError(f"the tracker {name!r} is not installed: pip install {name}")

    def begin(self, step: int) -> None:
        """Starts the clock at `step`."""
        self._started, self._first = time.monotonic(), step

    def cut(self, step: int) -> None:
        """Drops the rows of steps that the checkpoint does not hold; they will be written again."""
        if not (self.accelerator.is_main_process and self.path.exists()):
            return
        # A kill may have torn the last row.
        rows = [row for row in self.path.read_text().splitlines() if row.endswith("}")]
        rows = [row for row in rows if json.loads(row)["step"] <= step]
        part = self.path.with_name(self.path.name + ".part")
        part.write_text("".join(row + "\n" for row in rows))
        part.replace(self.path)

    def write(self, step: int, losses: dict[str, Tensor], skipped: int) -> dict[str, float]:
        """Appends the losses, averaged over processes, and the speed; returns the losses."""
        values = {k: float(self.accelerator.reduce(v.detach(), "mean")) for k, v in losses.items()}
        if self.accelerator.is_main_process:
            row = {k: v if math.isfinite(v) else None for k, v in values.items()}
            row |= {"lr": lr_at(step - 1, self.options), "skipped": skipped} | self._speed(step)
            if self.options.tracker:
                self.accelerator.log(row, step)
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step} | row) + "\n")
        return values

    def _speed(self, step: int) -> dict[str, float]:
        """Images a second since the start, and the seconds that are left at that rate."""
        options, done = self.options, step - self._first
        spent = time.monotonic() - self._started
        images = done * options.batch * options.accumulate * self.accelerator.num_processes
        left = (options.steps - step) / done * spent
        return {"images_per_second": images / spent, "eta_seconds": round(left, 1)}

    def end(self) -> None:
        """Closes the trackers; accelerate's end_training would end the processes' group too."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
