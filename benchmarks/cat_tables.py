"""Lines of the tables of benchmarks/cat.py: measures of the rows' cells, with intervals."""

from collections.abc import Callable
from functools import partial

import numpy as np

from cat_models import AGAINST, FASTER, REAL_PRINTS, Group, Lab
from guidekit.evaluate.frechet import frechet
from guidekit.evaluate.intervals import over_trainings
from guidekit.evaluate.overlap import mean_iou


def measures(lab: Lab) -> dict[str, Callable[[dict], float]]:
    """What is measured of a cell."""
    return {
        "Frechet": lambda c: frechet(c["features"], lab.real),
        "mIoU": lambda c: mean_iou(c["inter"], c["union"], c["asked"]),
        "mIoU labelled": lambda c: mean_iou(
            c["labelled inter"], c["labelled union"], c["labelled asked"]
        ),
    }


SAME_RATE = "scratch, at one rate"
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
    """A measure's mean over cells, with its interval over cells and layouts."""
    value, bounds = over_trainings(statistic, cells)
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


def paired(lab: Lab, groups: list[Group]) -> list[dict]:
    """What the vote has over other rows of as many shots, at the same layouts and noise."""
    votes = {(g.name, g.shots): g.cells for g in groups if g.name in ("vote", FASTER)}
    lines = []
    for other in groups:
        if other.name in AGAINST:
            lines.append(_line(lab, votes["vote", other.shots], other, other.name))
        if other.name == "scratch" and (FASTER, other.shots) in votes:
            lines.append(_line(lab, votes[FASTER, other.shots], other, SAME_RATE))
    return lines


def _line(lab: Lab, votes: list[dict], other: Group, name: str) -> dict:
    """What the vote's cells have over those of another row, which the table calls `name`."""
    pairs = zip(votes, other.cells, strict=True)
    both = [{f"a {k}": v for k, v in a.items()} | b for a, b in pairs]
    line = {"the vote less": name, "shots": other.shots, "seeds": len(both)}
    for measure, statistic in measures(lab).items():
        line |= sure(measure, partial(_less, statistic), both)
    return line


def _less(statistic: Callable[[dict], float], both: dict) -> float:
    """A measure of the arrays named "a ..." less that of the others."""
    first = {k.removeprefix("a "): v for k, v in both.items() if k.startswith("a ")}
    return statistic(first) - statistic(both)
