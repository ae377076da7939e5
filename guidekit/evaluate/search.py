"""Beam search over numeric options: each round multiplies one of them and keeps the best.

Ye, Lin, Zhang, Zhang, Ma, Ermon, Zou: TFG: Unified Training-Free Guidance for Diffusion Models,
NeurIPS 2024, arXiv:2409.15761, section 4: a beam of two, from small values up, with a cap on each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from guidekit.errors import GuidekitError

FACTOR, BELOW, ABOVE = 2.0, 0.25, 8.0  # of a value that is there already: where to start and end

Values = tuple[float, ...]


@dataclass(frozen=True)
class Knob:
    """An option, where its search starts, what it grows by, and the most that it may be."""

    plugin: str
    option: str
    start: float
    cap: float
    factor: float = FACTOR

    def __post_init__(self) -> None:
        if not 0 < self.start <= self.cap < math.inf or not 1 < self.factor < math.inf:
            raise GuidekitError(
                f"{self.name}: the start is above 0 and at most the cap, and the factor above 1, "
                f"not {self.start:g}:{self.cap:g}:{self.factor:g}"
            )

    @property
    def name(self) -> str:
        """`mpgd.scale`."""
        return f"{self.plugin}.{self.option}"


def parse_knob(text: str, value: Callable[[str, str], object]) -> Knob:
    """The knob of `PLUGIN.OPTION`, or `PLUGIN.OPTION=START:CAP:FACTOR`, of which the last may lack.

    value: what an option is in this run; without a start the search goes from a quarter of it to
    eight times it. Raises GuidekitError for another form, and for an option that is no number.
    """
    name, equals, raw = text.partition("=")
    plugin, _, option = name.strip().rpartition(".")
    if not plugin or not option:
        raise GuidekitError(f"{text!r}: write PLUGIN.OPTION, or PLUGIN.OPTION=START:CAP:FACTOR")
    here = value(plugin, option)
    if isinstance(here, bool) or not isinstance(here, int | float):
        raise GuidekitError(f"{name.strip()} is {here!r}, and only numbers are tuned")
    try:
        parts = [float(part) for part in raw.split(":")] if equals else []
    except ValueError:
        raise GuidekitError(f"{text!r}: START:CAP:FACTOR are numbers") from None
    if len(parts) > 3:
        raise GuidekitError(f"{text!r}: write START:CAP:FACTOR")
    start, cap, factor = (*parts, *(None,) * (3 - len(parts)))
    start = BELOW * here if start is None else start
    cap = ABOVE * max(here, start) if cap is None else cap
    return Knob(plugin, option, start, cap, FACTOR if factor is None else factor)


def beam_search(
    knobs: Sequence[Knob], score: Callable[[Values], float], width: int = 2, rounds: int = 6
) -> Values:
    """The values with the highest score that were tried; `score` is asked once for each.

    It ends where a round changes no member of the beam, or every knob is at its cap.
    """
    first = tuple(knob.start for knob in knobs)
    scores = {first: _number(score(first))}
    beam = [first]
    for _ in range(rounds):
        children = [
            child for values in beam for child in _children(values, knobs) if child not in scores
        ]
        for child in dict.fromkeys(children):
            scores[child] = _number(score(child))
        ranked = sorted({*beam, *children}, key=lambda v: (-scores[v], v))
        if not children or ranked[:width] == beam:
            break
        beam = ranked[:width]
    return max(scores, key=lambda v: scores[v])


def _children(values: Values, knobs: Sequence[Knob]) -> list[Values]:
    """The values with one of them multiplied, where that stays under its cap."""
    grown = [(i, v * k.factor, k) for i, (v, k) in enumerate(zip(values, knobs, strict=True))]
    return [(*values[:i], v, *values[i + 1 :]) for i, v, k in grown if v <= k.cap * (1 + 1e-9)]


def _number(score: float) -> float:
    """A score, the lowest for what is no number."""
    return -math.inf if math.isnan(score) else score
