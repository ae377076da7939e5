"""CLIP guidance in small: Tables 1 to 3 of SDG, and what its encoder is worth.

    python benchmarks/clip_guidance.py                    all parts, 200 images a row
    python benchmarks/clip_guidance.py --part text        one part
    python benchmarks/clip_guidance.py --quick            minutes on two cores

Liu et al., WACV 2023 (arXiv:2112.05744). The judge (`scenes-judge`) and the CLIP that retrieves
never guided. "spread" is the mean distance of judge features between samples of one condition,
where the paper has LPIPS; it is not LPIPS. Retrieval: is the image among the first k of itself
and 99 real scenes, by the cosine with its text or reference? Weights are in the seed's units
("120"), or lengths of the change over that of the noise ("0.2 noise").
"""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import guidekit
from clip_encoders import encoder_rows, latent_rows
from clip_measures import (
    SAMPLES,
    asked_found,
    columns,
    frechet,
    free_colour,
    interval,
    over_conditions,
    ranks,
    silhouettes,
    spread,
    statistics,
    table,
)
from clip_verdicts import words
from guidekit import Condition, Guidance
from guidekit.backbones.loading import make_scheduler
from guidekit.evaluate import judge as evaluate
from guidekit.noisy_clip.files import load_clip
from guidekit.noisy_clip.model import CleanClip
from guidekit.registry import Registry
from guidekit.worlds import scenes
from measured import Results

PARTS = ("encoder", "latents", "text", "image", "structure", "style", "both", "cost")
REFERENCE = 2000  # real scenes for the Frechet distance
TOPS = (1, 5, 10, 20)
SIZE = 32  # side of images
OTHER = "runs/scenes-clip-2/clip/model"  # what guidekit train scenes-clip-2 leaves


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    model: str
    encoder: str
    clean: str
    retrieval: str
    latents: str
    n: int
    steps: int
    batch: int
    seed: int


@dataclass(frozen=True)
class Wanted:
    """Conditions of n images: a kind of object, its text, and a reference scene of each."""

    kinds: list[str]
    texts: list[str]
    plans: list[scenes.Scene]
    references: Tensor  # (n, 3, 32, 32) in [-1, 1]

    def part(self, i: int, j: int) -> "Wanted":
        """Images i to j."""
        return Wanted(self.kinds[i:j], self.texts[i:j], self.plans[i:j], self.references[i:j])

    def like(self, references: Tensor) -> "Wanted":
        """The same with other references."""
        return replace(self, references=references)


