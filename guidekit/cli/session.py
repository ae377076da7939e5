"""Drawing a plan: batch by batch, each image kept as soon as it is finished."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from guidekit import images as pictures
from guidekit.backbones.safety import flagged
from guidekit.cli import outputs
from guidekit.cli.plan import Plan, Target
from guidekit.cli.record import Record
from guidekit.cli.report import write_report
from guidekit.errors import NonFiniteError
from guidekit.guidance import Guidance
from guidekit.masks import resize_mask
from guidekit.sampler import Sampling, accepted
from guidekit.seeds import derived_seed
from guidekit.step import Step

Progress = Callable[[int, int], None]  # steps done, steps in all
Watch = Callable[[Sampling, Step], None]  # called after every step; it may raise Stopped


class Stopped(Exception):
    """Raised by who watches a run, to end it within a step; what is finished is kept."""


class Session:
    """Draws a plan into its folder, and keeps what is finished.

    The first batch is prepared at once: GuidekitError for what cannot work comes before anything
    is drawn or written. watch: sees every step of every batch, guided or not.
    """

    def __init__(self, plan: Plan, watch: Watch | None = None):
        self.plan, self._watch = plan, watch
        self._calls: dict[str, str] = dict(plan.settings.replays.get("calls") or {})
        self._prepared: Sampling | None = self._sampling(plan.batches[0], plan.guidances)
        self.record = Record(plan)
        self._parts = len(plan.batches) * (1 + plan.compares)  # draws of a batch, from start to end
        self._steps = 0

    def _sampling(
        self, targets: tuple[Target, ...], guidances: tuple[Guidance, ...], attempt: int = 0
    ) -> Sampling:
        """A batch with the settings of the plan; later attempts have seeds of their own."""
        s = self.plan.settings
        return Sampling(
            self.plan.denoiser,
            [target.condition for target in targets],
            guidances,
            seeds=_seeds(targets, attempt),
            steps=s.steps,
            cfg=s.cfg,
            embedded_cfg=s.embedded_cfg,
            eta=s.eta,
            height=s.height,
            width=s.width,
            scheduler=self.plan.scheduler,
            memory=s.memory,
            nonfinite=s.nonfinite,
            attention=s.attention,
            calls=self._calls,
        )

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
        """Draws a batch to its end: images (B, 3, H, W), black where the model's checker says so.

        Raises NonFiniteError for images with NaN, which would be black files.
        """

        def tell(step: Step) -> None:
            self._steps += 1
            if progress:
                progress(self._steps, max(self._steps, self._parts * step.n))
            if self._watch:
                self._watch(sampling, step)

        images = sampling.finish(tell).images
        self._calls |= sampling.account.calls  # what the first batch measured holds for all
        finite = torch.isfinite(images).flatten(1).all(1).tolist()
        if bad := [seed for seed, fine in zip(sampling.seeds, finite, strict=True) if not fine]:
            raise NonFiniteError(
                f"the images of seeds {bad} are not finite; lower the scale of a plugin, cfg or "
                "eta, or use --dtype float32"
            )
        return self._checked(sampling, images)

    def _checked(self, sampling: Sampling, images: Tensor) -> Tensor:
        """The images, black where the pipeline has a safety checker that says so; it is noted."""
        found = flagged(self.plan.denoiser, images)
        if found is None:
            return images
        self.record.account.note(
            "the model's safety checker looked at every image, as in the bare pipeline"
        )
        if black := [seed for seed, bad in zip(sampling.seeds, found, strict=True) if bad]:
            self.record.account.note(f"the model's safety checker blackened seeds {black}")
        shown = torch.tensor(found, device=images.device)[:, None, None, None]
        return torch.where(shown, torch.zeros_like(images), images)

    def _draw_guided(self, targets: tuple[Target, ...], progress: Progress | None) -> None:
        """One batch; images that a guidance rejects are drawn again, at most `tries` times."""
        for attempt in range(self.plan.settings.tries):
            sampling, self._prepared = self._prepared, None
            if sampling is None:
                sampling = self._sampling(targets, self.plan.guidances, attempt)
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
        images = self._finish(self._sampling(targets, ()), progress)
        for target, picture in zip(targets, images, strict=True):
            path = self.plan.folder / "unguided" / f"{target.seed}.png"
            outputs.save_picture(pictures.to_image(picture), path)

    def _save_given(self) -> None:
        """What all images were asked to follow: masks, and the reference."""
        condition, folder = self.plan.condition, self.plan.folder
        outputs.save_masks(condition.segments, folder)
        if condition.image is not None:
            seen = condition.image.pixels(min(condition.image.image.size))
            outputs.save_picture(pictures.to_image(seen / 2 + 0.5), folder / "reference.png")

    def _save(self, targets: tuple[Target, ...], images: Tensor, sampling: Sampling) -> None:
        """The images (B, 3, H, W) of a batch, with masks drawn over, and the attention maps."""
        folder = self.plan.folder
        masks = [segment.mask for segment in self.plan.condition.segments]
        for target, picture in zip(targets, images, strict=True):
            image = pictures.to_image(picture)
            outputs.save_picture(image, folder / target.path, self.record.settings_of(target))
            if masks:
                path = folder / "overlay" / f"{target.seed}.png"
                outputs.save_picture(pictures.overlay(image, masks), path)
        self._save_attention(targets, sampling.account.pictures)

    def _save_attention(self, targets: tuple[Target, ...], maps: dict[str, Tensor]) -> None:
        """Each segment's map (h, w) at the first and the last guided step, side by side."""
        if "attention before" not in maps or "attention after" not in maps:
            return
        segments = self.plan.condition.segments
        both = zip(targets, maps["attention before"], maps["attention after"], strict=True)
        for target, before, after in both:
            for index in range(len(segments)):
                image = pictures.heat_pair(before[index], after[index])
                path = self.plan.folder / "attention" / f"{target.seed}-{index}.png"
                outputs.save_picture(image, path)
            found = [_inside(after[i], segment.mask) for i, segment in enumerate(segments)]
            self.record.facts.setdefault("inside", {})[str(target.seed)] = found


def _inside(attention: Tensor, mask: Tensor) -> float:
    """Share of a map (h, w) that lies inside a mask (H, W), from 0 to 1."""
    values = attention.detach().float().cpu()
    share = (values * resize_mask(mask, *values.shape)).sum() / values.sum()
    return round(float(share.nan_to_num()), 4)


def _seeds(targets: tuple[Target, ...], attempt: int) -> list[int]:
    """The seeds of an attempt: their own, then derived ones."""
    seeds = [target.seed for target in targets]
    return seeds if attempt == 0 else [derived_seed(seed, attempt) for seed in seeds]
