"""Drawing the blocks of a plan: a model that is loaded once, and the files of one block."""

import dataclasses
import hashlib
import io
import json
from typing import Any

import torch
from torch import Tensor

from guidekit.cli.batch import begin, finish
from guidekit.cli.models import model_facts
from guidekit.cli.plan import Target, append_wanted, in_groups, plan_of_none
from guidekit.cli.scale.store import RECORD, Store
from guidekit.cli.settings import FORMAT, dump
from guidekit.engine.evaluator import EVERY
from guidekit.errors import GuidekitError
from guidekit.images import to_image
from guidekit.outputs import folders
from guidekit.sampler import Sampling, accepted


class Drawer:
    """Draws any block of a plan, each always as one batch and with the plan's number of threads.

    Raises GuidekitError for a plan that cannot be drawn, and where another process with other
    defaults, of another version, has begun it.
    """

    def __init__(self, store: Store, device: str | None = None, blocked: tuple[str, ...] = ()):
        self.plan = store.plan
        torch.set_num_threads(self.plan.threads)
        settings = self.plan.settings(device)
        self.run = plan_of_none(settings, store.folder, blocked)
        #: What of versions and machine an image depends on.
        self.made_by = {**folders.versions(), **_machine()}
        _agree(store, self._record())

    def _record(self) -> dict[str, Any]:
        """The settings of all images, completed by the model's own values, and what drew them."""
        tables = dump(self.run.settings)
        sample = {k: v for k, v in tables["sample"].items() if k not in ("device", "batch")}
        named = ("map", "labels", "affinity")  # as the plan names them, not copies of a run
        sample |= {key: self.plan.sample.get(key) for key in named}
        tables["control"] = self.plan.control
        model = model_facts(self.run.settings.model, self.run.denoiser.pipeline)
        model.pop("path")
        versions = {"versions": folders.versions(), "machine": folders.machine(), "model": model}
        return {"format": FORMAT} | tables | {"sample": sample, "record": versions}

    def draw(self, number: int) -> list[tuple[str, bytes]]:
        """The files of a block: image, its facts, and its prompt or class where it has one.

        Raises whatever a condition or a plugin raises; nothing is written.
        """
        targets = tuple(self._target(seed) for seed in self.plan.seeds(number))
        images, facts = self._draw(targets)
        members = []
        for target in targets:
            data = _png(images[target.seed])
            about = self._about(target, number) | facts[target.seed]
            about["sha256"] = hashlib.sha256(data).hexdigest()
            members += _members(target, data, about)
        return members

    def _target(self, seed: int) -> Target:
        """An image and its condition, as the model reads it."""
        condition = self.plan.condition(seed, self.run.condition)
        if condition is not self.run.condition:
            condition = self.run.denoiser.prepared(condition)
            condition = append_wanted(condition, self.run.settings, self.run.denoiser)
        return Target(seed, f"{seed:08d}", condition)

    def _draw(self, targets: tuple[Target, ...]) -> tuple[dict[int, Tensor], dict[int, dict]]:
        """Images and facts by seed; what a guidance rejects is drawn again as a batch."""
        targets = in_groups(targets, self.run.settings.particles)
        run = dataclasses.replace(self.run, targets=targets)
        images: dict[int, Tensor] = {}
        facts: dict[int, dict] = {}
        for attempt in range(run.settings.tries):
            sampling = begin(run, targets, run.guidances, attempt, {EVERY: self.plan.calls})
            drawn = finish(run.denoiser, sampling)
            kept = accepted(sampling.guidances, sampling.images).tolist()
            for row, target in enumerate(targets):
                images[target.seed] = drawn.images[row]
                facts[target.seed] = _facts(sampling, row, attempt, kept[row])
                if drawn.black is not None:
                    facts[target.seed]["blackened"] = drawn.black[row]
            targets = tuple(t for t, keep in zip(targets, kept, strict=True) if not keep)
            if not targets:
                break
        return images, facts

    def _about(self, target: Target, number: int) -> dict[str, Any]:
        """What was asked of an image."""
        c = target.condition
        asked = {"prompt": c.prompt, "negative": c.negative, "label": c.label}
        asked["phrases"] = [segment.phrase for segment in c.segments]
        asked["image"] = None if c.image is None else c.image.path
        asked["condition"] = self.plan.condition_number(target.seed)
        own = {name: value for name, value in asked.items() if value not in (None, "", [])}
        return {"seed": target.seed, "block": number, "plan": self.plan.identity} | own


def _facts(sampling: Sampling, row: int, attempt: int, kept: bool) -> dict[str, Any]:
    """What became of one image of a batch: energies, rewards at the first and last guided step."""
    facts: dict[str, Any] = {}
    if any(guidance.rejects for guidance in sampling.guidances):
        facts = {"tries": attempt + 1, "accepted": kept}
    for guidance in sampling.guidances:
        own = [r for r in sampling.account.rows if r["plugin"] == guidance.name]
        for kind in ("energy", "reward"):
            if rows := [r for r in own if kind in r]:
                ends = [rows[0][kind][row], rows[-1][kind][row]]
                facts.setdefault(kind, {})[guidance.name] = ends
    return facts


def _members(target: Target, data: bytes, about: dict[str, Any]) -> list[tuple[str, bytes]]:
    """The files of an image as WebDataset groups them: one name, several endings."""
    found = [(".png", data), (".json", json.dumps(about, indent=1).encode() + b"\n")]
    if target.condition.prompt:
        found.append((".txt", target.condition.prompt.encode()))
    if target.condition.label is not None:
        found.append((".cls", str(target.condition.label).encode()))
    return [(target.path + ending, content) for ending, content in found]


def _png(pixels: Tensor) -> bytes:
    data = io.BytesIO()
    to_image(pixels).save(data, format="PNG")
    return data.getvalue()


def _machine() -> dict[str, Any]:
    machine = folders.machine()
    return {key: machine[key] for key in ("processor", "threads", "gpu")}


def _agree(store: Store, record: dict[str, Any]) -> None:
    """Writes run.json, or compares with the one that is there.

    Raises GuidekitError where the settings are completed otherwise than those of the images there.
    """
    text = json.dumps(record, indent=1)
    if store.publish_once(RECORD, text):
        return
    there = json.loads((store.folder / RECORD).read_text(encoding="utf-8"))
    for table in ("sample", "plugin", "segment", "control"):
        if there[table] != json.loads(text)[table]:
            raise GuidekitError(
                f"{store.folder} was begun with other values of [{table}], by guidekit "
                f"{there['record']['versions'].get('guidekit')}; use that version, or another --out"
            )
