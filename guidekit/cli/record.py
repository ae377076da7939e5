"""What is written of a run: run.json, `format = 1`, kept up to date while it is drawn."""

import functools
import time
from pathlib import Path
from typing import Any

from guidekit.account import Account
from guidekit.backbones.tokens import segment_columns
from guidekit.cli.controls import control_files
from guidekit.cli.models import model_facts
from guidekit.cli.plan import Plan, Target
from guidekit.cli.settings import FORMAT, dump
from guidekit.cli.words import unknown_words
from guidekit.guidance import Guidance
from guidekit.masks import coverage
from guidekit.outputs import folders
from guidekit.outputs.given import GivenImages
from guidekit.sampler import Sampling
from guidekit.zoo.shipped import ZOO

SHARE = 0.01  # of the time of a run that may go into writing its record


class Record:
    """The settings of a run and what came of them, in its folder's run.json."""

    def __init__(self, plan: Plan):
        self.plan = plan
        #: Images that the settings name; the tables name their copies.
        self.given = GivenImages(plan.settings.offered)
        tables = self.given.renamed(dump(plan.settings), plan.guidances)
        self.tables: dict[str, Any] = {"format": FORMAT} | tables
        self.account = Account()
        self.finished: list[int] = []
        self.facts = _first_facts(plan)
        self._started = time.monotonic()
        self._written = self._writing = 0.0
        self._note_differences()
        self._note_unknown_words()

    def _note_differences(self) -> None:
        """Notes what is not as it was when the run.json that is followed was written."""
        for kind in ("versions", "machine", "model"):
            before = self.plan.settings.replays.get(kind)
            for name, value in (before if isinstance(before, dict) else {}).items():
                now = self.facts[kind].get(name)
                if name != "name" and now != value:
                    self.account.note(
                        f"{kind}: {name} was {value}, is {now}; images may differ slightly"
                    )

    def _note_unknown_words(self) -> None:
        """Notes words of the prompt that a built-in model has never read."""
        plan = self.plan
        if (ZOO / plan.settings.model).is_dir() and plan.denoiser.tokenizers:
            words = unknown_words(plan.denoiser.tokenizers[0], plan.condition.prompt)
            if words:
                self.account.note(
                    f"{plan.settings.model} has never read {', '.join(map(repr, words))}; it is a "
                    "small model of one world, and draws what its own words say"
                )

    def settings_of(self, target: Target) -> dict[str, Any]:
        """The settings that an image carries, with the files that they name as `files`.

        Those of a data set leave out its other seeds and the files, which all its images share.
        """
        own = self.tables | {"seed": target.seed, "versions": self.facts["versions"]}
        if self.plan.follows_folder:
            return own | {"sample": own["sample"] | {"seeds": [target.seed]}}
        return own | self._files

    @functools.cached_property
    def _files(self) -> dict[str, Any]:
        """The files that the settings name: masks, controls' images, label map, given images."""
        plan = self.plan
        names = control_files(plan.controls, plan.condition.map) + list(self.given.sources)
        own = {name: (plan.folder / name).read_bytes() for name in names}
        return folders.carried(folders.mask_files(plan.condition.segments) | own)

    def add(self, sampling: Sampling) -> None:
        """Adds what the guidances did to a batch."""
        self._merge(sampling.account, sampling.seeds)
        ran = sampling.account.attention
        by_value = {value: sorted(k for k in ran if ran[k] == value) for value in ran.values()}
        reads = sampling.run.reads
        self.facts.setdefault("attention", sampling.run.attention)
        self.facts.setdefault("attention_ran", by_value)
        self.facts.setdefault("sites", {g.name: reads.all_sites(g) for g in sampling.guidances})

    def _merge(self, account: Account, seeds: list[int]) -> None:
        """Adds a batch's account to the run's: rows of one step hold all images."""
        rows = {(r["plugin"], r["step"], r["repeat"]): r for r in self.account.rows}
        for row in account.rows:
            row = {"plugin": row["plugin"], "seeds": seeds, **row}
            known = rows.get((row["plugin"], row["step"], row["repeat"]))
            if known is None:
                self.account.rows.append(row)
                continue
            for key, value in row.items():
                if isinstance(value, list) or key == "seconds":
                    known[key] = known[key] + value
        for plugin, count in account.edits.items():
            self.account.edits[plugin] = self.account.edits.get(plugin, 0) + count
        self.account.calls |= account.calls
        for plugin, hashes in account.guides.items():
            self.account.guided(plugin, frozenset(hashes))
        for note in account.notes:
            self.account.note(note)

    def count(self, kept: list[bool]) -> None:
        """Adds to how many images were drawn and accepted, where a guidance may reject them."""
        for guidance in self.plan.guidances:
            if type(guidance).accept is Guidance.accept:
                continue
            table = self.facts.setdefault("acceptance", {})
            both = table.setdefault(guidance.name, {"drawn": 0, "accepted": 0})
            both["drawn"] += len(kept)
            both["accepted"] += sum(kept)

    def finish(self, targets: tuple[Target, ...]) -> None:
        """Counts a batch as finished, and writes it down unless that takes too much of the time."""
        self.finished += [target.seed for target in targets]
        if SHARE * (time.monotonic() - self._written) >= self._writing:
            self.write("running")

    def contents(self, status: str) -> dict[str, Any]:
        """What run.json holds."""
        record = self.facts | {
            "status": status,
            "finished": list(self.finished),
            "seconds": round(time.monotonic() - self._started, 3),
            "energy": {g.name: self.account.first_and_last(g.name) for g in self.plan.guidances},
            "edits": self.account.edits,
            "calls": self.account.calls,
            "guides": self.account.guides,
            "notes": self.account.notes,
            "account": self.account.rows,
        }
        return self.tables | {"record": record}

    def write(self, status: str) -> None:
        """Writes run.json as things stand."""
        started = time.monotonic()
        folders.write_record(self.contents(status), self.plan.folder)
        self._written = time.monotonic()
        self._writing = self._written - started  # it grows with the number of images


