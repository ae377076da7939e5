"""The hooks of a step's guidances: called in the user's order, watched, and named in errors."""

import copy
from collections.abc import Sequence
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
                objects, numbers = self._state(value)
                mask, before = acting(self.step, guidance), value
                if mask is not None:  # a hook may change what it is given
                    value = value.clone() if isinstance(value, Tensor) else list(value)
                    objects = [value, *objects[1:]]
                value = self.ask(guidance, hook, self.step, *given, value)
                now, counted = self._state(value)
                if differ(objects, now) or numbers != counted:
                    self.changed(guidance.name)
                if mask is not None:
                    value = self._left(mask, guidance.name, before, value)
        return value

    def _left(self, mask: Tensor, name: str, before: Any, after: Any) -> Any:
        """What a hook made of a value, but for the images that its guidance does not act on."""
        if isinstance(after, list):
            return own_branches_of(mask, name, before, after)
        return rows(mask, after, before)

    def changed(self, name: str) -> None:
        """The account counts a step at which a guidance changed something."""
        self.step.run.account.changed(name, self.step.index, self.step.repeat)

    def _state(self, value: Any) -> tuple[list, list]:
        """What a hook may change: objects to compare by identity, and numbers.

        The value, the combinations of other groups, the branches' inputs and weights.
        """
        if isinstance(value, list):  # branches
            fields = [(b.name, b.weight, b.null, b.view, b.group, tuple(b.prompts)) for b in value]
            return [*value, *(b.x for b in value), *(b.images for b in value)], fields
        groups = list(self.step.groups.values())
        tensors = [x for x in (value, *groups) if isinstance(x, Tensor) and not x.is_inference()]
        return [value, *groups], [x._version for x in tensors]
