"""The folder of a plan: blocks that are whole or not there, what failed, and the manifest.

plan.json  run.json  masks/  manifest.json
00000/00000000.png, 00000000.json, ...     a block, or 00000.tar with the same in it
state/records/  state/failures/  state/locks/  state/parts/
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import socket
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from guidekit.cli.scale.block_plan import PLAN, BlockPlan
from guidekit.errors import GuidekitError
from guidekit.system.locks import gone, held, holder
from guidekit.system.untrusted import read_json
from guidekit.train.durable import put

MANIFEST, RECORD = "manifest.json", "run.json"
Members = Sequence[tuple[str, bytes]]  # names and contents of a block's files
STATES = ("records", "failures", "locks", "parts")


class Store:
    """The folder of a plan. Writing raises OSError, for a full disk too, and leaves no half."""

    def __init__(self, folder: Path, plan: BlockPlan):
        self.folder, self.plan = folder, plan
        self._token = f"{socket.gethostname()}-{os.getpid()}"

    @classmethod
    def make(
        cls, folder: Path, plan: BlockPlan, files: Callable[[Path], None] | None = None
    ) -> "Store":
        """The store of a plan in a folder, which may be there already with the same plan.

        files: writes the files that the plan names into a folder. Raises GuidekitError if
        the folder holds another plan, or the images of a run.
        """
        if (folder / RECORD).exists() and not (folder / PLAN).exists():
            raise GuidekitError(f"{folder} is the folder of a run; choose another with --out")
        try:
            for state in STATES:
                (folder / "state" / state).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GuidekitError(f"output folder {folder}: {error.strerror}") from None
        store = cls(folder, plan)
        if files is not None and not (folder / PLAN).exists():
            store._add_files(files)
        text = json.dumps(plan.table(folder), indent=1)
        if not store.publish_once(PLAN, text):
            there = read_json(folder / PLAN) | {"folder": ""}
            if there != json.loads(text) | {"folder": ""}:
                raise GuidekitError(
                    f"{folder} holds another plan; choose another folder with --out, or go on with "
                    f"that one by --plan {folder}"
                )
        return store

    def _add_files(self, write: Callable[[Path], None]) -> None:
        """Writes files aside and moves them in, as several processes may do at once."""
        aside = self._part("files")
        aside.mkdir()
        write(aside)
        for file in aside.rglob("*"):
            if file.is_file():
                place = self.folder / file.relative_to(aside)
                place.parent.mkdir(exist_ok=True)
                put(file, place)
        shutil.rmtree(aside)

    # Files

    def state(self, kind: str, number: int) -> Path:
        """The file of a block among the records, failures or locks."""
        suffix = "lock" if kind == "locks" else "json"
        return self.folder / "state" / kind / f"{number:05d}.{suffix}"

    def place(self, number: int) -> Path:
        """Where a block is once it is whole."""
        return self.folder / f"{number:05d}{'.tar' if self.plan.form == 'tars' else ''}"

    def done(self, number: int) -> bool:
        """Whether a block is there, whole."""
        return self.place(number).exists()

    def publish_once(self, name: str, text: str) -> bool:
        """Writes a file of the folder unless it is there; False if it is."""
        part, path = self._part(name), self.folder / name
        if path.exists():
            return False
        part.write_text(text + "\n", encoding="utf-8")
        try:
            os.link(part, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            put(part, path)
        finally:
            part.unlink(missing_ok=True)
        return True

    def write(self, path: Path, table: dict[str, Any]) -> None:
        """Writes JSON that is whole on the disk before it takes the place of what was there."""
        part = self._part(path.name)
        try:
            part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
            put(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _part(self, name: str) -> Path:
        return self.folder / "state" / "parts" / f"{name}.{self._token}"

    # Blocks

    def publish(self, number: int, members: Members, made_by: dict[str, Any]) -> None:
        """Makes a block appear, its record first; one that is there already stays."""
        if self.done(number):
            return
        seeds = self.plan.seeds(number)
        self.write(
            self.state("records", number),
            {
                "block": number,
                "name": self.place(number).name,
                "seeds": [seeds[0], seeds[-1]],
                "files": {name: hashlib.sha256(data).hexdigest() for name, data in members},
                "made_by": made_by,
            },
        )
        part = self._part(self.place(number).name)
        try:
            _write_tar(part, members) if self.plan.form == "tars" else _write_folder(part, members)
            with _taken_is_fine():
                put(part, self.place(number))
        finally:
            _remove(part)
        self.state("failures", number).unlink(missing_ok=True)

    def sweep(self, number: int) -> None:
        """Removes what killed processes left of a block whose lock this process holds."""
        for part in (self.folder / "state" / "parts").glob(f"{self.place(number).name}.*"):
            _remove(part)

    def tidy(self) -> None:
        """Removes what killed processes left of a plan that is complete."""
        for part in (self.folder / "state" / "parts").iterdir():
            if part.name[0].isdigit() or _ownerless(part):
                _remove(part)
        for lock in (self.folder / "state" / "locks").iterdir():
            with held(lock, needed=False):  # one that nobody has goes with this
                pass

    def fail(self, number: int, error: Exception) -> None:
        """Writes down that a block failed, why, and how often."""
        seeds = self.plan.seeds(number)
        self.write(
            self.state("failures", number),
            {
                "block": number,
                "seeds": [seeds[0], seeds[-1]],
                "error": f"{type(error).__name__}: {error}",
                "tries": self.tries(number) + 1,
            },
        )

    def tries(self, number: int) -> int:
        """How often a block has failed."""
        failure = self._read("failures", number)
        return 0 if failure is None else int(failure["tries"])

    def _read(self, kind: str, number: int) -> dict[str, Any] | None:
        """A block's record or failure, if it has one."""
        try:
            return read_json(self.state(kind, number))
        except FileNotFoundError:
            return None

    # What there is

    def manifest(self) -> dict[str, Any]:
        """What the folder holds: blocks with their files' hashes, failures, whether it is all."""
        records = [self._read("records", n) for n in self.plan.blocks if self.done(n)]
        failures = [self._read("failures", n) for n in self.plan.blocks if not self.done(n)]
        return {
            "format": 1,
            "plan": self.plan.identity,
            "images": sum(len(self.plan.seeds(n)) for n in self.plan.blocks if self.done(n)),
            "count": self.plan.count,
            "complete": all(map(self.done, self.plan.blocks)),
            "blocks": [record for record in records if record is not None],
            "failures": [failure for failure in failures if failure is not None],
        }

    def drawing(self) -> dict[int, str]:
        """The blocks that are being drawn, and by whom."""
        locks = sorted((self.folder / "state" / "locks").glob("*.lock"))
        found = {int(lock.stem): holder(lock) for lock in locks}
        return {number: who for number, who in found.items() if who is not None}

    def write_manifest(self) -> dict[str, Any]:
        """Writes manifest.json and returns it.

        It is written twice, as another process may have written an older one meanwhile; processes
        that go on write theirs when they end.
        """
        for _ in range(2):
            manifest = self.manifest()
            self.write(self.folder / MANIFEST, manifest)
        return manifest


def _write_folder(part: Path, members: Members) -> None:
    part.mkdir()
    for name, data in members:
        (part / name).write_bytes(data)


def _write_tar(part: Path, members: Members) -> None:
    """A tar without times and owners, so that a block is the same whoever draws it."""
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


@contextlib.contextmanager
def _taken_is_fine():
    """Passes over that a block is there already, which has the same bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _ownerless(part: Path) -> bool:
    """Whether the process that began a part is known to have ended."""
    name, _, pid = part.name.rpartition("-")
    host = socket.gethostname()
    return name.endswith(f".{host}") and pid.isdigit() and gone(host, int(pid))


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)
