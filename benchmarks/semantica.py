"""Semantica's claims in small, on scenes: prints one table, and whether each claim holds.

    python benchmarks/semantica.py               ablation models of 3e13 FLOP, then all rows
    python benchmarks/semantica.py --quick       minutes on two cores; shows that it runs
    python benchmarks/semantica.py --part cost   a training step of the full-size models

A page is a background and a set of (shape, colour); position, size and angle vary. Every model is
trained on the same pages with the same seeds and floating-point operations, and draws from the same
held-out pages. The judge reads the images; it never guides. Trained models are kept in --out.
"""

import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from guidekit import load
from guidekit.evaluate import judge as evaluate
from guidekit.semantica.schedule import SemanticaScheduler
from guidekit.semantica.train import SemanticaOptions, SemanticaTask, make
from guidekit.train.judge import Judge
from guidekit.train.loop import Loop, Options
from guidekit.train.precision import emulates_bf16
from guidekit.worlds import scenes
from measured import Results, rows_of
from semantica_cost import cost_rows
from semantica_draw import draw_rows
from semantica_measures import HELD_OUT, SIZE, PagesSeen, held_out, measure
from semantica_reader import reader_rows

BATCH, W = 16, 0.5
MEMORY = 24e9  # bytes within which a training step of the full-size models is to stay
POLLUTED = 0.3
BASE = SemanticaOptions(
    variant="tiny-pixel", pages=6000, quantiles=(0.02, 0.98), without=HELD_OUT, gamma=1.0
)

# Ablation models by the fields that differ from BASE.
MODELS = {
    "tokens": {},
    "film": {"conditioning": "film"},
    "patches": {"variant": "tiny"},
    "polluted": {"polluted": POLLUTED, "quantiles": (), "low": -2.0, "high": 2.0},
    "polluted, filtered": {"polluted": POLLUTED, "quantiles": (0.5, 0.98)},
    "labelled": {"source": "labelled-scenes", "quantiles": (), "low": -2.0, "high": 2.0},
}
FACTORS = (0.0, 0.1, 0.2, 0.5, 1.0)
PARTS = ("variance", "draw", "reader", "ablations", "guidance", "oneshot", "unseen", "cost")
# Claims: the row that should be the better one, the other, the column, and what it says.
CLAIMS = (
    ("tokens", "film", "frechet", "cross-attention to tokens beats FiLM"),
    ("polluted, filtered", "polluted", "overlap", "the filter helps on polluted pages"),
    ("tokens", "patches", "frechet", "no patching beats 2x2 patches"),
    ("w = 0.5", "w = 0", "frechet", "guidance of 0.5 beats none"),
    ("w = 0", "w = 1", "far", "strong guidance comes nearer to the conditioning image"),
    ("one-shot", "copy", "frechet", "one-shot samples beat copies of the one image"),
    ("episodes, unseen", "labelled, unseen", "overlap", "episodes carry further than labels"),
)
LOWER = ("frechet",)


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    out: Path
    flop: float
    n: int
    steps: int
    seed: int
    encoder: str
    quick: bool


