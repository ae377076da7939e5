"""What of a run is sent while it is drawn: how far it is, previews, energies, attention."""

import base64
import io
import math
import threading
import time
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from guidekit.cli.session import Stopped
from guidekit.images import heat_map, to_image
from guidekit.sampler import Sampling
from guidekit.serve.events import STEP, EventLog
from guidekit.step import Step

SHOWN = 256  # longer side of a preview
MAPS = "attention after"  # by which name guidances keep maps in the account


class Watcher:
    """Writes events of a session's steps, and ends it when `stop` is set.

    every: steps from one preview to the next, 0 for none. cell: of a grid, else "".
    """

    def __init__(self, log: EventLog, stop: threading.Event, every: int, cell: str = ""):
        self.log, self.stop, self.every, self.cell = log, stop, every, cell
        self.done = self.total = self._rows = 0
        self.seconds = 0.0  # that previews took
        self._sampling: Sampling | None = None

    def progress(self, done: int, total: int) -> None:
        """Steps done and in all, which the event of the step carries."""
        self.done, self.total = done, total

    def __call__(self, sampling: Sampling, step: Step) -> None:
        """After every step. Raises Stopped once the run is to end."""
        if sampling is not self._sampling:
            self._sampling, self._rows = sampling, 0
        guided = bool(sampling.guidances)
        where = {"cell": self.cell, "guided": guided, "seeds": sampling.seeds}
        rows = sampling.account.rows
        new, self._rows = rows[self._rows :], len(rows)
        self.log.add(
            STEP,
            **where,
            done=self.done,
            total=self.total,
            step=step.index,
            n=step.n,
            rows=[_row(row) for row in new],
        )
        if self.every and (step.index % self.every == self.every - 1 or step.images is not None):
            self._preview(sampling, step, where)
        if self.stop.is_set():
            raise Stopped

    def _preview(self, sampling: Sampling, step: Step, where: dict[str, Any]) -> None:
        """The images of the clean estimate, and the maps where a guidance keeps some."""
        started = time.perf_counter()
        images = step.images
        if images is None:
            x0 = step.level.x0(cast(Tensor, step.prediction), step.z).detach()
            with torch.no_grad():
                images = sampling.denoiser.decode(x0.to(sampling.denoiser.dtype))
        finite = bool(torch.isfinite(images).all())
        shown = [_shown(image) for image in images] if finite else []
        maps = sampling.account.maps.get(MAPS)
        self.seconds += time.perf_counter() - started
        self.log.add("preview", **where, step=step.index, images=shown, seconds=self.seconds)
        if maps is not None:
            drawn = [[_heat(one) for one in each] for each in maps]
            self.log.add("maps", **where, step=step.index, maps=drawn)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the account as a curve takes it: means over the images."""
    found = {"plugin": row["plugin"], "step": row["step"]}
    for name in ("energy", "grad_norm", "update_ratio"):
        values = [v for v in row.get(name, []) if v is not None and math.isfinite(v)]
        found[name] = sum(values) / len(values) if values else None
    return found


def _shown(image: Tensor) -> str:
    """An image (3, H, W) in [0, 1], small enough to be sent often."""
    picture = to_image(image)
    picture.thumbnail((SHOWN, SHOWN))
    return _data(picture, "WEBP", quality=85)


def _heat(values: Tensor) -> str:
    """A map (h, w) in colours of heat that are clear where it is low."""
    colours = heat_map(values, least=1).convert("RGBA")
    peak = max(float(values.max()), 1e-12)
    share = (values.float() / peak).clamp(0, 1).sqrt()
    colours.putalpha(Image.fromarray((share.numpy() * 235).round().astype("uint8")))
    return _data(colours, "PNG")


def _data(image: Image.Image, form: str, **options: Any) -> str:
    """An image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
