"""A run of `guidekit sample`: settings to pictures, in batches, each kept when it is finished."""

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from guidekit import images as pictures
from guidekit.account import Account
from guidekit.backbones.denoiser import Denoiser
from guidekit.backbones.loading import load, make_scheduler
from guidekit.backbones.tokens import append_phrases, segment_columns
from guidekit.cli import outputs
from guidekit.cli.checks import check_settings
from guidekit.cli.plan import ask, example, nothing_asked, plugin_guidance, with_defaults
from guidekit.cli.report import write_report
from guidekit.cli.settings import Settings, dump
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError, NonFiniteError
from guidekit.guidance import Guidance
from guidekit.references import Reference, load_references, square
from guidekit.registry import Registry
from guidekit.sampler import Sampling, accepted
from guidekit.seeds import derived_seed
from guidekit.step import Step
from guidekit.zoo.shipped import ZOO

Progress = Callable[[Step, int, int], None]  # the step, the part being drawn, number of parts


class Studio:
    """One run: checks the settings, loads the model, draws, keeps what is finished.

    Raises GuidekitError for settings that cannot work, as early as they can be known.
    """

    def __init__(self, settings: Settings, blocked: tuple[str, ...] = ()):
        self.settings = settings = with_defaults(settings)
        registry = Registry(blocked)
        check_settings(settings)
        self.guidances = [plugin_guidance(registry, settings, name) for name in settings.plugin]
        self.condition = ask(settings)
        self.places: dict[int, tuple[str, Reference]] = {}  # seed: folder and what it follows
        if settings.image_folder is not None:
            self._lay_out_folder()
        self.folder = outputs.new_folder(
            settings.out, self.condition.prompt or Path(settings.model).name
        )
        self.account = Account()
        self.finished: list[int] = []
        self._started = time.monotonic()
        try:
            self._load(registry)
        except BaseException:
            outputs.discard_empty(self.folder)
            raise

    def _lay_out_folder(self) -> None:
        """A seed for every picture of the data set, from the first one on."""
        seeds = self.settings.seeds
        if seeds != tuple(range(seeds[0], seeds[0] + len(seeds))):
            raise GuidekitError(
                "image_folder draws per_image pictures of each, with one seed after the other; "
                f"give the first alone, --seeds {seeds[0]}"
            )
        references = load_references(self.settings.image_folder)
        each, first = self.settings.per_image or 1, seeds[0]
        numbers = range(first, first + each * len(references))
        owners = [pair for pair in references.items() for _ in range(each)]
        self.places = dict(zip(numbers, owners, strict=True))
        self.settings = replace(self.settings, seeds=tuple(numbers))
        self.condition = replace(self.condition, image=owners[0][1])

    def _conditions(self, seeds: list[int]) -> list[Condition]:
        """The condition of every seed's picture."""
        images = [self.places[s][1] if self.places else self.condition.image for s in seeds]
        return [replace(self.condition, image=image) for image in images]

    def _path(self, seed: int) -> str:
        """Where a seed's picture goes, relative to the folder."""
        return f"{self.places[seed][0]}/{seed}.png" if self.places else f"{seed}.png"

    def _load(self, registry: Registry) -> None:
        """The model, and what depends on it: tokens, the first entries of run.json."""
        self.denoiser = Denoiser(load_model(self.settings, registry))
        tokenizers = self.denoiser.tokenizers
        if self.denoiser.reads_text and nothing_asked(self.settings, self.condition):
            self.condition = example(self.condition.negative)
        self.condition = self.denoiser.prepared(self.condition)
        self.denoiser.check([self.condition])
        if self.settings.append_phrases and tokenizers:
            self.condition = append_phrases(self.condition, tokenizers[0])
        columns = segment_columns(tokenizers, self.condition)
        settings = self.settings = self._with_models_defaults(self.settings)
        self.scheduler = None
        if settings.scheduler is not None:
            self.scheduler = make_scheduler(self.denoiser.pipeline, settings.scheduler)
        few = list(settings.seeds[: settings.batch])
        self._sampling(few, self._conditions(few), self.guidances)  # may refuse
        if self.condition.image is not None and not self.places:
            picture = self.condition.image.picture
            shown = pictures.to_image(square(picture, min(picture.size)) / 255)
            outputs.save_picture(shown, self.folder / "reference.png")
        self.settings = replace(
            settings,
            prompt=self.condition.prompt,
            negative=self.condition.negative,
            label=self.condition.label,
            segment=outputs.save_segments(self.condition.segments, self.folder),
            plugin={g.name: _options(g) for g in self.guidances},
            device=str(self.denoiser.device),
            dtype=str(self.denoiser.dtype).removeprefix("torch."),
        )
        self.tables = dump(self.settings)
        self.record = self._first_record(columns)
        self._note_differences()

    def _first_record(self, columns: list[list[int]]) -> dict[str, Any]:
        """What is known before the first picture."""
        words = self._words()
        return {
            "status": "running",
            "versions": outputs.versions(),
            "machine": outputs.machine(),
            "model": _model_facts(self.settings.model, self.denoiser.pipeline),
            "scheduler": type(self.scheduler or self.denoiser.pipeline.scheduler).__name__,
            "tokens": [
                {"phrase": s.phrase, "columns": c, "tokens": [words[i] for i in c]}
                for s, c in zip(self.condition.segments, columns, strict=True)
            ],
        }

    def _words(self) -> list[str]:
        """The prompt's tokens, column by column; none for models without text."""
        if not self.denoiser.tokenizers:
            return []
        tokenizer = self.denoiser.tokenizers[0]
        return tokenizer.convert_ids_to_tokens(tokenizer(self.condition.prompt)["input_ids"])

    def _with_models_defaults(self, settings: Settings) -> Settings:
        """The settings with the guidance scale of the model's family where none was named."""
        cfg = self.denoiser.cfg if settings.cfg is None else settings.cfg
        return replace(settings, cfg=cfg)

    def _note_differences(self) -> None:
        """Says what is not as it was when the run.json that is followed was written."""
        for kind in ("versions", "machine", "model"):
            before = self.settings.replays.get(kind)
            for name, value in (before if isinstance(before, dict) else {}).items():
                now = self.record[kind].get(name)
                if name != "name" and now != value:
                    self.account.note(
                        f"{kind}: {name} was {value}, is {now}; pictures may differ slightly"
                    )

    def _sampling(self, seeds: list[int], conditions: list[Condition], guidances: list) -> Sampling:
        """A batch with the settings of this run."""
        s = self.settings
        return Sampling(
            self.denoiser,
            conditions,
            guidances,
            seeds=seeds,
            steps=s.steps,
            cfg=s.cfg,
            embedded_cfg=s.embedded_cfg,
            eta=s.eta,
            height=s.height,
            width=s.width,
            scheduler=self.scheduler,
            memory=s.memory,
            nonfinite=s.nonfinite,
            attention=s.attention,
        )

    @property
    def compares(self) -> bool:
        """Whether the same seeds are also drawn without guidance; not for a data set."""
        return (
            not self.places and self.settings.compare and any(g.scale != 0 for g in self.guidances)
        )

    def draw(self, progress: Progress | None = None) -> dict[str, Any]:
        """Draws all batches and returns what run.json holds; keeps it also when it is stopped."""
        size, seeds = self.settings.batch, list(self.settings.seeds)
        batches = [seeds[i : i + size] for i in range(0, len(seeds), size)]
        parts = len(batches) * (1 + self.compares)
        status = "failed"
        try:
            self._keep("running")
            for number, batch in enumerate(batches):
                part = number * (1 + self.compares)
                self._draw_guided(batch, _numbered(progress, part, parts))
                if self.compares:
                    self._draw_unguided(batch, _numbered(progress, part + 1, parts))
                self.finished += batch
                self._keep_if_cheap()
            status = "finished"
        except KeyboardInterrupt:
            status = "stopped"
            raise
        finally:
            self._keep(status)
            write_report(self.folder)
        return self.tables | {"record": self.record}

    def _draw_guided(self, seeds: list[int], progress: Callable[[Step], None] | None) -> None:
        """One batch; pictures that a guidance rejects are drawn again, at most `tries` times."""
        left = seeds
        for attempt in range(self.settings.tries):
            own = [derived_seed(s, attempt) if attempt else s for s in left]
            conditions = self._conditions(left)
            sampling = self._sampling(own, conditions, self.guidances).finish(progress)
            self._merge(sampling.account, own)
            self._save(left, sampling)
            kept = accepted(sampling.guidances, sampling.images).tolist()
            self._count(kept)
            left = [seed for seed, keep in zip(left, kept, strict=True) if not keep]
            if not left:
                return
        self.account.note(f"no try was accepted for seeds {left}; their last ones were kept")

    def _count(self, kept: list[bool]) -> None:
        """Adds to how many pictures were drawn and accepted, where a guidance may reject them."""
        judges = [g.name for g in self.guidances if type(g).accept is not Guidance.accept]
        for name in judges:
            both = self.record.setdefault("acceptance", {}).setdefault(
                name, {"drawn": 0, "accepted": 0}
            )
            both["drawn"] += len(kept)
            both["accepted"] += sum(kept)

    def _draw_unguided(self, seeds: list[int], progress: Callable[[Step], None] | None) -> None:
        """The same seeds without guidance."""
        conditions = self._conditions(seeds)
        if not self.denoiser.reads_image:
            conditions = [replace(c, image=None) for c in conditions]
        drawn = self._sampling(seeds, conditions, []).finish(progress).images
        for seed, picture in zip(seeds, drawn, strict=True):
            image = pictures.to_image(picture)
            outputs.save_picture(image, self.folder / "unguided" / f"{seed}.png")

    def _save(self, seeds: list[int], sampling: Sampling) -> None:
        """The pictures of a batch, with masks drawn over, and the attention maps."""
        _check_finite(seeds, sampling.images)
        self.record.setdefault("attention", sampling.run.attention)
        self.record.setdefault("attention_ran", _by_value(sampling.account.attention))
        self.record.setdefault("sites", _sites(sampling))
        masks = [segment.mask for segment in self.condition.segments]
        for i, seed in enumerate(seeds):
            image = pictures.to_image(sampling.images[i])
            text = self._tables_of(seed) | {"seed": seed, "versions": self.record["versions"]}
            outputs.save_picture(image, self.folder / self._path(seed), text)
            if masks:
                path = self.folder / "overlay" / f"{seed}.png"
                outputs.save_picture(pictures.overlay(image, masks), path)
        self._save_attention(seeds, sampling.account.pictures)

    def _save_attention(self, seeds: list[int], maps: dict[str, Tensor]) -> None:
        """Each segment's map (h, w) at the first and the last guided step, side by side."""
        if "attention before" not in maps or "attention after" not in maps:
            return
        for seed, before, after in zip(
            seeds, maps["attention before"], maps["attention after"], strict=True
        ):
            for index in range(len(self.condition.segments)):
                image = pictures.heat_pair(before[index], after[index])
                path = self.folder / "attention" / f"{seed}-{index}.png"
                outputs.save_picture(image, path)

    def _merge(self, account: Account, seeds: list[int]) -> None:
        """Adds a batch's account to the run's: rows of one step hold all pictures."""
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
        for note in account.notes:
            self.account.note(note)

    def _tables_of(self, seed: int) -> dict[str, Any]:
        """The settings that a picture carries; those of a data set leave out its other seeds."""
        if not self.places:
            return self.tables
        return self.tables | {"sample": self.tables["sample"] | {"seeds": [seed]}}

    def _keep_if_cheap(self) -> None:
        """Writes run.json unless that would take more than a hundredth of the run's time."""
        if time.monotonic() - self._kept >= 100 * self._keeping:
            self._keep("running")

    def _keep(self, status: str) -> None:
        """Writes run.json as things stand."""
        started = time.monotonic()
        self.record |= {
            "status": status,
            "finished": list(self.finished),
            "places": {str(seed): self._path(seed) for seed in self.places},
            "seconds": round(time.monotonic() - self._started, 3),
            "energy": {g.name: self.account.first_and_last(g.name) for g in self.guidances},
            "edits": self.account.edits,
            "notes": self.account.notes,
            "account": self.account.rows,
        }
        outputs.write_record(self.tables | {"record": self.record}, self.folder)
        self._kept = time.monotonic()
        self._keeping = self._kept - started  # seconds; it grows with the number of pictures


