"""One of any number of processes that draw a plan: it takes blocks that nobody has."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from guidekit.cli.scale.store import Store
from guidekit.errors import GuidekitError
from guidekit.system.locks import held

WAIT = 1.0  # seconds until a block that another process draws is looked at again
PATIENCE = 5  # blocks that fail one after the other, before the plan itself is taken to be wrong


class Draws(Protocol):
    """What draws a block; see `Drawer`."""

    made_by: dict[str, Any]

    def draw(self, number: int) -> list[tuple[str, bytes]]:
        """The files of a block."""


@dataclass
class Worker:
    """Draws what is not there yet of a plan, or of its share of it.

    A block that fails is written down and tried again by the next call; the rest goes on.
    """

    store: Store
    drawer: Draws
    #: Which of how many shares is this process's, from 1.
    shard: tuple[int, int] = (1, 1)
    #: Told of every block that is there now: images that this process drew, images in all.
    tell: Callable[[int, int], None] | None = None
    #: Images that this process drew.
    drawn: int = 0
    #: Blocks that failed here.
    failed: dict[int, Exception] = field(default_factory=dict)
    _in_a_row: int = 0

    def __post_init__(self) -> None:
        share, of = self.shard
        if not 1 <= share <= of:
            raise GuidekitError(f"a shard is one of 1/{of} to {of}/{of}, not {share}/{of}")
        self._own = self.store.plan.blocks[share - 1 :: of]
        self._tries = {number: self.store.tries(number) for number in self._own}

    def run(self) -> None:
        """Draws until no block is free. Raises OSError, such as for a full disk.

        Raises GuidekitError if PATIENCE new blocks fail one after the other.
        """
        while self._pass():
            pass

    @property
    def left(self) -> int:
        """Blocks of its share that are not there."""
        return sum(not self.store.done(number) for number in self._own)

    def _pass(self) -> int:
        """Draws every block that is free now; how many those were."""
        count = 0
        for number in self._order():
            if self._spent(number):
                continue
            with held(self.store.state("locks", number), needed=self.shard[1] == 1) as own:
                if own and not self._spent(number):
                    self._draw(number)
                    count += 1
        return count

    def _order(self) -> Iterator[int]:
        """New blocks first: those that failed before may fail again."""
        yield from (number for number in self._own if not self._tries[number])
        yield from (number for number in self._own if self._tries[number])

    def _spent(self, number: int) -> bool:
        """Whether a block is there, or has failed since this process began."""
        return self.store.done(number) or self.store.tries(number) > self._tries[number]

    def _draw(self, number: int) -> None:
        """Draws one block whose lock is held."""
        error = _draw(self.store, self.drawer, number)
        if error is not None:
            self.failed[number] = error
            self._in_a_row += not self._tries[number]
            if self._in_a_row == PATIENCE:
                raise GuidekitError(
                    f"{PATIENCE} blocks failed one after the other, the last by "
                    f"{type(error).__name__}: {error}"
                ) from error
            return
        self._in_a_row = 0
        self.drawn += len(self.store.plan.seeds(number))
        if self.tell is not None:
            self.tell(self.drawn, self.store.plan.count)


def drawn_by_someone(store: Store, drawer: Draws, number: int) -> bool:
    """Whether a block is there: drawn now, or by the process that has its lock, which is awaited.

    False for one that failed here, which is written down. Without locks, on file systems that have
    none, a block that two are given is drawn twice, with the same bytes.
    """
    while not store.done(number):
        with held(store.state("locks", number), needed=False) as own:
            if own and not store.done(number) and _draw(store, drawer, number) is not None:
                return False
        if not own:
            time.sleep(WAIT)
    return True


def _draw(store: Store, drawer: Draws, number: int) -> Exception | None:
    """Draws one block whose lock is held; the error of one that failed, which is written down."""
    store.sweep(number)
    try:
        members = drawer.draw(number)
    except Exception as error:
        store.fail(number, error)
        return error
    store.publish(number, members, drawer.made_by)
    return None
