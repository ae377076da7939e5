"""The account of a run: what every guidance did at every step, and whether it acted at all."""

import math
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Account:
    """Rows of run.json, one per guidance and step, and counts of steps at which hooks acted."""

    #: Guidance to the number of steps at which it changed something without a gradient.
    edits: dict[str, int] = field(default_factory=dict)
    #: Guidance to the SHA-256 of weights that its reward read; they judge none of the images.
    guides: dict[str, list[str]] = field(default_factory=dict)
    #: Remarks.
    notes: list[str] = field(default_factory=list)
    #: Site that was read to the implementation of attention that ran there.
    attention: dict[str, str] = field(default_factory=dict)
    #: Kind of mixed denoiser call to how its branches rode, "batched" or "split"; a replay is given
    #: it, as that moves roundings.
    calls: dict[str, str] = field(default_factory=dict)
    #: Clock when it began.
    started: float = field(default_factory=time.monotonic)
    _rows: list[dict] = field(default_factory=list, repr=False)
    _changed: set[tuple] = field(default_factory=set, repr=False)
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def rows(self) -> list[dict]:
        """A row per guidance and step: energy, gradient norm and update ratio per image, seconds.

        Numbers stay on the device until they are asked for, so that no step waits for them.
        """
        for row in self._rows:
            row.update({k: _numbers(v) for k, v in row.items() if isinstance(v, Tensor)})
        return self._rows

    @property
    def maps(self) -> dict[str, Tensor]:
        """Maps kept for the report, on the CPU."""
        return {name: kept.cpu() for name, kept in self._kept.items()}

    def keep(self, name: str, maps: Tensor) -> None:
        """Keeps maps (B, S, h, w) for the report, the first and the latest of a name."""
        self._kept.setdefault(f"{name} before", maps.detach())
        self._kept[f"{name} after"] = maps.detach()

    def energy(self, plugin: str, step: int, repeat: int, energy: Tensor, **values) -> None:
        """One guidance's energy, gradient norm and update-to-output ratio per image."""
        row = {"plugin": plugin, "step": step, "repeat": repeat, "energy": energy, **values}
        self._rows.append(
            {k: v.detach() if isinstance(v, Tensor) else _number(v) for k, v in row.items()}
        )

    def reward(self, plugin: str, step: int, repeat: int, reward: Tensor, **values) -> None:
        """Rewards (B,) by which a guidance judged its images, one each, and what came of them."""
        self._rows.append(
            {"plugin": plugin, "step": step, "repeat": repeat, "reward": reward.detach()} | values
        )

    def guided(self, plugin: str, hashes: frozenset[str]) -> None:
        """Notes weights that a guidance chose by."""
        if hashes:
            self.guides[plugin] = sorted(hashes.union(self.guides.get(plugin, [])))

    def changed(self, plugin: str, step: int, repeat: int) -> None:
        """Counts a step at which a guidance changed something, once; the engine sees it itself."""
        key = (plugin, step, repeat)
        if key not in self._changed:
            self._changed.add(key)
            self.edit(plugin)

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
        rows = [r for r in self.rows if r["plugin"] == plugin and "energy" in r]
        if not rows:
            return None
        ends = [[v for v in r["energy"] if v is not None] for r in (rows[0], rows[-1])]
        return tuple(sum(end) / len(end) for end in ends) if all(ends) else None

    def acted(self, plugin: str) -> bool:
        """Whether a guidance changed anything: a gradient that is not zero, or an edit."""
        moved = any(
            any(norm != 0 for norm in row.get("grad_norm", ()))
            for row in self.rows
            if row["plugin"] == plugin
        )
        return moved or self.edits.get(plugin, 0) > 0

    def warn_idle(self, guidances: list) -> None:
        """Warns of every guidance with a scale that never acted inside its window."""
        for guidance in guidances:
            judges = guidance.overrides("accept") and not guidance.overrides("energy")
            if guidance.scale != 0 and not judges and not self.acted(guidance.name):
                text = (
                    f"{guidance.name} never acted: no gradient and no edit in its window, "
                    f"{guidance.window}; check sites and window"
                )
                self.note(text)
                warnings.warn(text, stacklevel=3)


def _numbers(values: Tensor) -> list[float | None]:
    """Numbers that JSON has: a value that is not finite becomes None."""
    return [_number(v) for v in values.flatten().tolist()]


def _number(value: Any) -> Any:
    """A number of six digits, None for one that is not finite; anything else as it is."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
