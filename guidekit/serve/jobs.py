"""The queue of a server: runs wait, one is drawn at a time, and each can be stopped."""

import contextlib
import secrets
import shutil
import tempfile
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from guidekit.cli.grid import Cell, draw_cells
from guidekit.cli.plan import make_plan
from guidekit.cli.session import Session, Stopped
from guidekit.errors import GuidekitError, where_of
from guidekit.outputs.folders import new_folder, removed_if_empty, slug
from guidekit.serve.asked import Asked
from guidekit.serve.events import EventLog
from guidekit.serve.models import Models
from guidekit.serve.options import ServeOptions
from guidekit.serve.watcher import Watcher
from guidekit.system.untrusted import read_json

ENDED = ("finished", "stopped", "failed")


class NoRunError(GuidekitError):
    """The server has no run of that id."""


class QueueFullError(Exception):
    """No more runs may wait."""


@dataclass(eq=False)
class Job:
    """A run of the server: what was asked, how it stands, what happened."""

    id: str
    asked: Asked
    #: Files of the request, which are removed when the run has ended.
    inputs: Path
    events: EventLog
    state: str = "queued"
    #: Where its files are, once it is drawn.
    folder: Path | None = None
    error: str | None = None
    made: float = field(default_factory=time.time)
    seconds: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)
    done: int = 0
    total: int = 0

    @property
    def cells(self) -> list[Cell]:
        """Its runs: those of a grid, or the one."""
        return list(self.asked.cells)

    def turn(self, state: str, **data: Any) -> None:
        """Changes how it stands, and says so."""
        self.state = state
        self.events.add("state", state=state, **data)

    def where(self, cell: Cell) -> str:
        """Folder of a run below the job's own: "" for the only one."""
        return cell.name if self.asked.axes else ""


class Jobs:
    """All runs of a server, in order, and the thread that draws them."""

    def __init__(self, options: ServeOptions, models: Models):
        self.options, self.models = options, models
        self.all: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing, self._count = False, 0
        self._start = secrets.token_hex(2)  # a page of the server before takes no run for its own
        self._thread = threading.Thread(target=self._work, name="guidekit draws", daemon=True)

    @contextlib.contextmanager
    def working(self) -> Iterator["Jobs"]:
        """Draws what comes meanwhile; at the end the run at hand is stopped within a step."""
        self._thread.start()
        try:
            yield self
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify()
            for job in list(self.all.values()):
                self.end(job)
            self._thread.join()

    def add(self, read: Callable[[Path], Asked]) -> Job:
        """A new run at the end of the queue. read: makes it of the new folder for its files.

        Raises QueueFullError, and what `read` raises.
        """
        inputs = Path(tempfile.mkdtemp(prefix="guidekit-")) / "request"
        try:
            with self._changed:  # no two clients get the last place
                if len(self._waiting) >= self.options.limits.queue:
                    raise QueueFullError
            asked = read(inputs)
            with self._changed:
                if len(self._waiting) >= self.options.limits.queue:
                    raise QueueFullError
                self._count += 1
                events = EventLog(self.options.limits.events)
                job = Job(f"{self._count:04d}-{self._start}", asked, inputs, events)
                self.all[job.id] = job
                self._waiting.append(job)
                job.turn("queued", position=len(self._waiting))
                self._forget()
                self._changed.notify()
        except BaseException:
            shutil.rmtree(inputs.parent)
            raise
        return job

    def _forget(self) -> None:
        """Lets the oldest ended runs go; their folders stay."""
        limits, held = self.options.limits, sum(job.asked.size for job in self.all.values())
        for job in [job for job in self.all.values() if job.state in ENDED]:
            if len(self.all) <= limits.kept and held <= limits.held:
                return
            held -= job.asked.size
            del self.all[job.id]

    def position(self, job: Job) -> int:
        """Place in the queue, 1 being the next; 0 for one that does not wait."""
        waiting = list(self._waiting)
        return waiting.index(job) + 1 if job in waiting else 0

    def end(self, job: Job) -> None:
        """Stops a run: at once if it waits, within a step if it is drawn."""
        job.stop.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._close(job, "stopped")

    def _close(self, job: Job, state: str, error: str | None = None) -> None:
        job.error = error
        shutil.rmtree(job.inputs.parent, ignore_errors=True)
        job.turn(state, error=error, folder=None if job.folder is None else str(job.folder))
        job.events.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                job.turn("loading")
            self._draw(job)

    def _draw(self, job: Job) -> None:
        """Draws a run to its end, whatever that is; no error of one run ends the worker."""
        started = time.monotonic()
        state, error = "failed", None
        try:
            with warnings.catch_warnings():  # what matters of them is in the account's notes
                warnings.simplefilter("ignore")
                self._draw_cells(job)
            state = "finished"
        except Stopped:
            state = "stopped"
        except GuidekitError as refusal:
            error = str(refusal)
        except Exception as bug:
            traceback.print_exception(bug)
            whose = where_of(bug) or "guidekit"
            error = f"a bug of {whose}, {type(bug).__name__}; the server's log says where"
        job.seconds = time.monotonic() - started
        self._close(job, state, error)

    def _draw_cells(self, job: Job) -> None:
        cells = job.cells
        if not job.asked.axes:
            self._draw_cell(job, cells[0], self._folder(job), 0, 1)
            return
        job.folder = new_folder(self._folder(job), "grid")

        def draw(cell: Cell, out: Path) -> None:
            self._draw_cell(job, cell, out, cells.index(cell), len(cells))

        draw_cells(job.folder, job.asked.axes, cells, draw)

    def _folder(self, job: Job) -> Path:
        """Where a run is to be written."""
        first = job.asked.settings
        return self.options.out / f"{job.id}-{slug(first.prompt or Path(first.model).name)}"

    def _draw_cell(self, job: Job, cell: Cell, out: Path, index: int, count: int) -> None:
        """One run, by a plan and a session of its own, as `guidekit sample` draws it."""
        plan = make_plan(replace(cell.settings, out=out), load=self.models.load)
        with removed_if_empty(plan.folder):
            where = job.where(cell)
            watcher = Watcher(job.events, job.stop, self.options.preview, where)
            session = Session(plan, watcher)
        job.folder = job.folder or plan.folder
        tokens = session.record.facts["tokens"]
        job.turn("drawing", cell=where, folder=str(job.folder), tokens=tokens)

        def progress(done: int, total: int) -> None:
            watcher.progress(done, total)
            job.done, job.total = index * total + done, count * total

        session.draw(progress)


def records(job: Job) -> dict[str, Any]:
    """What run.json holds of each of its runs that has one, by their folders."""
    found = {}
    for cell in job.cells:
        where = job.where(cell)
        path = None if job.folder is None else job.folder / where / "run.json"
        if path is not None and path.is_file():
            found[where] = read_json(path)
    return found