def step_flop(task: SemanticaTask) -> float:
    """Floating-point operations of one training step: forward and twice that for backward."""
    batch = task.batch(range(2), torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        task.net(**batch)
    return 3 * counter.get_total_flops() / 2 * BATCH


def precision() -> str:
    """Of all ablation models of a table: bf16 where this machine computes in it."""
    slow = not torch.cuda.is_available() and emulates_bf16(torch.device("cpu"))
    return "no" if slow else "bf16"


def trained(name: str, setting: Setting):
    """The pipeline of an ablation model, trained now or before."""
    folder = setting.out / name.replace(", ", "-")
    if not (folder / "model").exists():
        torch.manual_seed(setting.seed)
        options = replace(BASE, **MODELS[name], encoder=setting.encoder)
        store = setting.out / "pages" / f"{options.source}-{options.polluted:g}"
        options = replace(options, store=str(store))
        if setting.quick:
            options = replace(options, pages=200)
        task = make(options, folder, SIZE)
        loop = Options(
            steps=max(int(setting.flop / step_flop(task)), 2),
            batch=BATCH,
            lr=2e-3,
            warmup=50,
            decay="cosine",
            weight_decay=0.0,
            eps=1e-12,
            ema=0.999,
            seed=setting.seed,
            precision=precision(),
            save_every=200,
            preview_every=10**6,
        )
        loop = Loop(task, loop, folder / "run")
        loop.run()
        loop.export(folder / "model")
    return load(str(folder / "model"))


def draw(pipeline, conditions: Tensor, setting: Setting, w: float = W) -> Tensor:
    """An image for each condition (n, 3, 32, 32) in [0, 1]; seeds run on from the setting's."""
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for i in range(0, len(conditions), 50):
        part = conditions[i : i + 50]
        seeds = range(10**6 * setting.seed + i, 10**6 * setting.seed + i + len(part))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        parts.append(pipeline(part, w, setting.steps, generators, "pt").images.cpu())
    return torch.cat(parts)


def variance_rows(setting: Setting) -> list[dict]:
    """Std of samples of N(0, 0.5^2) by the exact model, in closed form: the data's is 0.5."""
    rows = []
    for reading in ("lineage", "literal"):
        for steps in (16, 64, 256):
            scheduler = SemanticaScheduler(image_size=SIZE, clip_sample=False, reading=reading)
            row = {"method": f"variance, {reading}", "steps": steps}
            rows.append(row | {"std": gaussian_std(scheduler, steps, 0.5)})
    return rows


def gaussian_std(scheduler: SemanticaScheduler, steps: int, std: float) -> float:
    """Std after all steps, each of which is affine with Gaussian noise."""
    scheduler.set_timesteps(steps)
    bars = [*scheduler.alphas_cumprod[scheduler.timesteps].double().tolist(), 1.0]
    variance = 1.0
    for t, now, then in zip(scheduler.timesteps, bars, bars[1:], strict=False):
        slope = now**0.5 * std**2 / (now * std**2 + 1 - now)  # of E[x0 | z]
        gain = then**0.5 * (1 - now / then) / (1 - now) * slope
        gain += (now / then) ** 0.5 * (1 - then) / (1 - now)
        variance = gain**2 * variance + float(scheduler._get_variance(int(t)))
    return variance**0.5


def ablation_rows(setting: Setting, judge: Judge, names: tuple[str, ...]) -> list[dict]:
    """Ablation models on pages whose objects were seen in training, and the real images."""
    pages = held_out(setting.n, setting.seed, unseen=False)
    rows = [measure("real", pages.others, pages, judge)]
    for name in tqdm(names, desc="ablations"):
        images = draw(trained(name, setting), pages.conditions, setting)
        rows.append(measure(name, images, pages, judge))
    return rows


def guidance_rows(
    setting: Setting, judge: Judge, model: str | None, factors: tuple[float, ...]
) -> list[dict]:
    """The given model, or the ablation model `tokens`, at several guidance factors."""
    pipeline = load(model) if model else trained("tokens", setting)
    pages = held_out(setting.n, setting.seed, unseen=False)
    return [
        measure(f"w = {w:g}", draw(pipeline, pages.conditions, setting, w), pages, judge)
        for w in factors
    ]


def oneshot_rows(setting: Setting, judge: Judge, model: str | None) -> list[dict]:
    """Data sets from one image a class, 10 each, against as many copies of it."""
    pipeline = load(model) if model else trained("tokens", setting)
    each = 10
    classes = held_out(max(setting.n // each, 2), setting.seed, unseen=False)
    plans = [p for plan in classes.plans for p in scenes.episode(plan.number, each + 1, "test")[1:]]
    real = (scenes.batch(plans, SIZE)[0] + 1) / 2
    copies = classes.conditions.repeat_interleave(each, 0)
    pages = PagesSeen(plans, copies, real)
    images = draw(pipeline, copies, setting)
    return [measure("one-shot", images, pages, judge), measure("copy", copies, pages, judge)]


def unseen_rows(setting: Setting, judge: Judge) -> list[dict]:
    """Pages of objects that no training page held: episodes against label-grouped data."""
    pages = held_out(setting.n, setting.seed, unseen=True)
    return [
        measure(
            f"{title}, unseen",
            draw(trained(name, setting), pages.conditions, setting),
            pages,
            judge,
        )
        for title, name in (("episodes", "tokens"), ("labelled", "labelled"))
    ]


def verdicts(rows: list[dict]) -> list[str]:
    """Each claim whose rows are there: confirmed, refuted, or within the intervals."""
    by_name, lines = {row["method"]: row for row in rows}, []
    for better, worse, column, text in CLAIMS:
        if better in by_name and worse in by_name:
            a, b = by_name[better], by_name[worse]
            sign = -1 if column in LOWER else 1
            holds = sign * (a[column] - b[column]) > 0
            low, high = (a, b) if a[column] < b[column] else (b, a)
            apart = low[f"{column}_interval"][1] < high[f"{column}_interval"][0]
            word = ("confirmed" if holds else "refuted") if apart else "not decided"
            lines.append(f"{word}: {text} ({column} {a[column]:.3f} against {b[column]:.3f})")
    for row in rows:
        if row["method"].startswith("step of"):
            word = "reached" if row["gibibytes"] * 2**30 < MEMORY else "not reached"
            lines.append(f"{word}: {row['method']} within {MEMORY / 1e9:g} GB")
    if (row := by_name.get("w = 0.5")) is not None:
        for text, holds in (
            ("attributes kept >= 0.85", row["kept"] >= 0.85),
            ("copies < 2%", row["copies"] < 0.02),
        ):
            lines.append(f"{'reached' if holds else 'not reached'}: {text} at w = 0.5")
    return lines


def table(rows: list[dict]) -> str:
    """Rows with the same columns together, as Markdown."""
    parts: dict[tuple, list[dict]] = {}
    for row in rows:
        parts.setdefault(tuple(k for k in row if not k.endswith("_interval")), []).append(row)
    lines = []
    for columns, members in parts.items():
        lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(_cell(row, c) for c in columns) + " |" for row in members]
    return "\n".join(lines)


def _cell(row: dict, column: str) -> str:
    value = row[column]
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    if f"{column}_interval" in row:
        low, high = row[f"{column}_interval"]
        text += f" ({low:.3f}-{high:.3f})"
    return text


@click.command()
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(PARTS),
    help="Default: all, or none with --rows.",
)
@click.option("--model", help="Of guidance and one-shot; default: the ablation model `tokens`.")
@click.option("--w", "factors", multiple=True, type=float, help="Of guidance; default: five.")
@click.option(
    "--name",
    "names",
    multiple=True,
    type=click.Choice(list(MODELS)),
    help="Of ablations; default: all.",
)
@click.option("--encoder", default="scenes-clip", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/semantica-benchmark"))
@click.option("--flop", default=0.0, help="Of an ablation model's training; 3e13.")
@click.option("--n", default=0, help="Held-out pages; 1000.")
@click.option("--steps", default=0, help="Sampling steps; 64.")
@click.option("--seed", default=0, show_default=True)
@click.option("--quick", is_flag=True, help="1e11 FLOP, 40 pages, 8 steps, no full-size models.")
@click.option("--json", "json_file", type=click.Path(), help="Also write the rows here.")
@click.option(
    "--rows",
    "row_files",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Rows that --json wrote, with the same options otherwise; they are printed first.",
)
def main(
    parts, model, factors, names, encoder, out, flop, n, steps, seed, quick, json_file, row_files
):
    """Prints the rows of all parts, then which claims they confirm."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    setting = Setting(
        out / ("quick" if quick else "full") / str(seed) / encoder.strip("/").replace("/", "-"),
        flop or (1e11 if quick else 3e13),
        n or (40 if quick else 1000),
        steps or (8 if quick else 64),
        seed,
        encoder,
        quick,
    )
    judge = evaluate.load_judge()
    make_rows = {
        "variance": lambda: variance_rows(setting),
        "draw": lambda: draw_rows(setting.n, SIZE),
        "reader": lambda: reader_rows(setting.n, SIZE, 20 if quick else 600),
        "ablations": lambda: ablation_rows(setting, judge, names or tuple(MODELS)),
        "guidance": lambda: guidance_rows(setting, judge, model, factors or FACTORS),
        "oneshot": lambda: oneshot_rows(setting, judge, model),
        "unseen": lambda: unseen_rows(setting, judge),
        "cost": lambda: cost_rows(quick),
    }
    rows = [row for file in row_files for row in rows_of(file)]
    rows += [row for part in parts or (() if row_files else PARTS) for row in make_rows[part]()]
    rows = list({row["method"]: row for row in rows}.values())  # each process has a row "real"
    print(table(rows))
    print(
        f"\nn = {setting.n} held-out pages, {setting.flop:g} FLOP a model (precision "
        f"{precision()}), {setting.steps} steps, "
        f"w = {W:g} unless named, seed {seed}, torch {torch.__version__} on "
        f"{os.cpu_count()} {platform.machine()} cores; 95% bootstrap intervals over pages"
    )
    over = {"intervals": "95% bootstrap intervals over pages", "precision": precision()}
    about = {"n": setting.n, "steps": setting.steps, "w": W, "flop": setting.flop, "seed": seed}
    results = Results(json_file, **about, **over)
    results.extend(rows)
    results.say(*verdicts(rows))
    results.finish()


if __name__ == "__main__":
    main()
