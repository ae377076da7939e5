"""Files that were right, changed at random: they are read, or refused in one line, and no more.

The changes follow from a seed, so that a failure comes again. GUIDEKIT_FUZZ is the number of
seconds for each kind, 1 by default; an hour finds more.
"""

import copy
import io
import json
import os
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from corpus import PATHS, deep, write
from corpus_pictures import encoded
from corpus_shards import PAGE, tar
from corpus_texts import RECIPE
from corpus_weights import head
from guidekit.cli.settings import make_settings, read_config
from guidekit.heads.data import read_examples
from guidekit.heads.head import load_head
from guidekit.images import read_image
from guidekit.layouts import load_layout
from guidekit.semantica.data import _decode
from guidekit.semantica.sources import shard_items
from guidekit.system.untrusted import check_clip, check_weights, printable
from guidekit.train.recipe import read_recipe
from guidekit.zoo.shipped import ZOO

SECONDS = float(os.environ.get("GUIDEKIT_FUZZ", "1"))
VALUES = (
    None,
    True,
    0,
    -1,
    2**31,
    2**63,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "\0",
    "\ud800",
    "\x1b[2J",
    "hf-hub:a/b",
    [],
    {},
    [[]],
    [None],
    {"": 0},
    *PATHS,
    ["a"] * 1000,
)
Read = Callable[[Path], object]


def bytes_changed(data: bytes, chance: random.Random) -> bytes:
    """The bytes with up to eight places changed, cut out, doubled or filled."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        place = chance.randrange(len(changed) + 1)
        end = min(len(changed), place + chance.choice((1, 1, 2, 4, 16, 256)))
        part = bytes(changed[place:end])
        noise = chance.choice((chance.randbytes(len(part)), b"\xff" * len(part), b"\0" * len(part)))
        changed[place:end] = chance.choice((noise, noise, b"", part * 2, b"[" * 50))
    return bytes(changed)


def json_changed(table: object, chance: random.Random) -> object:
    """The table with up to three of its values, at any depth, put in place of others."""
    table = copy.deepcopy(table)
    for _ in range(chance.randint(1, 3)):
        at, keys = table, []
        while isinstance(at, dict | list) and at:
            keys = list(at) if isinstance(at, dict) else range(len(at))
            parent, key = at, chance.choice(keys)
            at = at[key]
            if chance.random() < 0.4:
                break
        if not keys:
            return chance.choice(VALUES)
        parent[key] = copy.deepcopy(chance.choice(VALUES))
        if isinstance(parent, dict) and chance.random() < 0.2:
            parent[chance.choice(("more", "auto_map", "__class__", ""))] = parent.pop(key)
    return table


def run(changed: Callable[[random.Random], Path], read: Read, seed: int = 0) -> int:
    """Reads changed files for SECONDS; returns how many were refused. Other errors come through."""
    ends, refused = time.monotonic() + SECONDS, 0
    while time.monotonic() < ends:
        seed += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(changed(random.Random(seed)))
        except (ValueError, OSError) as error:
            refused += 1
            assert str(error)
            assert len(printable(error)) < 20_000
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    return refused


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_pictures(inbox, kind):
    data = encoded(kind, (24, 16))

    def changed(chance):
        return write(inbox / "a.png", bytes_changed(data, chance))

    assert run(changed, lambda path: read_image(path, (8, 8)))


def test_weights(inbox):
    data = (head(inbox) / "head.safetensors").read_bytes()
    assert run(lambda c: write(inbox / "a.safetensors", bytes_changed(data, c)), check_weights)


def test_heads(inbox):
    table = json.loads((head(inbox) / "head.json").read_text())

    def changed(chance):
        if chance.random() < 0.2:
            return write(
                inbox / "head.json", bytes_changed(json.dumps(table).encode(), chance)
            ).parent
        return write(inbox / "head.json", json.dumps(json_changed(table, chance))).parent

    assert run(changed, load_head)


def test_recipes(inbox):
    text = (ZOO / "scenes.toml").read_bytes() + RECIPE.encode()
    assert run(lambda c: write(inbox / "r.toml", bytes_changed(text, c)), read_recipe)


def test_settings(inbox):
    run_json = {
        "sample": {"model": "scenes", "prompt": "a", "seeds": [0, 1], "steps": 3, "cfg": 2.0},
        "plugin": {"zest": {"scale": 1.0}},
        "segment": [{"phrase": "a", "box": [0, 0, 1, 1]}],
        "record": {"versions": {"torch": "2"}},
    }

    def changed(chance):
        return write(inbox / "run.json", json.dumps(json_changed(run_json, chance)))

    assert run(changed, lambda path: make_settings(read_config(path), {}))


def test_layouts(inbox):
    write(inbox / "m.png", encoded("PNG", mode="L"))
    layout = {
        "prompt": "a fox",
        "label": 1,
        "map": "m.png",
        "segments": [
            {"phrase": "fox", "mask": "m.png", "strength": 1.0},
            {"phrase": "a", "box": [0, 0, 1, 1]},
            {"phrase": "a", "value": 0},
        ],
    }

    def changed(chance):
        return write(inbox / "l.json", json.dumps(json_changed(layout, chance)))

    assert run(changed, load_layout)


def test_tables(inbox):
    for name in "ab":
        write(inbox / f"{name}.png", encoded("PNG"))
    rows = b"file_name,label\na.png,x\nb.png,y;x\n"
    assert run(
        lambda c: write(inbox / "labels.csv", bytes_changed(rows, c)),
        lambda path: read_examples(path, (8, 8)),
    )


def test_clip_configs(inbox):
    config = json.loads((ZOO / "scenes-clip/open_clip_config.json").read_text())

    def changed(chance):
        return json_changed(config, chance)

    assert run(changed, lambda table: check_clip(table, "config"))


def test_shards(inbox):
    """No error at all: what cannot be read is counted, and the next sample is read."""
    members = [
        (f"{i}.{e}", d) for i in range(3) for e, d in (("jpg", encoded("JPEG")), ("json", PAGE))
    ]
    data = tar(inbox / "0.tar", members).read_bytes()
    seen = []

    def read(path):
        try:
            seen.extend(_decode(item, (8, 8)) for item in shard_items([path]))
        except ValueError as error:
            assert "lacks 'page_url'" in str(error)  # the first json is changed

    run(lambda c: write(inbox / "0.tar", bytes_changed(data, c)), read)
    assert None in seen
    assert any(item is not None for item in seen)


def test_the_changes_are_those_of_the_seed():
    first, again = (bytes_changed(b"abc" * 99, random.Random(3)) for _ in range(2))
    assert first == again != b"abc" * 99
    assert Image.open(io.BytesIO(encoded("PNG"))).size == (8, 8)
    assert deep(2) == "[["
