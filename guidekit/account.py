"""The account of a run: what every guidance did at every step, and whether it acted at all."""

import math
import time
import warnings
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Account:
    """Rows of run.json, one per guidance and step, and counts of gradient-free edits."""

    rows: list[dict] = field(default_factory=list)
    edits: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    attention: dict[str, str] = field(default_factory=dict)  # site read: implementation
    pictures: dict[str, Tensor] = field(default_factory=dict)  # maps kept for the report
    started: float = field(default_factory=time.monotonic)

    def energy(self, plugin: str, step: int, repeat: int, energy: Tensor, **values) -> None:
        """One guidance's energy, gradient norm and update-to-output ratio per picture."""
        row = {"plugin": plugin, "step": step, "repeat": repeat, "energy": _numbers(energy)}
        self.rows.append(row | {k: _numbers(v) for k, v in values.items()})

    def edit(self, plugin: str) -> None:
        """Counts one change that a gradient-free guidance made."""
        self.edits[plugin] = self.edits.get(plugin, 0) + 1

    def attended(self, site: str, implementation: str) -> None:
        """Keeps which implementation of attention ran where maps were read."""
        self.attention[site] = implementation

    def note(self, text: str) -> None:
        """Keeps a remark for run.json, once."""
        if text not in self.notes:
            self.notes.append(text)

    def first_and_last(self, plugin: str) -> tuple[float, float] | None:
        """Mean energy of a guidance at its first and its last active step."""
        rows = [r for r in self.rows if r["plugin"] == plugin]
        if not rows:
            return None
        ends = [[v for v in r["energy"] if v is not None] for r in (rows[0], rows[-1])]
        return tuple(sum(end) / len(end) for end in ends) if all(ends) else None

    def acted(self, plugin: str) -> bool:
        """Whether a guidance changed anything: a gradient that is not zero, or an edit."""
        moved = any(
            any(norm != 0 for norm in row["grad_norm"])
            for row in self.rows
            if row["plugin"] == plugin
        )
        return moved or self.edits.get(plugin, 0) > 0

    def warn_idle(self, guidances: list) -> None:
        """Warns of every guidance with a scale that never acted inside its window."""
        for guidance in guidances:
            if guidance.scale != 0 and not self.acted(guidance.name):
                text = (
                    f"{guidance.name} never acted: no gradient and no edit between "
                    f"{guidance.start:g} and {guidance.stop:g} of the run; check sites and window"
                )
                self.note(text)
                warnings.warn(text, stacklevel=3)


def _numbers(values: Tensor | float) -> list[float | None] | float | None:
    """Numbers that JSON has: a value that is not finite becomes None."""
    if isinstance(values, Tensor):
        return [_numbers(v) for v in values.detach().flatten().tolist()]
    return float(f"{values:.6g}") if math.isfinite(values) else None
