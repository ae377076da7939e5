"""Part `energies` of benchmarks/family.py: colours and classes by losses of images.

    digits, class    `digits-ddpm`: cross-entropy of a small network that this script trains on the
                     split `train`; `digits-judge`, of a split of its own, says which digit it is
    scenes, class    `scenes-ddpm`: cross-entropy of `scenes-clip` over captions of all 48 objects;
                     `scenes-judge` says whether the object is there
    scenes, colour   `scenes-ddpm`: squared distance of the mean colour to one of eight; `off` is
                     what is left of it, and `found` whether the judge sees an object of that colour

Each image has its own class or colour, in turns. `found` is the share of images that show it,
`Frechet` the distance of the judge's features to real images, `diversity` the mean distance of
features between the images of one class. Scales are the best of two or three for six to forty
images of other seeds, by what the judge found.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from family_inverse import cost
from guidekit import Condition, Guidance, Sampling, load
from guidekit.evaluate import judge as evaluate
from guidekit.evaluate.diversity import spread
from guidekit.evaluate.frechet import frechet
from guidekit.evaluate.intervals import interval
from guidekit.noisy_clip.files import load_clip
from guidekit.noisy_clip.model import CleanClip
from guidekit.train.digits import DigitJudge
from guidekit.worlds import digits, scenes
from guidekit.zoo.shipped import ZOO
from guidekit_dps import Dps
from guidekit_energy import Energy
from guidekit_freedom import FreeDom
from guidekit_lgd import Lgd
from guidekit_mpgd import Mpgd
from guidekit_tfg import TrainingFree
from guidekit_ugd import Universal
from memory import PeakMemory

REFERENCE = 500  # real scenes for the Frechet distance, from number 100,000 on


@dataclass(frozen=True)
class Verdict:
    """Of n images: whether each shows what was wanted, how far off it is, and features (n, d)."""

    found: np.ndarray
    off: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class Task:
    """A loss of images (B, C, H, W) in [-1, 1] and wanted numbers (B,), and who judges."""

    model: str
    #: Numbers of classes or colours, which images have in turns.
    wanted: int
    loss: Callable[[Tensor, Tensor], Tensor]
    judged: Callable[[Tensor, Tensor], Verdict]
    real: Callable[[], np.ndarray]


# Digits


@cache
def small_classifier() -> nn.Module:
    """A network that knows digits of the split `train`, which is not the judge's."""
    images, labels = digits.split("train")
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 10))
        adam = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.1)
        for _ in range(200):
            noisy = images + 0.3 * torch.randn(images.shape)
            adam.zero_grad()
            F.cross_entropy(net(noisy), labels).backward()
            adam.step()
    return net.eval().requires_grad_(False)


