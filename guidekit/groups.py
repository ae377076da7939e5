"""Groups of images: particles of one prompt, or images that share something; rows by group.

Images of different groups never meet, and a batch never cuts a group.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from guidekit.conditions import Condition
from guidekit.errors import GuidekitError


def with_particles(conditions: Sequence[Condition], particles: int) -> list[Condition]:
    """The conditions of images in groups of `particles`, one image after the other.

    Raises GuidekitError for a number that does not divide that of the images, and for conditions
    with groups of their own.
    """
    if particles < 1:
        raise GuidekitError(f"particles must be at least 1, not {particles}")
    if particles == 1:
        return list(conditions)
    if len(conditions) % particles:
        raise GuidekitError(
            f"{len(conditions)} images are no groups of {particles} particles; give seeds for a "
            f"multiple of {particles}, such as 0-{particles - 1}"
        )
    if any(condition.group is not None for condition in conditions):
        raise GuidekitError("the conditions have groups already; leave particles out")
    return [replace(c, group=f"particles {i // particles}") for i, c in enumerate(conditions)]


def rows_by_group(conditions: Sequence[Condition]) -> list[list[int]]:
    """Numbers of the images of every group; an image without one is a group by itself."""
    groups: dict[Any, list[int]] = {}
    for row, condition in enumerate(conditions):
        key = ("alone", row) if condition.group is None else ("group", condition.group)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def batches(conditions: Sequence[Condition], size: int) -> list[list[int]]:
    """Numbers of the images that are drawn together: whole groups, `size` images where they fit."""
    found: list[list[int]] = []
    for rows in rows_by_group(conditions):
        if found and len(found[-1]) + len(rows) <= size:
            found[-1] += rows
        else:
            found.append(list(rows))
    return found


def checked_rows(rows: Tensor, groups: Sequence[Sequence[int]], who: str) -> Tensor:
    """The rows (B,) that images continue from; GuidekitError for one of another group."""
    group_of = {row: n for n, members in enumerate(groups) for row in members}
    given = rows.tolist()
    if len(given) != len(group_of) or not all(isinstance(row, int) for row in given):
        raise GuidekitError(f"{who} resamples to {given}; give a row's number for each image")
    for row, source in enumerate(given):
        if group_of.get(source) != group_of[row]:
            raise GuidekitError(
                f"{who} continues image {row} from image {source}, which is not of its group; "
                f"the groups are {[list(members) for members in groups]}"
            )
    return rows


def permute_history(scheduler: Any, rows: Tensor, count: int) -> None:
    """Takes the rows of all that a scheduler keeps of earlier calls: samples and outputs.

    Its tables have one dimension; what it keeps has that of z (B, C, h, w), or of packed latents.
    """
    for name, value in vars(scheduler).items():
        setattr(scheduler, name, _permuted(value, rows, count))


def _permuted(value: Any, rows: Tensor, count: int) -> Any:
    if isinstance(value, Tensor) and value.ndim > 2 and len(value) == count:
        return value[rows.to(value.device)]
    if isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value):
        return type(value)(_permuted(v, rows, count) for v in value)
    if hasattr(value, "set_timesteps"):  # SASolver and UniPC may hold another scheduler
        permute_history(value, rows, count)
    return value


def systematic(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers (K,) of which particles go on, drawn by systematic resampling from weights (K,).

    Each is drawn K times its weight, rounded up or down, and on average exactly so (Douc, Cappe,
    Moulines 2005, "Comparison of resampling schemes for particle filtering", section 3.4).
    """
    count = len(weights)
    first = torch.rand((), generator=generator, dtype=torch.float64)
    points = (torch.arange(count, dtype=torch.float64) + first) / count
    sums = (weights.double().cpu() / weights.double().cpu().sum()).cumsum(0)
    return torch.searchsorted(sums, points).clamp(max=count - 1)
