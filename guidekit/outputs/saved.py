"""A run that Python drew: as files in a folder, and as a notebook shows it."""

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from guidekit.backbones.schedulers import SCHEDULERS
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError
from guidekit.images import enlarge, heat_map, overlay, save_image, to_image
from guidekit.inputs.start import Start
from guidekit.options import stated
from guidekit.outputs import folders
from guidekit.run import Run
from guidekit.system.untrusted import printable
from guidekit.zoo.shipped import ZOO

FORMAT = 1  # of run.json
MAPS = "attention after"  # by which name guidances keep maps in the account
SHOWN = 160  # pixels of an image in a notebook


class Drawn:
    """What a run shows and keeps of itself, for `guidekit.Sampling`."""

    run: Run
    #: Number of denoising steps.
    steps: int
    #: How the steps were laid out, and the first z.
    start: Start
    _images: Tensor | None = None
    _latents: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]. Raises GuidekitError before they are drawn."""
        return self._finished(self._images)

    @property
    def latents(self) -> Tensor:
        """The last z (B, C, h, w). Raises GuidekitError before it is drawn."""
        return self._finished(self._latents)

    @property
    def pil(self) -> list[Image.Image]:
        """The finished images as PIL has them. Raises GuidekitError before they are drawn."""
        return [to_image(image) for image in self.images]

    def save(self, folder: str | Path) -> Path:
        """Writes the finished images into a new folder, as `guidekit sample` does; returns it.

        SEED.png, `overlay/`, `attention/`, `masks/` and run.json. What only Python can give, such
        as a live scheduler or several conditions, is noted in run.json, which cannot repeat it.
        Raises GuidekitError before the images are drawn, and for a folder that cannot be made.
        """
        return save_run(self.run, self.images, Path(folder), self.steps, self.start)

    def _repr_html_(self) -> str:
        """What a notebook shows: every image with its masks and attention maps."""
        return as_html(self.run, self._images)

    def _finished(self, found: Tensor | None) -> Tensor:
        if found is None:
            raise GuidekitError("nothing is drawn yet; call finish(), or iterate to the end")
        return found


def save_run(run: Run, images: Tensor, folder: Path, steps: int, start: Start) -> Path:
    """Writes images (B, 3, H, W) in [0, 1], masks, maps and run.json into a new folder."""
    folder = folders.new_folder(folder, "run")
    with folders.removed_if_empty(folder):
        folders.save_masks(run.conditions[0].segments, folder)
        for index, (seed, pixels) in enumerate(zip(run.seeds, images, strict=True)):
            condition, image = run.conditions[index], to_image(pixels)
            files = folders.carried(folders.mask_files(condition.segments))
            tables = _tables(run, condition, steps) | files
            save_image(image, folder / f"{seed}.png", tables)
            if masks := [segment.mask for segment in condition.segments]:
                save_image(overlay(image, masks), folder / "overlay" / f"{seed}.png")
            for part, shown in enumerate(_maps(run, index)):
                save_image(shown, folder / "attention" / f"{seed}-{part}.png")
        folders.write_record(_tables(run, run.conditions[0], steps) | _record(run, start), folder)
        (folder / folders.CLAIM).unlink(missing_ok=True)
    return folder


def _tables(run: Run, condition: Condition, steps: int) -> dict[str, Any]:
    """The tables of run.json, as far as settings can say what Python was given."""
    height, width = run.size
    sample = {
        "model": _model(run),
        "prompt": condition.prompt,
        "negative": condition.negative,
        "label": condition.label,
        "seeds": list(run.seeds),
        "steps": steps,
        "scheduler": _scheduler(run),
        "cfg": run.cfg,
        "eta": run.step_kwargs.get("eta", 0.0),
        "height": height,
        "width": width,
        "particles": len(run.groups[0]),
    }
    plugin = {guidance.name: stated(guidance) for guidance in run.guidances}
    segment = folders.segment_tables(condition.segments)
    return {"format": FORMAT, "sample": sample, "plugin": plugin, "segment": segment}


def _model(run: Run) -> str:
    """The name of the model: a built-in's, else where the pipeline came from."""
    path = Path(str(run.denoiser.pipeline.config.get("_name_or_path", "")))
    return path.name if path.parent == ZOO else str(path)


