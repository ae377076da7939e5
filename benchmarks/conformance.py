"""Which plugin acts on which family under which scheduler: tiny random models, four steps.

    python benchmarks/conformance.py             every family, scheduler and first-party plugin;
                                                 20 minutes of a core
    python benchmarks/conformance.py --quick     two schedulers a family

A cell is "ok" where the account says that the plugin acted and the finite images differ from the
unguided ones, or the number of a footnote with the reason for which it refused. Anything else is a
failure, and the exit code is 1. The second table sets this beside diffusers' own guiders. With
--json a run that was cut short goes on where it was; cells that failed are tried again.
"""

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import click
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from tqdm import tqdm

from guidekit import Condition, Denoiser, Guidance, Sampling
from guidekit.backbones.loading import make_scheduler
from guidekit.backbones.schedulers import schedulers_for
from guidekit.registry import Registry, entries
from guidekit.testing import miniatures
from measured import Results

SAME = "the images are the unguided ones"
STEPS, CFG, LABEL = 4, 5.0, 207  # PNDM begins with four

# Family: its builder in guidekit.testing.miniatures. Its schedulers are those of `schedulers_for`.
FAMILIES = {
    "UNet2DCond": "sd",
    "SDXL": "sdxl",
    "UNet2D": "ddpm",
    "DiT": "dit",
    "PixArt": "pixart",
    "SD3": "sd3",
    "Flux": "flux",
    "Sana": "sana",
    "Lumina2": "lumina2",
    "QwenImage": "qwen",
}
QUICK = {False: ("ddim", "unipc"), True: ("flow-euler", "unipc")}  # by: is it a flow model

# diffusers' own guiders, measured by running them on 2026-11-21 with diffusers 0.42.1.
THEIRS_DATE = "diffusers 0.42.1, 2026-11-21"
THEIRS = {
    "slg": {
        "UNet2DCond": "ok",
        "UNet2D": "ValueError",
        "DiT": "ok",
        "PixArt": "ok",
        "SD3": "RuntimeError",
        "Flux": "wrong tensor",
    },
    "pag": {
        "UNet2DCond": "ok",
        "UNet2D": "ok",
        "DiT": "ok",
        "PixArt": "ok",
        "SD3": "ValueError",
        "Flux": "AttributeError",
    },
    "seg": dict.fromkeys(("UNet2DCond", "UNet2D", "DiT", "PixArt", "SD3", "Flux"), "no effect"),
    "autoguidance": {
        "UNet2DCond": "ok",
        "UNet2D": "no effect",
        "DiT": "ok",
        "PixArt": "ok",
        "SD3": "ok",
        "Flux": "ok",
    },
}


@dataclass(frozen=True)
class Cell:
    """What one plugin did on one family under one scheduler: "ok", "refused" or "failed"."""

    family: str
    scheduler: str
    plugin: str
    state: str
    reason: str = ""


def guidances() -> dict[str, type[Guidance]]:
    """Every first-party guidance by its name."""
    registry, found = Registry(), {}
    for entry in entries():
        if entry.first_party:
            found |= registry.load(entry.name).guidances
    return found


def build(family: str) -> DiffusionPipeline:
    """The family's tiny pipeline."""
    return getattr(miniatures, f"{FAMILIES[family]}_pipeline")()


def schedulers(pipe: DiffusionPipeline, quick: bool) -> list[str]:
    """Names of the schedulers to try."""
    names = schedulers_for(pipe.scheduler)
    return [n for n in names if n in QUICK["flow-euler" in names]] if quick else names


def family_cells(
    family: str, quick: bool, plugins: dict, seed: int, done: dict[tuple, Cell]
) -> Iterator[list[Cell]]:
    """For every scheduler of one family the cells of all plugins, those of `done` as they are."""
    pipe = build(family)
    for name in schedulers(pipe, quick):
        plain: dict[tuple, Sampling] = {}
        yield [
            done.get((family, name, plugin)) or cell(pipe, family, name, plugin, cls, seed, plain)
            for plugin, cls in plugins.items()
        ]


def condition(pipe: DiffusionPipeline, wanted: Condition) -> tuple[Condition, float]:
    """The condition as far as the model reads it, and the guidance scale that it can have."""
    denoiser = Denoiser(pipe)
    if denoiser.reads_text:
        return wanted, CFG
    return (Condition(label=LABEL), CFG) if denoiser.family.name == "dit" else (Condition(), 1.0)


def sampling(
    pipe, name: str, seed: int, wanted: Condition, *guidances: Guidance, images: int = 1
) -> Sampling:
    """A short run, not yet begun; several images are a group."""
    given, cfg = condition(pipe, wanted)
    return Sampling(
        pipe,
        given,
        guidances,
        seeds=range(seed, seed + images),
        steps=STEPS,
        cfg=cfg,
        scheduler=make_scheduler(pipe, name),
        particles=images,
    )


def draw(*args, images: int = 1) -> Sampling:
    """A finished short run."""
    return sampling(*args, images=images).finish()


def refused(pipe, name: str, seed: int, wanted: Condition) -> str:
    """Why the family cannot have the scheduler, in a sentence that names it; "" if it can."""
    try:
        sampling(pipe, name, seed, wanted)
    except ValueError as error:
        if type(make_scheduler(pipe, name)).__name__ in str(error):
            return str(error)
        raise
    return ""


