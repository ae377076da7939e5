"""Drawing a plan: batch by batch, each image kept as soon as it is finished."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from guidekit.cli.batch import begin, finish
from guidekit.cli.controls import save_controls
from guidekit.cli.plan import Plan, Target
from guidekit.cli.record import Record
from guidekit.cli.report import write_report
from guidekit.evaluate.map_score import filled, inside
from guidekit.images import heat_pair, overlay, to_image
from guidekit.outputs import folders
from guidekit.sampler import Sampling, accepted
from guidekit.step import Step

Progress = Callable[[int, int], None]  # steps done, steps in all
Watch = Callable[[Sampling, Step], None]  # called after every step; it may raise Stopped


class Stopped(Exception):
    """Raised by who watches a run, to end it within a step; what is finished is kept."""


def _sites(sampling: Sampling) -> dict[str, list[str]]:
    """The sites of every guidance, by its name."""
    reads = sampling.run.reads
    return {guidance.name: reads.all_sites(guidance) for guidance in sampling.guidances}


class Session:
    """Draws a plan into its folder, and keeps what is finished.

    The first batch is prepared at once: GuidekitError for what cannot work comes before anything
    is drawn or written. watch: sees every step of every batch, guided or not.
    """

    def __init__(self, plan: Plan, watch: Watch | None = None):
        self.plan, self._watch = plan, watch
        self._calls: dict[str, str] = dict(plan.settings.replays.get("calls") or {})
        self._prepared: Sampling | None = begin(
            plan, plan.batches[0], plan.guidances, calls=self._calls
        )
        #: Where each guidance reads or edits the model.
        self.sites = _sites(self._prepared)
        #: What is worth knowing before it is drawn.
        self.notes = tuple(self._prepared.account.notes)
        self.record = Record(plan)
        self._parts = len(plan.batches) * (1 + plan.compares)  # draws of a batch, from start to end
        self._steps = 0

    def draw(self, progress: Progress | None = None) -> dict:
        """Draws all batches and returns what run.json holds; keeps it also when it is stopped."""
        status = "failed"
        try:
            self._save_given()
            self.record.write("running")
            for batch in self.plan.batches:
                self._draw_guided(batch, progress)
                if self.plan.compares:
                    self._draw_unguided(batch, progress)
                self.record.finish(batch)
            status = "finished"
        except (KeyboardInterrupt, Stopped):
            status = "stopped"
            raise
        finally:
            self.record.write(status)
            write_report(self.plan.folder)
        return self.record.contents(status)

    def _finish(self, sampling: Sampling, progress: Progress | None) -> Tensor:
        """Draws a batch to its end: images (B, 3, H, W); what the model's checker did is noted."""

        def tell(step: Step) -> None:
            self._steps += 1
            if progress:
                progress(self._steps, max(self._steps, self._parts * step.n))
            if self._watch:
                self._watch(sampling, step)

        drawn = finish(self.plan.denoiser, sampling, tell)
        self._calls |= sampling.account.calls  # what the first batch measured holds for all
        if drawn.black is not None:
            self.record.account.note(
                "the model's safety checker looked at every image, as in the bare pipeline"
            )
        if black := [s for s, bad in zip(sampling.seeds, drawn.black or (), strict=False) if bad]:
            self.record.account.note(f"the model's safety checker blackened seeds {black}")
        return drawn.images

    def _draw_guided(self, targets: tuple[Target, ...], progress: Progress | None) -> None:
        """One batch; images that a guidance rejects are drawn again, at most `tries` times."""
        for attempt in range(self.plan.settings.tries):
            sampling, self._prepared = self._prepared, None
            if sampling is None:
                sampling = begin(self.plan, targets, self.plan.guidances, attempt, self._calls)
            self._parts += attempt > 0
            images = self._finish(sampling, progress)
            self.record.add(sampling)
            self._save(targets, images, sampling)
            kept = accepted(sampling.guidances, sampling.images).tolist()
            self.record.count(kept)
            targets = tuple(t for t, keep in zip(targets, kept, strict=True) if not keep)
            if not targets:
                return
        left = [target.seed for target in targets]
        self.record.account.note(f"no try was accepted for seeds {left}; their last ones were kept")

    def _draw_unguided(self, targets: tuple[Target, ...], progress: Progress | None) -> None:
        """The same seeds without guidance."""
        if not self.plan.denoiser.reads_image:
            targets = tuple(replace(t, condition=replace(t.condition, image=None)) for t in targets)
        images = self._finish(begin(self.plan, targets, (), calls=self._calls), progress)
        for target, pixels in zip(targets, images, strict=True):
            path = self.plan.folder / "unguided" / f"{target.seed}.png"
            folders.save_image(to_image(pixels), path)

    def _save_given(self) -> None:
        """What all images were asked to follow: masks, and the reference."""
        condition, folder = self.plan.condition, self.plan.folder
        folders.save_masks(condition.segments, folder)
        save_controls(self.plan.controls, condition.map, folder)
        self.record.given.save(folder)
        if condition.image is not None:
            seen = condition.image.pixels(min(condition.image.image.size))
            folders.save_image(to_image(seen / 2 + 0.5), folder / "reference.png")

    def _save(self, targets: tuple[Target, ...], images: Tensor, sampling: Sampling) -> None:
        """The images (B, 3, H, W) of a batch, with masks drawn over, and the attention maps."""
        folder = self.plan.folder
        masks = [segment.mask for segment in self.plan.condition.segments]
        for target, pixels in zip(targets, images, strict=True):
            image = to_image(pixels)
            folders.save_image(image, folder / target.path, self.record.settings_of(target))
            if masks:
                path = folder / "overlay" / f"{target.seed}.png"
                folders.save_image(overlay(image, masks), path)
        self._save_attention(targets, sampling.account.maps)

    def _save_attention(self, targets: tuple[Target, ...], maps: dict[str, Tensor]) -> None:
        """Each segment's map (h, w) at the first and the last guided step, side by side."""
        if "attention before" not in maps or "attention after" not in maps:
            return
        segments = self.plan.condition.segments
        both = zip(targets, maps["attention before"], maps["attention after"], strict=True)
        for target, before, after in both:
            for index in range(len(segments)):
                image = heat_pair(before[index], after[index])
                path = self.plan.folder / "attention" / f"{target.seed}-{index}.png"
                folders.save_image(image, path)
            for name, score in (("inside", inside), ("filled", filled)):
                found = [score(after[i], segment.mask) for i, segment in enumerate(segments)]
                self.record.facts.setdefault(name, {})[str(target.seed)] = found
