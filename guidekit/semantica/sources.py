"""Pages of images: WebDataset shards as img2dataset writes them, folders, labels, scenes.

A source is an iterator of `Item`, or None for what cannot be read, in the same order at every run.
Images that share `page` are those of one page, class or scene. To be encoded by several processes
it is cut into parts, each of which can be begun in the middle.
"""

import functools
import io
import itertools
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from guidekit.errors import GuidekitError
from guidekit.references import PICTURES
from guidekit.semantica.scattered import ended, is_scattered, scattered_samples, split_name
from guidekit.system.untrusted import MOST_MEMBER, open_image, parse_json
from guidekit.worlds import scenes

READ = {*(e[1:] for e in PICTURES), "json", "txt"}  # extensions of members; others are not kept


@dataclass(frozen=True)
class Item:
    """One image of a page; `open` reads it, and may raise what Pillow raises."""

    page: str
    key: str
    open: Callable[[], Image.Image]
    caption: str = ""


@dataclass(frozen=True)
class Part:
    """A piece of a source. items: from a place on, each item with the place after it.

    Places are the part's own: bytes of a tar, numbers elsewhere.
    """

    name: str
    items: Callable[[int], Iterator[tuple[Item | None, int]]]


def numbered(name: str, make: Callable[[], Iterator[Item | None]]) -> Part:
    """A part whose places are how many items were taken."""

    def items(place: int) -> Iterator[tuple[Item | None, int]]:
        for number, item in enumerate(itertools.islice(make(), place, None), place + 1):
            yield item, number

    return Part(name, items)


def limited(parts: list[Part], count: int) -> list[Part]:
    """One part: the first `count` items of all."""

    def items() -> Iterator[Item | None]:
        return (item for part in parts for item, _ in part.items(0))

    return [numbered("limited", lambda: itertools.islice(items(), count))]


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
    """Every image below `root`: a folder is a page, so classes are pages too.

    leave_out: as of `files_below`. Raises GuidekitError where there is none.
    """
    empty = True
    for path in files_below(root, leave_out):
        for item in _pictured(path, root):
            empty = False
            yield item
    if empty:
        raise GuidekitError(f"no images below {root}; a folder of {', '.join(PICTURES)} is a page")


def folder_parts(root: Path, leave_out: tuple[Path, ...] = (), most: int = 256) -> list[Part]:
    """The images below `root` in at most `most` parts, each of neighbouring folders.

    Names of the folders directly in `root` are held in memory: millions of pages belong in shards.
    Raises GuidekitError where there is no image.
    """
    next(folder_items(root, leave_out), None)
    away = {os.path.realpath(folder) for folder in leave_out}
    with os.scandir(root) as found:
        folders = [e for e in found if e.is_dir(follow_symlinks=False)]
    names = sorted(e.name for e in folders if os.path.realpath(e.path) not in away)
    size = -(-max(len(names), 1) // most)
    blocks = [names[i : i + size] for i in range(0, len(names), size)]

    def below(block: list[str]) -> Iterator[Item | None]:
        for name in block:
            for path in files_below(root / name, leave_out):
                yield from _pictured(path, root)

    def loose() -> Iterator[Item | None]:
        for path in sorted(p for p in root.iterdir() if p.is_file()):
            yield from _pictured(path, root)

    parts = [numbered(block[0], functools.partial(below, block)) for block in blocks]
    return [numbered(".", loose), *parts]


def _pictured(path: Path, root: Path) -> Iterator[Item]:
    """The item of a file, if it is an image: its folder is its page."""
    if path.suffix.lower() in PICTURES:
        place = path.relative_to(root)
        yield Item(str(place.parent), str(place), functools.partial(open_image, path))


def shard_parts(paths: list[Path], page: str = "page_url") -> list[Part]:
    """One part for each tar, whose places are bytes; as `shard_items` otherwise."""
    return [
        Part(path.name, functools.partial(_shard, path, page, number == 0))
        for number, path in enumerate(paths)
    ]


def shard_items(paths: list[Path], page: str = "page_url") -> Iterator[Item | None]:
    """The samples of tar shards `00000.tar` with `{key}.jpg`, `{key}.json`, `{key}.txt`.

    page: the column of the json that says where an image is from; give img2dataset
    `--save_additional_columns '["page_url"]'`. A label works too: its images are then a page.
    Members are streamed, never extracted. Raises GuidekitError if the first json lacks the column.
    """
    for part in shard_parts(paths, page):
        for item, _ in part.items(0):
            yield item


def _shard(path: Path, page: str, check: bool, place: int) -> Iterator[tuple[Item | None, int]]:
    """The samples of a tar from a byte on. check: the first json must have the page's column."""
    for key, parts, after in _samples(path, place):
        table = _table(parts or {})
        if table and check and page not in table:
            columns = ", ".join(sorted(table))
            raise GuidekitError(f"{path}: {key}.json lacks {page!r}; it has {columns}")
        check = check and not table
        yield None if parts is None else _item(path, key, parts, table.get(page)), after


def _samples(path: Path, place: int) -> Iterator[tuple[str, dict[str, bytes] | None, int]]:
    """Keys and members of one shard from a byte on, and the byte after each.

    (name, None, ...) where the tar is damaged. Of a tar that is sorted by extension places are
    numbers of samples.
    """
    if is_scattered(path):
        yield from scattered_samples(path, place, READ.__contains__)
        return
    key, parts, end = "", {}, path.stat().st_size
    if place and place >= end:
        return
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=_seek(file, place), mode="r|") as tar:
            for member in tar:
                stem, kind = split_name(member.name)
                if not member.isfile() or member.size > MOST_MEMBER:
                    continue
                if stem != key and parts:
                    yield key, parts, place + member.offset
                    parts = {}
                key = stem
                wanted = kind in READ
                parts[kind if wanted else ""] = tar.extractfile(member).read() if wanted else b""
            whole = ended(path, place + tar.offset)
            end = place + tar.offset if whole else end
    except Exception:  # tarfile passes on what a header makes it meet: ValueError, RecursionError
        whole = False
    if parts:
        yield key, parts, end
    if not whole:
        yield str(path), None, end