def cell(pipe, family: str, name: str, plugin: str, cls, seed: int, kept: dict) -> Cell:
    """What one plugin does; `kept` holds the unguided runs of this family and scheduler."""
    found = tried(pipe, family, name, plugin, cls, seed, kept)
    if found.reason == SAME and cls.overrides("begin"):
        # Of several first noises the run's own may be the best.
        return tried(pipe, family, name, plugin, cls, seed + 1, {})
    return found


def tried(pipe, family: str, name: str, plugin: str, cls, seed: int, kept: dict) -> Cell:
    """What one plugin does with one seed."""
    guidance, wanted = cls.example(), cls.example_condition()
    guidance._name = plugin  # as the registry does it
    images = 2 if cls.grouped or cls.overrides("resample") else 1
    texts = wanted.prompt, wanted.negative, images
    bare = replace(wanted, image=None)  # without a plugin that reads it, an image is refused
    try:
        if refusal := refused(pipe, name, seed, bare):
            return Cell(family, name, plugin, "refused", refusal)
        plain = kept.get(texts) or kept.setdefault(
            texts, draw(pipe, name, seed, bare, images=images)
        )
        try:
            drawn = draw(pipe, name, seed, wanted, guidance, images=images)
        except ValueError as error:
            return Cell(family, name, plugin, "refused", str(error))
    except Exception as error:
        return Cell(family, name, plugin, "failed", f"{type(error).__name__}: {error}")
    for true, what in (
        (drawn.account.acted(guidance.name), "the account has no act"),
        (torch.isfinite(drawn.images).all(), "the images are not finite"),
        (not torch.equal(drawn.latents, plain.latents), SAME),
    ):
        if not true:
            return Cell(family, name, plugin, "failed", what)
    return Cell(family, name, plugin, "ok")


def table(family: str, cells: list[Cell]) -> str:
    """Rows plugins, columns schedulers; footnotes with the reasons of refusals below."""
    columns = list(dict.fromkeys(c.scheduler for c in cells))
    notes = list(dict.fromkeys(f"{c.state}: {c.reason}" for c in cells if c.state != "ok"))
    found = {(c.plugin, c.scheduler): c for c in cells}

    def text(plugin: str, column: str) -> str:
        c = found[plugin, column]
        return "ok" if c.state == "ok" else f"[{notes.index(f'{c.state}: {c.reason}') + 1}]"

    plugins = list(dict.fromkeys(c.plugin for c in cells))
    rows = [[p, *(text(p, column) for column in columns)] for p in plugins]
    footnotes = [f"[{i}] {note}" for i, note in enumerate(notes, 1)]
    return "\n".join([f"\n{family}", markdown([family, *columns], rows), *footnotes])


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def beside_diffusers(cells: list[Cell]) -> str:
    """Guiders by family, over all schedulers, and diffusers' own."""
    families = list(dict.fromkeys(c.family for c in cells))
    rows = []
    for plugin in ("pag", "seg", "slg", "autoguidance", "apg"):
        mine = [[c.state for c in cells if (c.family, c.plugin) == (f, plugin)] for f in families]
        ours = [next((s for s in ("failed", "ok") if s in found), "refused") for found in mine]
        theirs = [THEIRS.get(plugin, {}).get(f, "-") for f in families]
        rows += [[f"{plugin}, guidekit", *ours], [f"{plugin}, diffusers", *theirs]]
    head = markdown(["guider", *families], rows)
    return f"\nBeside diffusers' guiders ({THEIRS_DATE}; - is not measured)\n{head}"


@click.command()
@click.option("--quick", is_flag=True, help="Two schedulers a family.")
@click.option("--seed", default=0, show_default=True)
@click.option("--family", "wanted", multiple=True, type=click.Choice(list(FAMILIES)))
@click.option("--plugin", "named", multiple=True, help="Only these plugins.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the cells there.")
def main(quick: bool, seed: int, wanted: tuple, named: tuple, path: str | None) -> None:
    """Print the matrix; exit with 1 if a plugin neither acts nor refuses."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    plugins = {n: c for n, c in guidances().items() if not named or n in named}
    results = Results(path, resume=True, steps=STEPS, cfg=CFG, seed=seed, quick=quick)
    results.rows[:] = [row for row in results.rows if row["state"] != "failed"]
    done = {(row["family"], row["scheduler"], row["plugin"]): Cell(**row) for row in results.rows}
    cells: list[Cell] = []
    for family in tqdm(wanted or FAMILIES, disable=not sys.stderr.isatty()):
        part: list[Cell] = []
        for new in family_cells(family, quick, plugins, seed, done):
            part += new
            results.extend(vars(c) for c in new if (c.family, c.scheduler, c.plugin) not in done)
        click.echo(table(family, part))
        cells += part
    click.echo(beside_diffusers(cells))
    counts = {s: sum(c.state == s for c in cells) for s in ("ok", "refused", "failed")}
    results.say(", ".join(f"{n} {s}" for s, n in counts.items()))
    results.finish()
    sys.exit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    main()