def _check_finite(seeds: list[int], images: Tensor) -> None:
    """Raises NonFiniteError for pictures (B, 3, H, W) with NaN, which would be black files."""
    finite = torch.isfinite(images).flatten(1).all(1).tolist()
    if bad := [seed for seed, fine in zip(seeds, finite, strict=True) if not fine]:
        raise NonFiniteError(
            f"the pictures of seeds {bad} are not finite; lower the scale of a plugin, cfg or eta, "
            "or use --dtype float32"
        )


def load_model(settings: Settings, registry: Registry) -> Any:
    """The pipeline of `--model`: a plugin's backbone `acme:x`, else whatever `load` knows."""
    quiet_libraries()
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    if ":" not in settings.model:
        return load(settings.model, settings.device, dtype)
    pipeline = registry.backbone(settings.model)()
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return pipeline.to(device) if dtype is None else pipeline.to(device, dtype)


def quiet_libraries() -> None:
    """Keeps the bars and remarks of diffusers and transformers off the terminal."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    logging.getLogger("xformers").setLevel(logging.ERROR)


def _options(guidance: Any) -> dict[str, Any]:
    """The options of a guidance as JSON has them."""
    values = {f.name: getattr(guidance, f.name) for f in dataclasses.fields(guidance) if f.init}
    return {name: _as_json(value) for name, value in values.items()}


def _as_json(value: Any) -> Any:
    """Paths as absolute texts, also inside lists."""
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return str(value.resolve()) if isinstance(value, Path) else value


def _model_facts(name: str, pipeline: Any) -> dict[str, Any]:
    """Name, class, path and hash of the model; a live pipeline of a plugin has no path."""
    places = [ZOO / name, Path(name)]
    if name.count("/") == 1:
        index = try_to_load_from_cache(name, "model_index.json")
        places += [Path(index).parent] if isinstance(index, str) else []
    path = next((p.resolve() for p in places if (p / "model_index.json").is_file()), None)
    return {
        "name": name,
        "class": type(pipeline).__name__,
        "path": None if path is None else str(path),
        "hash": None if path is None else outputs.model_hash(path),
    }


def _sites(sampling: Sampling) -> dict[str, list[str]]:
    """The modules that each guidance reads or changes."""
    found: dict[str, list[str]] = {}
    for guidance in sampling.guidances:
        found[guidance.name] = sampling.run.reads.all_sites(guidance)
    return found


def _numbered(progress: Progress | None, part: int, parts: int) -> Callable[[Step], None] | None:
    return None if progress is None else lambda step: progress(step, part, parts)


def _by_value(found: dict[str, str]) -> dict[str, list[str]]:
    """Every value with the sorted keys that have it."""
    return {value: sorted(k for k in found if found[k] == value) for value in found.values()}
