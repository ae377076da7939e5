"""Events of a run: kept in order, replayed to who comes late, sent as they happen.

The form is that of server-sent events (HTML standard, section 9.2): a client that lost its
connection names the last event that it saw, and gets those after it.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

ALIVE = 10.0  # seconds after which a silent stream says that it is there
STEP = "step"
LATEST = ("preview", "maps")  # kinds of which the last counts alone


@dataclass(frozen=True)
class Event:
    """Something that happened to a run."""

    number: int
    kind: str
    data: dict[str, Any]

    @property
    def text(self) -> str:
        """The event as a stream carries it."""
        data = json.dumps(self.data, allow_nan=False, separators=(",", ":"))
        return f"id: {self.number}\nevent: {self.kind}\ndata: {data}\n\n"


class EventLog:
    """The events of one run, written by a thread and followed in the server's loop."""

    def __init__(self, most: int) -> None:
        """most: events of steps that are kept; of more, those at equal distances."""
        self._most, self._every, self._steps = most, 1, 0
        self._ordinals: dict[int, int] = {}  # which step the event of that number is
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._count = 0
        self._closed = False
        self._listeners: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def add(self, kind: str, **data: Any) -> None:
        """Keeps an event and wakes who listens. Of the kinds LATEST the one before is dropped."""
        with self._lock:
            self._count += 1
            if kind in LATEST:
                self._events = [e for e in self._events if e.kind != kind]
            self._events.append(Event(self._count, kind, data))
            if kind == STEP:
                self._ordinals[self._count] = self._steps
                self._steps += 1
                if len(self._ordinals) > self._most:
                    self._thin()
        self._wake()

    def _thin(self) -> None:
        """Keeps every second, fourth, ... step, so that the curves of a long run keep their form.

        Half of the room stays for steps to come, which who listens gets all.
        """
        while len(kept := self._standing()) > self._most // 2:
            self._every *= 2
        gone = self._ordinals.keys() - kept.keys()
        self._events = [e for e in self._events if e.number not in gone]
        self._ordinals = kept

    def _standing(self) -> dict[int, int]:
        return {n: step for n, step in self._ordinals.items() if step % self._every == 0}

    def close(self) -> None:
        """Ends every stream after what there is; the previews, which nobody needs now, go."""
        with self._lock:
            self._events = [e for e in self._events if e.kind != "preview"]
            self._closed = True
        self._wake()

    @property
    def last(self) -> int:
        """Number of the last event."""
        return self._count

    def since(self, number: int) -> list[Event]:
        """The events after the one of that number."""
        with self._lock:
            return [e for e in self._events if e.number > number]

    async def follow(self, number: int = 0, alive: float = ALIVE) -> AsyncIterator[str]:
        """The text of the events after `number`, as they come, until the run has ended."""
        listener = (asyncio.get_running_loop(), asyncio.Event())
        self._listeners.add(listener)
        try:
            while True:
                listener[1].clear()
                closed = self._closed
                for event in self.since(number):
                    number = event.number
                    yield event.text
                if closed:
                    return
                try:
                    await asyncio.wait_for(listener[1].wait(), alive)
                except TimeoutError:
                    yield ": alive\n\n"
        finally:
            self._listeners.discard(listener)

    def _wake(self) -> None:
        for loop, event in list(self._listeners):
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # that loop is closed, and its listener with it
                self._listeners.discard((loop, event))
