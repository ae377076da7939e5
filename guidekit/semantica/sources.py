"""Pages of pictures: WebDataset shards as img2dataset writes them, folders, labels, scenes.

A source is an iterator of `Item`, or None for what cannot be read, in the same order at every run.
Pictures that share `page` are those of one page, class or scene.
"""

import functools
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from guidekit.errors import GuidekitError
from guidekit.references import PICTURES
from guidekit.untrusted import MOST_MEMBER, open_picture, parse_json
from guidekit.worlds import scenes

READ = {*(e[1:] for e in PICTURES), "json", "txt"}  # extensions of members; others are not kept


@dataclass(frozen=True)
class Item:
    """One picture of a page; `open` reads it, and may raise what Pillow raises."""

    page: str
    key: str
    open: Callable[[], Image.Image]
    caption: str = ""


def files_below(root: Path, leave_out: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every file below `root`, in the order of `sorted(root.rglob("*"))`, one folder in memory.

    leave_out: folders whose files are passed over, such as a run's own. Links to folders are not
    followed; a folder that cannot be read is empty.
    """
    away = {os.path.realpath(folder) for folder in leave_out}
    if os.path.realpath(root) not in away:
        yield from _walk(Path(root), away)


def _walk(folder: Path, away: set[str]) -> Iterator[Path]:
    """Every file below `folder` but for those in the folders `away`, which are real paths."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((e.name, e.is_dir(follow_symlinks=False)) for e in found)
    except OSError:
        return
    for name, is_folder in entries:
        path = folder / name
        if not is_folder:
            yield path
        elif os.path.realpath(path) not in away:
            yield from _walk(path, away)


def folder_items(root: Path, leave_out: tuple[Path, ...] = ()) -> Iterator[Item | None]:
    """Every picture below `root`: a folder is a page, so classes are pages too.

    leave_out: as of `files_below`. Raises GuidekitError where there is none.
    """
    empty = True
    for path in files_below(root, leave_out):
        if path.suffix.lower() in PICTURES:
            empty, place = False, path.relative_to(root)
            yield Item(str(place.parent), str(place), functools.partial(open_picture, path))
    if empty:
        raise GuidekitError(
            f"no pictures below {root}; a folder of {', '.join(PICTURES)} is a page"
        )


def shard_items(paths: list[Path], page: str = "page_url") -> Iterator[Item | None]:
    """The samples of tar shards `00000.tar` with `{key}.jpg`, `{key}.json`, `{key}.txt`.

    page: the column of the json that says where a picture is from; give img2dataset
    `--save_additional_columns '["page_url"]'`. A label works too: its pictures are then a page.
    Members are streamed, never extracted. Raises GuidekitError if the first json lacks the column.
    """
    checked = False
    for path in paths:
        for key, parts in _samples(path):
            table = _table(parts or {})
            if table and not checked and page not in table:
                columns = ", ".join(sorted(table))
                raise GuidekitError(f"{path}: {key}.json lacks {page!r}; it has {columns}")
            checked = checked or bool(table)
            yield None if parts is None else _item(path, key, parts, table.get(page))


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes] | None]]:
    """Keys and members of one shard; (name, None) where the tar is damaged."""
    key, parts = "", {}
    try:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                stem = f"{folder}/{stem}" if folder else stem
                if not member.isfile() or member.size > MOST_MEMBER:
                    continue
                if stem != key and parts:
                    yield key, parts
                    parts = {}
                key = stem
                kind = extension.lower()
                wanted = kind in READ
                parts[kind if wanted else ""] = tar.extractfile(member).read() if wanted else b""
            whole = _ended(path, tar.offset)
    except Exception:  # tarfile passes on what a header makes it meet: ValueError, RecursionError
        whole = False
    if parts:
        yield key, parts
    if not whole:
        yield str(path), None


def _ended(path: Path, offset: int) -> bool:
    """Whether the archive says at `offset` that it ends; tarfile takes a damaged header for it."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE


def _table(parts: dict[str, bytes]) -> dict:
    """What the json beside a picture says; nothing if it is no object."""
    try:
        table = parse_json(parts.get("json", b"{}"))
    except ValueError:
        return {}
    return table if isinstance(table, dict) else {}


def _item(path: Path, key: str, parts: dict[str, bytes], page: object) -> Item | None:
    """A sample as an item; None if it has no picture or no page (null, empty or not a number)."""
    picture = next((parts[e[1:]] for e in PICTURES if e[1:] in parts), None)
    if picture is None or page is None or page == "" or page != page:
        return None
    caption = parts.get("txt", b"").decode("utf-8", "replace")
    return Item(str(page), f"{path.name}/{key}", lambda: open_picture(io.BytesIO(picture)), caption)


def scene_items(
    pages: int,
    per_page: int,
    size: int,
    split: str = "train",
    polluted: float = 0.0,
    without: tuple[str, ...] = (),
) -> Iterator[Item]:
    """Pages of scenes: one background and set of objects, places and sizes that vary.

    polluted: share of the pictures that are of some other page, as web pages have them. without:
    objects such as `red circle` whose pages are left out.
    """
    for number in _without(range(pages), split, without):
        rng = np.random.Generator(np.random.Philox(key=[number, 7]))
        own = scenes.episode(number, per_page, split)
        for place, plan in enumerate(own):
            if rng.random() < polluted:  # what is not of the page, from numbers no page has
                plan = scenes.scene(10**6 + number * per_page + place, split)
            yield Item(
                str(number),
                f"{split}-{number}-{place}",
                functools.partial(_drawn, plan, size),
                plan.caption,
            )


def labelled_scene_items(
    pages: int, per_page: int, size: int, split: str = "train", without: tuple[str, ...] = ()
) -> Iterator[Item]:
    """The same scenes grouped by a label instead: the first object's shape and colour."""
    for number in _without(range(pages * per_page), split, without):
        plan = scenes.scene(number, split)
        yield Item(
            plan.things[0].phrase,
            f"{split}-{number}",
            functools.partial(_drawn, plan, size),
            plan.caption,
        )


def _without(numbers: range, split: str, phrases: tuple[str, ...]) -> Iterator[int]:
    """The numbers of the scenes that hold none of the objects."""
    for number in numbers:
        if not any(thing.phrase in phrases for thing in scenes.scene(number, split).things):
            yield number


def _drawn(plan: scenes.Scene, size: int) -> Image.Image:
    return Image.fromarray(scenes.draw(plan, size)[0])