def wanted(n: int) -> Wanted:
    """Held-out scenes of one object; each is the condition of SAMPLES images in a row."""
    plans = [scenes.scene(i // SAMPLES, "test", objects=(1,)) for i in range(n)]
    kinds = [plan.things[0].phrase for plan in plans]
    return Wanted(kinds, [plan.caption for plan in plans], plans, scenes.batch(plans, SIZE)[0])


class Bench:
    """One backbone, one set of conditions, rows of measures."""

    def __init__(self, setting: Setting):
        self.setting, self.wanted = setting, wanted(setting.n)
        self.pipeline = guidekit.load(setting.model)
        self.judge = evaluate.load_judge()
        self.retrieval = CleanClip(load_clip(setting.retrieval))
        plans = [scenes.scene(100_000 + i, "test") for i in range(REFERENCE)]
        self.real = (scenes.batch(plans, SIZE)[0] + 1) / 2
        self.real_features = evaluate.see(self.judge, self.real).features
        self.real_embeddings = self.embeddings(self.real)

    def embeddings(self, images: Tensor) -> Tensor:
        """What the retrieving CLIP sees in images (n, 3, H, W) in [0, 1], of length 1."""
        with torch.no_grad():
            parts = [self.retrieval.sees(p * 2 - 1).embedding for p in images.split(64)]
        return F.normalize(torch.cat(parts), dim=-1)

    def clip(self, given: Wanted, text: bool, image: bool, **fields) -> Guidance:
        """The plugin `clip` with the texts and references of a batch."""
        fields = {"encoder": self.setting.encoder} | fields
        if fields.get("on") == "x0":
            fields["encoder"] = self.setting.clean
        guidance = Registry().make_guidance("clip", fields)
        return guidance.towards(
            [[t] if text else [] for t in given.texts], given.references[:, None] if image else None
        )

    def ilvr(self, given: Wanted, down: int) -> Guidance:
        """The plugin `ilvr` with the references of a batch."""
        return Registry().make_guidance("ilvr", {"down": down}).towards(given.references)

    def draw(self, make: Callable[[Wanted], list[Guidance]]) -> tuple[Tensor, float]:
        """Images of all conditions and seconds of CPU (or GPU) per image."""
        images, s = [], self.setting
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        start = clock()
        for i in tqdm(range(0, s.n, s.batch), leave=False):
            given = self.wanted.part(i, min(i + s.batch, s.n))
            run = guidekit.sample(
                self.pipeline,
                Condition(),
                make(given),
                steps=s.steps,
                seeds=range(s.seed + i, s.seed + i + len(given.texts)),
                scheduler=make_scheduler(self.pipeline, "ddpm"),
                cfg=1.0,
            )
            images.append(run.finish().images)
        return torch.cat(images), (clock() - start) / s.n


def guided_row(bench: Bench, method: str, make: Callable, image: bool) -> dict:
    """A row of Tables 1 to 3: distances, spread, retrieval, what the judge finds."""
    images, seconds = bench.draw(make)
    verdict = evaluate.see(bench.judge, images)
    seen = bench.embeddings(images)
    if image:
        queries = bench.embeddings((bench.wanted.references + 1) / 2)
    else:
        queries = bench.retrieval.texts(bench.wanted.texts)
    places = ranks(seen, queries, bench.real_embeddings, bench.setting.seed)
    row = {"method": method, "n": len(images)}
    row |= frechet(verdict.features, bench.real_features)
    row |= columns(spread=spread(verdict.features))
    row |= over_conditions(**{f"top-{k}": places < k for k in TOPS})
    row |= over_conditions(**asked_found(verdict.classes, bench.wanted.kinds))
    return row | {"s/image": seconds}


def clip_methods(bench: Bench, kind: str, scales: tuple[float, ...], seed_scale: int) -> dict:
    """Makers of guidance by name.

    None, on z at every scale, in the seed's units and without views, and by plain CLIP on x0; the
    last two at the middle scale, the larger of two.
    """
    noise, middle = {"units": "noise"}, sorted(scales)[len(scales) // 2]
    fields = {f"{kind} {scale} noise": noise | {"scale": scale} for scale in scales}
    fields |= {f"{kind} {seed_scale}": {}}
    fields |= {f"{kind} {middle} noise, no views": noise | {"scale": middle, "views": 0}}
    plain = noise | {"scale": middle, "on": "x0"}
    fields |= {f"{kind}, plain CLIP on x0, {middle} noise": plain}
    text, image = kind == "text", kind == "content"
    guided = {
        name: lambda given, own=own: [bench.clip(given, text, image, **own)]
        for name, own in fields.items()
    }
    return {"unguided": lambda given: []} | guided


def text_rows(bench: Bench) -> list[dict]:
    """Table 1 in small: text guidance at three scales, the seed's units, plain CLIP on x0."""
    methods = clip_methods(bench, "text", (0.1, 0.2, 0.4), 120)
    return [guided_row(bench, name, make, image=False) for name, make in methods.items()]


def image_rows(bench: Bench) -> list[dict]:
    """Tables 2 and 3 in small: image guidance at two scales, ILVR, plain CLIP on x0."""
    methods = clip_methods(bench, "content", (0.2, 0.4), 100)
    for down in (4, 8):
        methods[f"ILVR N={down}"] = lambda given, down=down: [bench.ilvr(given, down)]
    return [guided_row(bench, name, make, image=True) for name, make in methods.items()]


def structure_rows(bench: Bench) -> list[dict]:
    """Does the object stand where the reference's stands? mIoU with the reference's mask."""
    given = bench.wanted
    labels = np.stack([scenes.labels(plan, SIZE) for plan in given.plans])
    asked = evaluate.asked_pixels(labels)
    noise = {"units": "noise", "scale": 0.3}
    methods = {
        "unguided": lambda g: [],
        "content": lambda g: [bench.clip(g, False, True, **noise)],
        "structure": lambda g: [bench.clip(g, False, True, content=0.0, structure=1.0, **noise)],
    }
    rows = []
    for name, make in methods.items():
        images, _ = bench.draw(make)
        found = evaluate.see(bench.judge, images).classes
        inter, union = evaluate.overlaps(found, labels)

        def statistic(i, inter=inter, union=union):
            return evaluate.mean_iou(inter[i], union[i], asked[i])

        row = {"method": name, "n": len(images), "mIoU": statistic(np.arange(len(images)))}
        row["mIoU 95%"] = interval(statistic, len(images))
        rows.append(row | over_conditions(silhouette=silhouettes(found, labels)))
    return rows


def style_rows(bench: Bench) -> list[dict]:
    """Do colours become the reference's, and do objects stay where they are without guidance?

    In the last rows structure guidance towards the image drawn without guidance holds them there,
    and style reads the first maps, which have colours and hardly shapes. "moved" is how much nearer
    to the reference the colours came, image by image.
    """
    given = bench.wanted
    colours = statistics((given.references + 1) / 2)
    plain, _ = bench.draw(lambda given: [])
    layout = evaluate.see(bench.judge, plain).classes
    bench.wanted = given.like(torch.stack([given.references, plain * 2 - 1], 1))

    def guided(part: Wanted, which: int, scale: float, **own) -> Guidance:
        reference = part.like(part.references[:, which])
        return bench.clip(reference, False, True, content=0.0, units="noise", scale=scale, **own)

    def style(part: Wanted, scale: float = 0.2, **own) -> Guidance:
        return guided(part, 0, scale, style=1.0, **own)

    def held(part: Wanted) -> Guidance:
        return guided(part, 1, 0.8, structure=1.0)

    images = {"unguided": plain}
    for name, make in {
        "style": lambda g: [style(g)],
        "style, after 0.4 of the steps": lambda g: [style(g, start=0.4)],
        "structure of the unguided image": lambda g: [held(g)],
        "the same, and style 0.3": lambda g: [held(g), style(g, 0.3, stages=(0,))],
        "the same, and style 0.6": lambda g: [held(g), style(g, 0.6, stages=(0,))],
    }.items():
        images[name] = bench.draw(make)[0]
    bench.wanted = given
    before, rows = (statistics(plain) - colours).norm(dim=1).numpy(), []
    for name, drawn in images.items():
        found = evaluate.see(bench.judge, drawn).classes
        away = (statistics(drawn) - colours).norm(dim=1).numpy()
        row = {"method": name, "n": len(drawn)}
        row |= over_conditions(colour_distance=away, moved=before - away)
        rows.append(row | over_conditions(same_layout=silhouettes(found, layout)))
    return rows


def both_rows(bench: Bench) -> list[dict]:
    """The text names the object, the reference the background: which images have both?"""
    given = bench.wanted
    grounds = list(scenes.BACKGROUNDS)
    # Another image's scene: its background is the image's condition, its object is not asked for.
    rolled = given.references.roll(SAMPLES, 0)
    backgrounds = [p.background for p in given.plans[-SAMPLES:] + given.plans[:-SAMPLES]]
    bench.wanted = Wanted(given.kinds, [f"a {k}" for k in given.kinds], given.plans, rolled)
    palette = torch.tensor(list(scenes.BACKGROUNDS.values())) / 255
    rows = []
    own = {"units": "noise", "scale": 0.3}
    for name, make in {
        "unguided": lambda g: [],
        "text": lambda g: [bench.clip(g, True, False, **own)],
        "image": lambda g: [bench.clip(g, False, True, **own)],
        # The reference holds another object, which content pulls to as well: it weighs less.
        "text and image": lambda g: [bench.clip(g, True, True, content=40.0, **own)],
        "image until 0.4 of the steps, and text": lambda g: [
            bench.clip(g, False, True, stop=0.4, **own),
            bench.clip(g, True, False, **own),
        ],
    }.items():
        images, _ = bench.draw(make)
        found = evaluate.see(bench.judge, images).classes
        colours = [free_colour(image, f) for image, f in zip(images, found, strict=True)]
        nearest = (torch.stack(colours)[:, None] - palette).norm(dim=2).argmin(1).tolist()
        ground = np.array([grounds[i] == b for i, b in zip(nearest, backgrounds, strict=True)])
        object_ = asked_found(found, given.kinds)["colour_and_shape"]
        row = {"method": name, "n": len(images)}
        met = {"object": object_, "background": ground, "both": object_ & ground}
        rows.append(row | over_conditions(**met))
    bench.wanted = given
    return rows


def cost_rows(bench: Bench) -> list[dict]:
    """Milliseconds of a step of each kind, in turns, least of several."""
    given = bench.wanted.part(0, SAMPLES)
    kinds = {
        "unguided": [],
        "text on z": [bench.clip(given, True, False)],
        "text and reference on z": [bench.clip(given, True, True)],
        "text on x0": [bench.clip(given, True, False, on="x0")],
        "ILVR": [bench.ilvr(given, 4)],
    }
    runs = {}
    for name, guidances in kinds.items():
        runs[name] = guidekit.sample(
            bench.pipeline,
            Condition(),
            guidances,
            steps=50,
            seeds=range(SAMPLES),
            cfg=1.0,
            scheduler=make_scheduler(bench.pipeline, "ddpm"),
        )
    least = dict.fromkeys(runs, float("inf"))
    iterators = {name: iter(run) for name, run in runs.items()}
    for _ in range(10):
        for name, steps in iterators.items():
            start = time.perf_counter()
            next(steps)
            least[name] = min(least[name], (time.perf_counter() - start) * 1000)
    for steps in iterators.values():
        steps.close()
    return [
        {"method": name, "n": SAMPLES, "ms a step": ms, "over unguided": ms / least["unguided"]}
        for name, ms in least.items()
    ]


ROWS = {
    "encoder": lambda bench: encoder_rows(bench.setting),
    "latents": lambda bench: latent_rows(bench.setting),
    "text": text_rows,
    "image": image_rows,
    "structure": structure_rows,
    "style": style_rows,
    "both": both_rows,
    "cost": cost_rows,
}


@click.command()
@click.option("--model", default="scenes-ddpm", show_default=True, help="An unconditional model.")
@click.option("--encoder", default="scenes-clip-noisy", show_default=True, help="Guides on z.")
@click.option("--clean", default="scenes-clip", show_default=True, help="Guides on x0.")
@click.option("--retrieval", default=OTHER, show_default=True, help="Never guides.")
@click.option("--latents", default="", help="An encoder of scenes' latents, for that part.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Repeat for more.")
@click.option("--n", default=0, help="Images a row [200].")
@click.option("--steps", default=0, help="Sampling steps [100].")
@click.option("--batch", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Seed of the first image.")
@click.option("--quick", is_flag=True, help="20 images, 25 steps.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the rows.")
def main(model, encoder, clean, retrieval, latents, parts, n, steps, batch, seed, quick, json_file):
    """Prints what CLIP guidance does on the scenes world, part by part."""
    n, steps = n or (20 if quick else 200), steps or (25 if quick else 100)
    if n % SAMPLES:
        raise click.UsageError(f"--n must be a multiple of {SAMPLES}, the samples of a condition")
    if not Path(retrieval).is_dir():
        raise click.UsageError(f"no {retrieval}; guidekit train scenes-clip-2, or give --retrieval")
    bench = Bench(Setting(model, encoder, clean, retrieval, latents, n, steps, batch, seed))
    over = {"intervals": "95% bootstrap intervals over conditions", "seeds": [seed, seed + n - 1]}
    results = Results(json_file, n=n, steps=steps, batch=batch, model=model, **over)
    for part in parts or [p for p in PARTS if latents or p != "latents"]:
        rows = ROWS[part](bench)
        results.extend({"part": part} | row for row in rows)
        print(f"\n{part}\n\n{table(rows)}\n")
        results.say(*words(part, rows))
    print(
        f"\nn = {n}, seeds {seed} to {seed + n - 1}, {steps} DDPM steps, batch {batch}, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} {platform.machine()} cores, torch "
        f"{torch.__version__}; 95% bootstrap intervals over conditions"
    )
    results.finish()


if __name__ == "__main__":
    main()
