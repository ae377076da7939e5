"""Lines of the tables of benchmarks/cat.py: measures of the rows' cells, with intervals."""

from collections.abc import Callable
from functools import partial

import numpy as np

from cat_models import REAL_PRINTS, SLOWER, Group, Lab
from cat_rows import FALLBACK, VOTES
from guidekit.evaluate.frechet import frechet
from guidekit.evaluate.intervals import over_trainings
from guidekit.evaluate.overlap import mean_iou


def measures(lab: Lab) -> dict[str, Callable[[dict], float]]:
    """What is measured of a cell."""
    return {
        "Frechet": partial(_far, lab),
        "mIoU": lambda c: mean_iou(c["inter"], c["union"], c["asked"]),
        "mIoU labelled": lambda c: mean_iou(
            c["labelled inter"], c["labelled union"], c["labelled asked"]
        ),
    }


LESS = "the vote less scratch"
NEAR = {
    "to a shot": lambda c: float(c["near"].mean()),
    "copies": lambda c: float(c["copied"].mean()),
}


def _with_copies(group: Group, real: Group) -> list[dict]:
    """A row's cells, with which images are nearer to a shot than 95% of the real prints are.

    real: the cells of real prints, beside the shots of each draw.
    """
    bounds = [np.quantile(own["near"], 0.05) for own in real.cells]
    draws = group.draws or [0] * len(group.cells)
    return [c | {"copied": c["near"] < bounds[d]} for c, d in zip(group.cells, draws, strict=True)]


def sure(name: str, statistic: Callable[[dict], float], cells: list[dict]) -> dict:
    """A measure's mean over cells, with its interval over cells and layouts, which they share."""
    value, bounds = over_trainings(statistic, cells, shared=True)
    return {name: value, f"{name} 95%": bounds}


def lines_of(lab: Lab, groups: list[Group]) -> list[dict]:
    """The lines of the table."""
    real, lines = {g.shots: g for g in groups if g.name == REAL_PRINTS}, []
    for group in groups:
        line = {"method": group.name, "shots": group.shots, "colours right": group.right}
        line["seeds"], cells, measured = len(group.cells), group.cells, measures(lab)
        if group.shots in real:
            cells, measured = _with_copies(group, real[group.shots]), measured | NEAR
        for name, statistic in measured.items():
            line |= sure(name, statistic, cells)
        lines.append(line)
    return lines


#: A row less another, layout by layout: votes less their estimates, the first vote less others.
PAIRS = (
    *((vote, own) for vote, estimates in VOTES.items() for own in estimates),
    ("vote", FALLBACK),
    ("vote", "scratch"),
    ("vote", SLOWER),
    ("vote, longer", "scratch, longer"),
)


def paired(lab: Lab, groups: list[Group]) -> list[dict]:
    """What a row has over another, at the same layouts and noise.

    A pair is of the same seed or draw, so of as many as both rows have.
    """
    there, lines = {(g.name, g.shots): g for g in groups}, []
    for count in dict.fromkeys(g.shots for g in groups if g.name == "vote"):
        for one, other in PAIRS:
            if (one, count) in there and (other, count) in there:
                both = _both(there[one, count], there[other, count])
                line = {"row": one, "less": other, "shots": count, "seeds": len(both)}
                for measure, statistic in measures(lab).items():
                    line |= sure(measure, partial(_less, statistic), both)
                lines.append(line)
    return lines


def further_lines(lab: Lab, found: dict[int, dict[str, Group]]) -> list[dict]:
    """Frechet distances of the rows that were drawn on many layouts, by the number of shots."""
    far, lines = partial(_far, lab), []
    for count, own in found.items():
        both = _both(own["vote"], own["scratch"])
        line = {"shots": count, "seeds": len(both), "images": len(lab.further)}
        for name, group in own.items():
            line |= sure(f"Frechet, {name}", far, group.cells)
        line |= sure(LESS, partial(_less, far), both)
        lines.append(line | {"nearer in": sum(_less(far, pair) < 0 for pair in both)})
    return lines


def _far(lab: Lab, cell: dict) -> float:
    return frechet(cell["features"], lab.real)


def _both(one: Group, other: Group) -> list[dict]:
    """Cells of the same seed or draw, the first row's arrays named "a ..."."""
    pairs = zip(one.cells[: len(other.cells)], other.cells, strict=True)
    return [{f"a {k}": v for k, v in a.items()} | b for a, b in pairs]


def _less(statistic: Callable[[dict], float], both: dict) -> float:
    """A measure of the arrays named "a ..." less that of the others."""
    first = {k.removeprefix("a "): v for k, v in both.items() if k.startswith("a ")}
    return statistic(first) - statistic(both)
