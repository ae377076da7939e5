"""The hooks of a step's guidances: called in the user's order, watched, and named in errors."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from guidekit.engine.acting import acting, own_branches_of
from guidekit.engine.capture import differ
from guidekit.engine.rows import rows
from guidekit.errors import blame
from guidekit.guidance import Guidance
from guidekit.step import Step


def copied(guidances: Sequence[Guidance]) -> list[Guidance]:
    """A run's own guidances: nothing of a run lives in the user's objects.

    Containers are copied one level deep, all else, such as networks and tensors, is shared. Two
    guidances of one name get names of their own, as the account and branches know them by name.
    """
    own, names = [], []
    for guidance in guidances:
        mine = copy.copy(guidance)
        for name, value in vars(mine).items():
            if type(value) in (list, dict, set):
                setattr(mine, name, copy.copy(value))
        names.append(guidance.name)
        if (count := names.count(guidance.name)) > 1:
            mine._name = f"{guidance.name}-{count}"
        own.append(mine)
    return own


class Hooks:
    """Calls the hooks of the guidances that are active at a step.

    A guidance that changed anything, by what it returned or in place, is counted by the account.
    """

    def __init__(self, step: Step, active: list[Guidance]):
        self.step, self.active = step, active

    def ask(self, guidance: Guidance, hook: str, *given) -> Any:
        """What a hook of one guidance answers."""
        with blame(guidance.name, hook, self.step.index):
            return getattr(guidance, hook)(*given)

    def chain(self, hook: str, value: Any, *given) -> Any:
        """A value after the hooks of all guidances, each given what the one before returned."""
        for guidance in self.active:
            if guidance.overrides(hook):
                mask = acting(self.step, guidance)
                asked = self._whole if mask is None else partial(self._partly, mask)
                value = asked(guidance, hook, given, value)
        return value

    def _whole(self, guidance: Guidance, hook: str, given: tuple, value: Any) -> Any:
        """What a hook makes of a value; whether it changed something goes to the account."""
        objects, numbers = self._state(value)
        value = self.ask(guidance, hook, self.step, *given, value)
        now, counted = self._state(value)
        if differ(objects, now) or numbers != counted:
            self.changed(guidance.name)
        return value

    def _partly(self, mask: Tensor, guidance: Guidance, hook: str, given: tuple, value: Any) -> Any:
        """The same, but for the images that the guidance does not act on."""
        if isinstance(value, list):
            objects, numbers = self._state(value)
            after = self._whole(guidance, hook, given, [*value])
            now, counted = self._state(value)
            same = not differ(objects, now) and numbers == counted
            return own_branches_of(mask, guidance.name, value, after, same)
        groups = {name: out.clone() for name, out in self.step.groups.items()}
        after = self._whole(guidance, hook, given, value.clone())  # a hook may write into it
        for name, out in groups.items():
            self.step.groups[name] = rows(mask, self.step.groups[name], out)
        return rows(mask, after, value)

    def changed(self, name: str) -> None:
        """The account counts a step at which a guidance changed something."""
        self.step.run.account.changed(name, self.step.index, self.step.repeat)

    def _state(self, value: Any) -> tuple[list, list]:
        """What a hook may change: objects to compare by identity, and numbers.

        The value, the combinations of other groups, the branches' inputs and weights.
        """
        if isinstance(value, list):  # branches
            fields = [
                (b.name, b.weight, b.null, b.view, b.group, b.controlled, tuple(b.prompts))
                for b in value
            ]
            return [*value, *(x for b in value for x in (b.x, b.images, b.text))], fields
        groups = list(self.step.groups.values())
        tensors = [x for x in (value, *groups) if isinstance(x, Tensor) and not x.is_inference()]
        return [value, *groups], [x._version for x in tensors]
