"""Digits: ten-way guidance from 10, 20 and 50 labels, and augmentation of a small classifier."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_baselines import by_logits, clean_pixels, noised_pixels, other_features, random_twin
from fewshot_code import Code, trained_code
from fewshot_store import Store
from guidekit import Condition, Denoiser, Guidance, Sampling, load
from guidekit.evaluate import judge as evaluate
from guidekit.evaluate.intervals import over_trainings
from guidekit.evaluate.rows import mean_column
from guidekit.heads import Examples, FitOptions, Head, fit
from guidekit.heads.augment import accepted_images
from guidekit.seeds import derived_seed
from guidekit.train.digits import DigitJudge
from guidekit.worlds import digits
from guidekit.zoo.shipped import model_defaults
from guidekit_fewshot import Fewshot

NAMES = [str(digit) for digit in range(10)]
OURS = {
    "paper": FitOptions(),  # scale 25 in all steps; the other rows have the model's tuned fields
    "stopped": FitOptions(),
    "detached": FitOptions(),
    "first": FitOptions(noised=True),
}
METHODS = (
    "unguided",
    *(f"ours, {form}" for form in OURS),
    "ours, detached + accept",
    "clean pixels",
    "noised pixels",
    "random denoiser",
    "rejection only",
    "latent code",
    "oracle, all labels",
)
# The same at other scales, to compare methods at equal diversity; of 20 labels.
SWEEP = tuple(f"{m} x{s}" for m in ("ours, detached", "clean pixels") for s in (1, 3, 10, 25))

Make = Callable[[Tensor], Guidance | None]  # from digits (B,)


@dataclass
class Digits:
    """Model, judge and settings of the digit tables; `store` keeps what is finished."""

    model: str
    judge: DigitJudge
    store: Store
    per_draw: int  # images a draw of the shots, a multiple of 10
    draws: int = 5
    steps: int = 50
    batch: int = 100
    seed: int = 0
    code_steps: int = 1500  # of the training of the row "latent code"

    @cached_property
    def code(self) -> Code:
        """The diffusion autoencoder of the digits."""
        return trained_code("digits", self.store.folder / "code-digits", self.code_steps, 64)

    def __post_init__(self):
        tuned = model_defaults(self.model).get("plugin", {}).get("fewshot", {})
        self.scale, self.start = tuned.get("scale", 25.0), tuned.get("start", 0.0)
        self.heads: dict[tuple, Head] = {}
        self.denoiser = Denoiser(load(self.model))
        self.real = digits.split("test")
        self.real_features = self.see(self.real[0])[1].numpy()
        self.spread = within_class(self.real_features, self.real[1].numpy())

    @torch.no_grad()
    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The judge's classes and features of images (n, 1, 8, 8) in [-1, 1]."""
        logits, features = self.judge(pixels)
        return logits.argmax(1), features

    def scale_of(self, method: str) -> float:
        """The scale in a method's name, else the model's tuned one."""
        return float(method.partition(" x")[2] or self.scale)

    def head(self, labels: int | None, draw: int, options: FitOptions) -> Head:
        """The head of a draw of the shots; with labels None that of the whole split."""
        key = (labels, draw, options.noised)
        if key not in self.heads:
            shots = digits.split("train") if labels is None else digits.shots(labels // 10, draw)
            self.heads[key] = fit(self.denoiser, Examples.of(*shots, NAMES), options)[0]
        return self.heads[key]

    def draw(self, make: Make, tag: str, wanted: Tensor) -> Tensor:
        """Images (n, 1, 8, 8) in [-1, 1] of the digits (n,)."""
        found = []
        for first in range(0, len(wanted), self.batch):
            part = wanted[first : first + self.batch]
            seeds = [derived_seed(self.seed, tag, first + i) for i in range(len(part))]
            guidance = make(part)
            own = isinstance(guidance, Fewshot)
            run = Sampling(
                self.denoiser,
                [Condition(targets={"fewshot": int(w)} if own else {}) for w in part],
                [] if guidance is None else [guidance],
                seeds=seeds,
                steps=self.steps,
            )
            found.append(run.finish().images * 2 - 1)
        return torch.cat(found)

    def cell(self, method: str, labels: int | None, draw: int) -> dict[str, np.ndarray]:
        """Judged images of one method, number of labels and draw of the shots."""
        key = {
            "method": method,
            "labels": labels,
            "draw": draw,
            "n": self.per_draw,
            "steps": self.steps,
            "scale": self.scale_of(method),
            "seed": self.seed,
            "model": self.model,
        }
        if method == "latent code":
            key["code steps"] = self.code_steps
        return self.store.cell(key, lambda: self._make_cell(method, labels, draw))

    def _make_cell(self, method: str, labels: int | None, draw: int) -> dict[str, np.ndarray]:
        each, tag = self.per_draw // 10, f"{labels} {draw}"
        if method == "rejection only":
            pictures = self._rejected(labels, draw, each)
        elif method == "latent code":
            found = self.code.classifier(*digits.shots(labels // 10, draw), 10)
            seed = derived_seed(self.seed, tag) % 2**32
            pictures = self.code.accepted(found, each, max(4 * self.per_draw, 200), seed)
        elif method.endswith("accept"):
            pictures = [self._accepted(labels, draw, digit, each) for digit in range(10)]
        else:
            wanted = torch.arange(10).repeat_interleave(each)
            pictures = self.draw(self.maker(method, labels, draw), tag, wanted).split(each)
        wanted = np.concatenate([np.full(len(p), digit) for digit, p in enumerate(pictures)])
        found, features = self.see(torch.cat(pictures))
        return {"wanted": wanted, "found": found.numpy(), "features": features.numpy()}

    def _rejected(self, labels: int, draw: int, each: int) -> list[Tensor]:
        """Unguided images that the head gives a digit at least 0.2 and more than any other."""
        pool = self.draw(
            lambda digits: None, f"pool {draw}", torch.zeros(max(4 * self.per_draw, 200))
        )
        p = self.head(labels, draw, OURS["paper"]).predict(self.denoiser, pool).softmax(1)
        value, found = p.max(1)
        return [pool[(found == digit) & (value >= 0.2)][:each] for digit in range(10)]

    def _accepted(self, labels: int, draw: int, digit: int, each: int) -> Tensor:
        """Guided images that the head gives their digit at least 0.2; three tries each."""
        head = self.head(labels, draw, OURS["detached"])
        guidance = Fewshot(
            head=self._saved(head),
            label=str(digit),
            form="detached",
            scale=self.scale,
            start=self.start,
        )
        images, _, _ = accepted_images(
            self.denoiser,
            guidance,
            each,
            batch=self.batch,
            steps=self.steps,
            seed=derived_seed(self.seed, labels, draw, digit),
        )
        return torch.zeros(0, 1, 8, 8) if images is None else images * 2 - 1

    def maker(self, method: str, labels: int | None, draw: int) -> Make:
        """A function from digits (B,) to the guidance of a method."""
        scale = self.scale_of(method)
        method = method.partition(" x")[0]
        if method == "unguided":
            return lambda digits: None
        if method.startswith("oracle"):
            return self._fewshot(self.head(None, 0, OURS["paper"]), "detached", scale)
        if method.startswith("ours"):
            form = method.removeprefix("ours, ")
            head = self.head(labels, draw, OURS[form])
            if form == "paper":  # ends the second call early, which changes no number
                return self._fewshot(head, "stopped", 25.0, 0.0)
            return self._fewshot(head, form, scale)
        pictures, targets = digits.shots(labels // 10, draw)
        if method == "clean pixels":
            found = clean_pixels(pictures, targets, 10)
            return lambda wanted: by_logits(
                lambda step: found(step.x0), wanted, scale, "x0", self.start
            )
        if method == "noised pixels":
            logits = noised_pixels(self.denoiser, pictures, targets, 10)
            return lambda wanted: by_logits(logits, wanted, scale, "input", self.start)
        twin = random_twin(self.denoiser)
        head, _ = fit(twin, Examples.of(pictures, targets, NAMES), OURS["paper"])
        logits = other_features(head, twin)
        return lambda wanted: by_logits(logits, wanted, scale, "x0", self.start)

    def _fewshot(self, head: Head, form: str, scale: float, start: float | None = None) -> Make:
        start, folder = self.start if start is None else start, self._saved(head)
        return lambda wanted: Fewshot(head=folder, form=form, scale=scale, start=start)

    def _saved(self, head: Head) -> Path:
        return head.save(self.store.folder / "heads" / f"{id(head)}")

    def row(self, method: str, labels: int | None) -> dict:
        """Accuracy, diversity and Frechet distance of a method over the draws of the shots."""
        once = method.startswith(("unguided", "oracle"))
        cells = [self.cell(method, None if once else labels, d) for d in range(self.draws)]
        row = {
            "labels": "" if once else labels,
            "method": method,
            "n": sum(len(c["wanted"]) for c in cells),
        }
        for name, statistic in {
            "accuracy": lambda c: float((c["found"] == c["wanted"]).mean()),
            "diversity": lambda c: within_class(c["features"], c["wanted"]) / self.spread,
            "diversity right": lambda c: within_class(*right(c)) / self.spread,
        }.items():
            row[name], row[f"{name} 95%"] = over_trainings(statistic, cells)
        features = np.concatenate([c["features"] for c in cells]).astype(np.float64)
        row["Frechet"] = evaluate.frechet(features, self.real_features.astype(np.float64))
        return row

    def by_draw(self, method: str, labels: int) -> list[float]:
        """Accuracy of each draw of the shots; the first one's were used to choose the scale."""
        cells = [self.cell(method, labels, draw) for draw in range(self.draws)]
        return [float((c["found"] == c["wanted"]).mean()) for c in cells]

    def rows(self, labels: tuple[int, ...], methods: tuple[str, ...]) -> list[dict]:
        """The table: rows without labels once, the others for every number of labels."""
        once = [self.row(m, None) for m in methods if m.startswith(("unguided", "oracle"))]
        rest = [m for m in methods if not m.startswith(("unguided", "oracle"))]
        return once + [self.row(m, count) for count in labels for m in rest]


def right(cell: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Features and classes of the images that the judge finds to be what was asked for."""
    found = cell["found"] == cell["wanted"]
    return cell["features"][found], cell["wanted"][found]


def at_equal_diversity(rows: list[dict]) -> str:
    """Ours at the model's scale, and what clean pixels reach at its diversity between theirs."""
    ours, lines = next(row for row in rows if row["method"] == SWEEP[3]), []
    for name in ("diversity", "diversity right"):
        clean = sorted((r[name], r["accuracy"]) for r in rows if r["method"].startswith("clean"))
        equal = float(np.interp(ours[name], *zip(*clean, strict=True)))
        gain = 100 * (ours["accuracy"] - equal)
        lines.append(
            f"at {name} {ours[name]:.2f}: {ours['method']} {ours['accuracy']:.3f}, "
            f"clean pixels {equal:.3f} (interpolated), {gain:+.1f} points"
        )
    return "\n".join(lines)


def within_class(features: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance of two images of one class in features (n, d), over the classes.

    An image that a resample holds twice is no pair.
    """
    means = []
    for label in np.unique(labels):
        x = features[labels == label]
        if len(x) > 1:
            distances = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
            means.append(distances.sum() / max((distances > 0).sum(), 1))
    return float(np.mean(means)) if means else 0.0


# Augmentation


def train_classifier(
    pictures: Tensor, targets: Tensor, mixup: bool, seed: int, steps: int
) -> DigitJudge:
    """A small classifier from scratch on images (n, 1, 8, 8); mixup as in Zhang et al. 2018."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitJudge(width=16, features=32, dropout=0.2).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        soft = F.one_hot(targets, 10).float()
        for _ in range(steps):
            index = torch.randint(len(pictures), (32,), generator=generator)
            x, y = pictures[index], soft[index]
            if mixup:
                share = float(np.random.default_rng(int(index[0])).beta(0.4, 0.4))
                other = index.roll(1)
                x = share * x + (1 - share) * pictures[other]
                y = share * y + (1 - share) * soft[other]
            loss = -(y * model(x)[0].log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def augmented_rows(bench: Digits, counts: tuple[int, ...], seeds: int, steps: int) -> list[dict]:
    """Test accuracy with real labels alone and with one to three times as many accepted images.

    The head is fitted on the same real labels; images are drawn once for each seed.
    """
    rows = []
    for count in counts:
        scores = {(k, m): [] for m in (False, True) for k in range(4)}
        for seed in range(seeds):
            real = digits.shots(count, 100 + seed)
            extra = _extra(bench, count, seed)
            for (times, mixup), found in scores.items():
                parts = [real[0]] + [p[: times * count] for p in extra]
                y = [real[1]] + [
                    torch.full((len(p[: times * count]),), d) for d, p in enumerate(extra)
                ]
                model = train_classifier(torch.cat(parts), torch.cat(y), mixup, seed, steps)
                with torch.no_grad():
                    right = model(bench.real[0])[0].argmax(1) == bench.real[1]
                found.append(float(right.float().mean()))
        for (times, mixup), found in scores.items():
            rows.append(
                {
                    "real a class": count,
                    "generated": f"+{times}x",
                    "mixup": mixup,
                    "n": seeds,
                    **mean_column("accuracy", np.array(found)),
                    "gain": float(np.mean(found)) - float(np.mean(scores[0, mixup])),
                }
            )
    return rows


def _extra(bench: Digits, count: int, seed: int) -> list[Tensor]:
    """Accepted images of every digit, three times as many as there are real ones."""
    key = {
        "method": "augmentation",
        "count": count,
        "seed": seed,
        "steps": bench.steps,
        "model": bench.model,
    }

    def make() -> dict[str, np.ndarray]:
        examples = Examples.of(*digits.shots(count, 100 + seed), NAMES)
        head, _ = fit(bench.denoiser, examples, OURS["paper"])
        folder = bench._saved(head)
        found = {}
        for digit in range(10):
            guidance = Fewshot(
                head=folder, label=str(digit), form="detached", scale=bench.scale, start=bench.start
            )
            images, *_ = accepted_images(
                bench.denoiser,
                guidance,
                3 * count,
                batch=bench.batch,
                steps=bench.steps,
                seed=derived_seed(seed, count, digit),
            )
            found[str(digit)] = images.numpy() * 2 - 1
        return found

    cell = bench.store.cell(key, make)
    return [torch.from_numpy(cell[str(digit)]) for digit in range(10)]


def load_judge(folder: str | Path) -> DigitJudge:
    """The judge of the digits."""
    judge = DigitJudge.from_pretrained(folder, dtype=torch.float32)
    return judge.eval().requires_grad_(False)