def _scheduler(run: Run) -> str | None:
    """The scheduler by its short name where it is not the pipeline's own."""
    name, own = type(run.scheduler).__name__, type(run.denoiser.pipeline.scheduler).__name__
    names = {cls: short for short, cls in SCHEDULERS.items()}
    return None if name == own else names.get(name)


def _unsaid(run: Run, start: Start) -> list[str]:
    """What decided the images and is not among the settings, in words."""
    unsaid = {
        "controls": run.controls is not None,
        "the image to follow": any(c.image is not None for c in run.conditions),
        "the label map": any(c.map is not None for c in run.conditions),
    }
    names = [name for name, there in unsaid.items() if there]
    names += [name for name, value in vars(start).items() if value is not None]
    return [f"{name} of the run: not written here, so the settings draw others" for name in names]


def _record(run: Run, start: Start) -> dict[str, Any]:
    """What came of the run, and what its settings cannot repeat."""
    account, notes = run.account, list(run.account.notes)
    alone = len(run.groups) == len(run.seeds)  # particles have copies of one
    if alone and any(condition is not run.conditions[0] for condition in run.conditions):
        notes.append("the images had conditions of their own; the settings are those of the first")
    if dict(run.scheduler.config) != dict(run.denoiser.pipeline.scheduler.config):
        notes.append("the scheduler had settings of its own, which are not written here")
    notes += _unsaid(run, start)
    record = {
        "status": "finished",
        "versions": folders.versions(),
        "machine": folders.machine(),
        "scheduler": type(run.scheduler).__name__,
        "finished": list(run.seeds),
        "energy": {g.name: account.first_and_last(g.name) for g in run.guidances},
        "edits": account.edits,
        "calls": account.calls,
        "guides": account.guides,
        "notes": notes,
        "account": account.rows,
    }
    return {"record": record}


def _maps(run: Run, index: int) -> list[Image.Image]:
    """The last attention map of every segment of an image; none where no guidance kept any."""
    maps = run.account.maps.get(MAPS)
    count = len(run.conditions[index].segments)
    return [] if maps is None else [heat_map(maps[index, part]) for part in range(count)]


def as_html(run: Run, images: Tensor | None) -> str:
    """The images with their masks and maps, the energies and the notes; nothing is fetched."""
    first = run.conditions[0]
    title = first.prompt or type(run.denoiser.pipeline).__name__
    names = ", ".join(guidance.name for guidance in run.guidances) or "no plugin"
    head = f"<p><b>{_text(title)}</b><br>{_text(names)}, cfg {run.cfg:g}</p>"
    if images is None:
        return f"{head}<p>{len(run.seeds)} images, not drawn yet: call finish(), or iterate.</p>"
    rows = "".join(_row(run, index, pixels) for index, pixels in enumerate(images))
    energies = {g.name: run.account.first_and_last(g.name) for g in run.guidances}
    lines = [f"energy of {n}: {e[0]:.4g} to {e[1]:.4g}" for n, e in energies.items() if e]
    tail = "".join(f"<p>{_text(line)}</p>" for line in [*lines, *run.account.notes])
    return f"<div>{head}{rows}{tail}</div>"


def _row(run: Run, index: int, pixels: Tensor) -> str:
    """One image: itself, with its masks, and its maps."""
    seed, segments = run.seeds[index], run.conditions[index].segments
    image = to_image(pixels)
    shown = [(image, f"seed {seed}")]
    if segments:
        shown.append((overlay(image, [s.mask for s in segments]), "with its masks"))
    maps = zip(_maps(run, index), segments, strict=False)  # there may be no maps
    shown += [(one, f"attention of {segment.phrase}") for one, segment in maps]
    return f'<div style="display:flex;gap:8px;flex-wrap:wrap">{"".join(map(_figure, shown))}</div>'


def _figure(shown: tuple[Image.Image, str]) -> str:
    image, caption = shown
    buffer = io.BytesIO()
    enlarge(image, SHOWN).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure style="margin:0"><img width="{SHOWN}" alt="{_text(caption)}" '
        f'src="data:image/png;base64,{data}"><figcaption style="font-size:smaller">'
        f"{_text(caption)}</figcaption></figure>"
    )


def _text(text: str) -> str:
    return escape(printable(text))