def _first_facts(plan: Plan) -> dict[str, Any]:
    """What is known before the first image."""
    return {
        "status": "running",
        "versions": folders.versions(),
        "machine": folders.machine(),
        "model": model_facts(plan.settings.model, plan.denoiser.pipeline),
        "scheduler": type(plan.scheduler or plan.denoiser.pipeline.scheduler).__name__,
        "tokens": _tokens(plan),
        "controls": _controls(plan),
        "targets": _data_set(plan),
        "reads_image": plan.denoiser.reads_image,
    }


def _tokens(plan: Plan) -> list[dict[str, Any]]:
    """Columns and tokens of every segment's phrase, and its share of the image."""
    tokenizers, condition = plan.denoiser.tokenizers, plan.condition
    words = []
    if tokenizers:
        ids = tokenizers[0](condition.prompt)["input_ids"]
        words = tokenizers[0].convert_ids_to_tokens(ids)
    columns = segment_columns(tokenizers, condition)
    return [
        {
            "phrase": segment.phrase,
            "columns": found,
            "tokens": [words[i] for i in found],
            "coverage": round(coverage(segment.mask), 4),
        }
        for segment, found in zip(condition.segments, columns, strict=True)
    ]


def _controls(plan: Plan) -> list[dict[str, Any]]:
    """Every control's table, with the class of its network and a hash of its weights' sizes."""
    tables = plan.settings.control
    loaded = () if plan.denoiser.controls is None else plan.denoiser.controls.controls
    shared = None if plan.settings.map is None else plan.settings.map.name
    return [
        table
        | {"class": type(own.model).__name__}
        | {"image": table["image"] or (shared if own.reads_map else None)}
        | {"parameters": sum(p.numel() for p in own.model.parameters())}
        for table, own in zip(tables, loaded, strict=True)
    ]


def _data_set(plan: Plan) -> dict[str, dict[str, str]]:
    """Of a run that follows a folder: where each seed's image goes, and which it follows."""
    if not plan.follows_folder:
        return {}
    return {
        str(t.seed): {"path": t.path, "follows": str(Path(t.condition.image.path).resolve())}
        for t in plan.targets
    }