def _seek(file: BinaryIO, place: int) -> BinaryIO:
    """The file at a place."""
    file.seek(place)
    return file


def _table(parts: dict[str, bytes]) -> dict:
    """What the json beside an image says; nothing if it is no object."""
    try:
        table = parse_json(parts.get("json", b"{}"))
    except ValueError:
        return {}
    return table if isinstance(table, dict) else {}


def _item(path: Path, key: str, parts: dict[str, bytes], page: object) -> Item | None:
    """A sample as an item; None if it has no image or no page (null, empty or not a number)."""
    picture = next((parts[e[1:]] for e in PICTURES if e[1:] in parts), None)
    if picture is None or page is None or page == "" or page != page:
        return None
    caption = parts.get("txt", b"").decode("utf-8", "replace")
    return Item(str(page), f"{path.name}/{key}", lambda: open_image(io.BytesIO(picture)), caption)


def scene_items(
    pages: int,
    per_page: int,
    size: int,
    split: str = "train",
    polluted: float = 0.0,
    without: tuple[str, ...] = (),
    first: int = 0,
) -> Iterator[Item]:
    """Pages of scenes: one background and set of objects, places and sizes that vary.

    polluted: share of the images that are of some other page, as web pages have them. without:
    objects such as `red circle` whose pages are left out. first: number of the first page.
    """
    for number in _without(range(first, first + pages), split, without):
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
    pages: int,
    per_page: int,
    size: int,
    split: str = "train",
    without: tuple[str, ...] = (),
    first: int = 0,
) -> Iterator[Item]:
    """The same scenes grouped by a label instead: the first object's shape and colour."""
    numbers = range(first * per_page, (first + pages) * per_page)
    for number in _without(numbers, split, without):
        plan = scenes.scene(number, split)
        yield Item(
            plan.things[0].phrase,
            f"{split}-{number}",
            functools.partial(_drawn, plan, size),
            plan.caption,
        )


def scene_parts(
    pages: int, per_page: int, size: int, each: int = 1000, labelled: bool = False, **options
) -> list[Part]:
    """Scenes in parts of `each` pages; options as of `scene_items` or `labelled_scene_items`."""
    make = labelled_scene_items if labelled else scene_items
    return [
        numbered(
            f"pages {first}",
            functools.partial(
                make, min(each, pages - first), per_page, size, first=first, **options
            ),
        )
        for first in range(0, pages, each)
    ]


def _without(numbers: range, split: str, phrases: tuple[str, ...]) -> Iterator[int]:
    """The numbers of the scenes that hold none of the objects."""
    for number in numbers:
        if not any(thing.phrase in phrases for thing in scenes.scene(number, split).things):
            yield number


def _drawn(plan: scenes.Scene, size: int) -> Image.Image:
    return Image.fromarray(scenes.draw(plan, size)[0])
