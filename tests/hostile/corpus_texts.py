"""Recipes, settings, layouts and tables of labels."""

import json

from corpus import EPS, NAMES, PATHS, Make, deep, file
from corpus_pictures import BOMB, pipe

RECIPE = 'model = "m"\nsize = 16\n[[stage]]\ntask = "vae"\nsteps = 1\n'


def _recipe(old: str = "", new: str = "", more: str = "") -> Make:
    return file("r.toml", (RECIPE.replace(old, new) if old else RECIPE) + more)


RECIPES: dict[str, Make] = {
    **{f"model {name!r}": _recipe('"m"', json.dumps(name)) for name in NAMES},
    **{f"stage {name!r}": _recipe(more=f"name = {json.dumps(name)}\n") for name in NAMES},
    "name of 300 letters": _recipe(more=f'name = "{"a" * 300}"\n'),
    "model is a table": _recipe('"m"', "{}"),
    "task is a list": _recipe('"vae"', "[1]"),
    "task is a module": _recipe('"vae"', '"os"'),
    "unknown option": _recipe(more='__class__ = "x"\n'),
    "endless size": _recipe("16", "1e999"),
    "deep": file("r.toml", "a = " + deep()),
    "no utf-8": file("r.toml", b"\xff"),
    "binary": file("r.toml", bytes(range(256))),
    "a folder": lambda folder: folder,
}

SETTINGS: dict[str, Make] = {
    "deep": file("run.json", deep()),
    "deep toml": file("run.toml", "a = " + deep()),
    "a list": file("run.json", "[]"),
    "no utf-8": file("run.json", b"\xff"),
    "unknown table": file("run.json", {"__class__": {}}),
    "unknown key": file("run.json", {"sample": {"exec": "x"}}),
    "plugin is a list": file("run.json", {"plugin": [1]}),
    "plugin's options are a text": file("run.json", {"plugin": {"zest": "x"}}),
    "segments are an object": file("run.json", {"segment": {}}),
    "record is a list": file("run.json", {"record": []}),
    "endless seeds": file("run.json", {"sample": {"seeds": "0-99999999999"}}),
    "steps of many digits": file("run.json", '{"sample": {"steps": ' + "9" * 10**4 + "}}"),
    "steps are not whole": file("run.json", {"sample": {"steps": 1.5}}),
}


def _layout(*beside: Make, **keys) -> Make:
    return file("l.json", {"prompt": "a fox", "segments": [{"phrase": "fox"} | keys]}, *beside)


def _long_box() -> str:
    return '{"segments": [{"phrase": "x", "box": [0, 0, 1, ' + "9" * 4000 + "]}]}"


LAYOUTS: dict[str, Make] = {
    **{f"mask {name!r}": _layout(mask=name) for name in (*PATHS, "", "\0")},
    **{f"map {name!r}": file("l.json", {"map": name}) for name in (*PATHS, "\0")},
    "mask is postscript": _layout(file("m.png", EPS), mask="m.png"),
    "mask is a bomb": _layout(file("m.png", BOMB), mask="m.png"),
    "mask is a pipe": _layout(pipe, mask="a.png"),
    "box of texts": _layout(box=["0", "0", "1", "1"]),
    "box of many digits": file("l.json", _long_box()),
    "deep": file("l.json", deep()),
    "a number": file("l.json", "1"),
    "segments are a text": file("l.json", {"segments": "x"}),
}


def _table(*names: str, beside: tuple[Make, ...] = ()) -> Make:
    rows = "".join(f"{name},{label}\n" for name in names for label in "ab")
    return file("labels.csv", f"file_name,label\n{rows}", *beside)


TABLES: dict[str, Make] = {
    **{f"file {name!r}": _table(name) for name in PATHS},
    "no rows": file("labels.csv", ""),
    "postscript": _table("a.png", beside=(file("a.png", EPS),)),
    "a bomb": _table("a.png", beside=(file("a.png", BOMB),)),
    "a pipe": _table("a.png", beside=(pipe,)),
    "deep": file("metadata.jsonl", deep()),
    "rows are lists": file("metadata.jsonl", "[1]\n[2]\n"),
}