def digit_loss(images: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy (B,) of the small network."""
    return F.cross_entropy(small_classifier()(images), wanted, reduction="none")


@cache
def digit_judge() -> DigitJudge:
    """The built-in judge."""
    return DigitJudge.from_pretrained(ZOO / "digits-judge", dtype=torch.float32).eval()


@torch.no_grad()
def judged_digits(images: Tensor, wanted: Tensor) -> Verdict:
    """Whether the judge reads the wanted digit."""
    logits, features = digit_judge()(images)
    off = digit_loss(images, wanted).numpy()
    return Verdict((logits.argmax(1) == wanted).numpy(), off, features.double().numpy())


def real_digits() -> np.ndarray:
    """Features of the split `test`."""
    return judged_digits(*digits.split("test")).features


# Scenes


@cache
def clip_of_objects() -> tuple[CleanClip, Tensor, float]:
    """scenes-clip, its embeddings (48, D) of each object over all backgrounds, its temperature."""
    clip = CleanClip(load_clip(ZOO / "scenes-clip")).eval().requires_grad_(False)
    lines = [scenes.caption([c], b) for c in scenes.CLASSES for b in scenes.BACKGROUND_NAMES]
    texts = clip.texts(lines).unflatten(0, (len(scenes.CLASSES), -1)).mean(1)
    return clip, F.normalize(texts, dim=-1), float(clip.clip.logit_scale.exp())


def object_loss(images: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy (B,) of the wanted object among all 48."""
    clip, texts, temperature = clip_of_objects()
    seen = F.normalize(clip.sees(images).embedding, dim=-1)
    return F.cross_entropy(temperature * seen @ texts.T, wanted, reduction="none")


def colours() -> Tensor:
    """The eight colours (8, 3) in [-1, 1]."""
    return torch.tensor([*scenes.COLOURS.values()]) / 127.5 - 1


def colour_loss(images: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance (B,) of the mean colour to the wanted one."""
    return (images.mean((2, 3)) - colours()[wanted]).square().sum(1)


def objects_of(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Which objects (n, 48) the judge sees, and features."""
    seen = evaluate.see(evaluate.load_judge(), images / 2 + 0.5)
    return evaluate.shown(seen.classes), seen.features


@torch.no_grad()
def judged_objects(images: Tensor, wanted: Tensor) -> Verdict:
    """Whether the judge sees the wanted object."""
    shown, features = objects_of(images)
    own = shown[np.arange(len(shown)), wanted.numpy()]
    return Verdict(own, object_loss(images, wanted).numpy(), features)


@torch.no_grad()
def judged_colours(images: Tensor, wanted: Tensor) -> Verdict:
    """Whether the judge sees an object of the wanted colour."""
    shown, features = objects_of(images)
    own = shown.reshape(len(shown), len(scenes.COLOURS), -1)[np.arange(len(shown)), wanted.numpy()]
    return Verdict(own.any(1), colour_loss(images, wanted).numpy(), features)


def real_scenes() -> np.ndarray:
    """Features of real scenes."""
    plans = [scenes.scene(100_000 + i, "test") for i in range(REFERENCE)]
    return objects_of(scenes.batch(plans, 64)[0])[1]


TASKS = {
    "digits, class": Task("digits-ddpm", 10, digit_loss, judged_digits, real_digits),
    "scenes, class": Task("scenes-ddpm", 48, object_loss, judged_objects, real_scenes),
    "scenes, colour": Task("scenes-ddpm", 8, colour_loss, judged_colours, real_scenes),
}

Options = dict[str, dict]  # by the task


def scales(*values: float, **others: float) -> Options:
    """A scale for each task, and options of all."""
    return {task: {"scale": own} | others for task, own in zip(TASKS, values, strict=True)}


# By name: the class, and its options for each task.
METHODS: dict[str, tuple[type[Guidance], Options]] = {
    "energy": (Energy, scales(2.0, 1.0, 100.0)),
    "dps": (Dps, scales(0.3, 1.0, 150.0)),
    "lgd": (Lgd, scales(5.0, 5.0, 500.0, samples=2)),
    "freedom": (FreeDom, scales(0.3, 1.0, 30.0)),
    "mpgd": (Mpgd, scales(0.1, 0.3, 100.0)),
    "ugd": (Universal, scales(1.0, 1.0, 100.0, backward=5, rate=0.02)),
    "tfg": (TrainingFree, scales(1.0, 1.0, 100.0, rho=0.3, mu=0.1)),
}


def row_keys() -> list[dict[str, str]]:
    """What names each row: the unguided run and every method."""
    methods = ("unguided", *METHODS)
    return [
        {"model": task.model, "task": name, "method": method}
        for name, task in TASKS.items()
        for method in methods
    ]


def row(key: dict[str, str], n: int, steps: int, batch: int, seed: int) -> dict:
    """One row."""
    task, make = TASKS[key["task"]], None
    if key["method"] != "unguided":
        cls, options = METHODS[key["method"]]
        make = partial(cls, **options.get(key["task"], {}))
    wanted = torch.arange(n) % task.wanted
    pipe, real = load(task.model), task.real()
    started = time.process_time()
    with PeakMemory() as peak:
        images = drawn(pipe, task, make, wanted, steps, batch, seed)
    costs = cost(started, n, peak, batch)
    return key | numbers(task.judged(images, wanted), wanted.numpy(), real) | costs


def drawn(
    pipe, task: Task, make: Callable | None, wanted: Tensor, steps: int, batch: int, seed: int
) -> Tensor:
    """Images in [-1, 1], each guided to its own number."""
    latents = []
    for first in range(0, len(wanted), batch):
        part = wanted[first : first + batch]
        guidances = [] if make is None else [make(loss=partial(task.loss, wanted=part))]
        seeds = range(seed + first, seed + first + len(part))
        conditions = [Condition()] * len(part)
        run = Sampling(pipe, conditions, guidances, seeds=seeds, steps=steps)
        latents.append(run.finish().latents)
    return torch.cat(latents).clamp(-1, 1)


def numbers(verdict: Verdict, wanted: np.ndarray, real: np.ndarray) -> dict:
    """The columns of a row, with intervals over images, of diversity over classes."""
    found: dict = {}
    for name, values in (("found", verdict.found.astype(float)), ("off", verdict.off)):
        bounds = interval(lambda i, v=values: float(v[i].mean()), len(values))
        found |= {name: float(values.mean()), f"{name} 95%": bounds}
    found["Frechet"] = frechet(verdict.features, real)
    groups = [verdict.features[wanted == k] for k in range(wanted.max() + 1)]
    apart = np.array([spread(group) for group in groups if len(group) > 1])
    if len(apart):
        bounds = interval(lambda i: float(apart[i].mean()), len(apart))
        found |= {"diversity": float(apart.mean()), "diversity 95%": bounds}
    return found
