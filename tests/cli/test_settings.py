"""Settings from flags, TOML files and run.json: the same words, and one kind of error."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guidekit.cli.settings import Settings, dump, make_settings, read_config, sample_keys
from guidekit.errors import GuidekitError
from guidekit.layouts import load_layout, parse_layout
from guidekit.options import convert, parse_setting
from guidekit.seeds import Seeds

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(["phrase", "box", "mask", "value", "strength", "prompt", "negative", "x"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zest.scale=2", ("zest", "scale", 2)),
        ("zest.loss=mse", ("zest", "loss", "mse")),
        ('zest.loss="mse"', ("zest", "loss", "mse")),
        ("zest.resolutions=32,16", ("zest", "resolutions", "32,16")),
        ("acme.fast.on=true", ("acme.fast", "on", True)),
        ("acme.name=0.10", ("acme", "name", "0.10")),
        ("acme.name=", ("acme", "name", "")),
        ("acme.name=1\nb = 2", ("acme", "name", "1\nb = 2")),
    ],
)
def test_settings_of_plugins(text, expected):
    assert parse_setting(text) == expected


@pytest.mark.parametrize("text", ["zest", "zest=2", "scale=2", "=", ".a=1"])
def test_settings_of_another_form(text):
    with pytest.raises(GuidekitError, match="PLUGIN.OPTION=VALUE"):
        parse_setting(text)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-3", (0, 1, 2, 3)), ("0,3,9", (0, 3, 9)), ("7", (7,)), ("1, 4-5", (1, 4, 5))],
)
def test_seeds(text, seeds):
    assert Seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "3-1", "a", "1,,2", "-1", "1,1", "0-99999999", "1.5"])
def test_wrong_seeds(text):
    with pytest.raises(GuidekitError, match="seed"):
        Seeds(text)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("2e-1", float, 0.2),
        (2, float, 2.0),
        ("3", int, 3),
        (3.0, int, 3),
        (16, str, "16"),
        ("true", bool, True),
        (None, int | None, None),
        ("1,2", tuple[int, ...], (1, 2)),
        (1, tuple[int, ...], (1,)),
        ("a", Path, Path("base/a")),
    ],
)
def test_conversion(value, kind, expected):
    found = convert(value, kind, "x", Path("base"))
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind"),
    [("a", float), (2.5, int), (True, int), (1, bool), (None, int), ([1], str), ({}, float)],
)
def test_conversion_refuses(value, kind):
    with pytest.raises(GuidekitError, match="^x must be"):
        convert(value, kind, "x")


def write(folder: Path, text: str, name: str = "run.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_a_toml_file(tmp_path):
    path = write(
        tmp_path,
        '[sample]\nprompt = "a fox"\nseeds = "0-1"\nlayout = "l.json"\ncfg = 3\n'
        '[plugin.zest]\nscale = 2\n[[segment]]\nphrase = "fox"\nmask = "fox.png"\n',
    )
    settings = make_settings(read_config(path), {"cfg": 5, "set": ["zest.stop=1"]})
    assert settings.prompt == "a fox"
    assert settings.seeds == (0, 1)
    assert settings.cfg == 5.0
    assert settings.layout == tmp_path / "l.json"
    assert settings.folder == tmp_path
    assert settings.plugin == {"zest": {"scale": 2}}
    assert settings.changes == {"zest": {"stop": 1}}
    assert settings.segment == [{"phrase": "fox", "mask": "fox.png"}]


def test_a_place_by_flag_replaces_that_of_the_file(tmp_path):
    path = write(tmp_path, '[sample]\nlayout = "l.json"\n[[segment]]\nphrase = "fox"\n')
    settings = make_settings(read_config(path), {"segment": ["fox=0,0,1,1"]})
    assert settings.segment == ["fox=0,0,1,1"]
    assert settings.layout is None


def test_a_layout_by_flag_brings_its_own_texts(tmp_path):
    path = write(tmp_path, '[sample]\nprompt = "a fox"\nnegative = "snow"\n')
    settings = make_settings(read_config(path), {"layout": "l.json", "negative": "rain"})
    assert (settings.prompt, settings.negative) == (None, "rain")


def test_a_plugin_is_named_once():
    with pytest.raises(GuidekitError, match="given twice"):
        make_settings({}, {"plugin": ["zest", "zest"]})


def test_no_plugin_takes_a_plugin_of_the_file_out(tmp_path):
    path = write(tmp_path, "[plugin.zest]\n[plugin.pww]\n")
    assert list(make_settings(read_config(path), {"no_plugin": ["zest"]}).plugin) == ["pww"]


def test_a_model_folder_beside_the_file(tmp_path):
    (tmp_path / "mine").mkdir()
    path = write(tmp_path, '[sample]\nmodel = "mine"\n')
    assert make_settings(read_config(path), {}).model == str(tmp_path / "mine")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[sampel]", "no key 'sampel'; it has sample, plugin, segment"),
        ("[sample]\nstep = 3", "no key 'step'; it has model, prompt"),
        ('[sample]\nsteps = "many"', "steps must be a whole number"),
        ("[sample]\nseeds = [1, 1]", "twice"),
        ("sample = 3", "expected a table"),
        ("plugin = 3", "write a table"),
        ("segment = 3", "write a table"),
        ("[sample", "not a readable TOML"),
        ("[record]", "no key 'record'"),
    ],
)
def test_wrong_files(tmp_path, text, match):
    with pytest.raises(GuidekitError, match=match):
        read_config(write(tmp_path, text))


def test_options_of_a_plugin_that_was_not_named():
    with pytest.raises(GuidekitError, match="add --plugin zest"):
        make_settings({}, {"set": ["zest.scale=2"]})


def test_run_json_has_the_words_of_the_settings(tmp_path):
    tables = dump(Settings(prompt="a fox", seeds=(3, 4)))
    assert set(tables["sample"]) == set(sample_keys()) - {"out", "layout"}
    path = write(tmp_path, json.dumps(tables | {"record": {"anything": 1}}), "run.json")
    again = make_settings(read_config(path), {})
    assert dump(again) == tables


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_bytes_as_a_config(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(data)
    for file in (path, path.rename(path.with_suffix(".json"))):
        try:
            read_config(file)
        except ValueError:
            pass


@given(st.dictionaries(st.sampled_from(["sample", "plugin", "segment", "record"]), JSON))
def test_any_tables_as_a_config(tmp_path_factory, tables):
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_text(json.dumps(tables))
    try:
        make_settings(read_config(path), {})
    except ValueError:
        pass


@given(st.dictionaries(st.sampled_from(sorted(sample_keys())), JSON))
def test_any_values_of_sample(tmp_path_factory, sample):
    path = tmp_path_factory.getbasetemp() / "values.json"
    path.write_text(json.dumps({"sample": sample}))
    try:
        make_settings(read_config(path), {})
    except ValueError:
        pass


@given(JSON | st.fixed_dictionaries({"segments": st.lists(st.dictionaries(KEYS, JSON))}))
def test_any_object_as_a_layout(layout):
    try:
        parse_layout(layout, Path("/nowhere"), "layout")
    except ValueError:
        pass


@pytest.mark.parametrize("key", ["box", "strength"])
def test_numbers_beyond_a_float_in_a_layout(key):
    entry = {"phrase": "a", "box": [0, 0, 1, 1], "strength": 1}
    entry[key] = [0, 0, 1, 10**400] if key == "box" else 10**400
    with pytest.raises(GuidekitError, match=f"`{key}` must be"):
        parse_layout({"segments": [entry]}, Path(), "layout")


@given(st.binary(max_size=40))
def test_any_bytes_as_a_layout(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "layout.json"
    path.write_bytes(data)
    try:
        load_layout(path)
    except ValueError:
        pass


@pytest.mark.parametrize("value", [3, [0, 2], (0, 2), range(2), [1.0]])
def test_seeds_of_numbers(value):
    expected = tuple(value) if hasattr(value, "__iter__") else (value,)
    assert Seeds(value) == expected
    assert all(type(seed) is int for seed in Seeds(value))


@pytest.mark.parametrize("value", [1.5, [True], [float("nan")], [[1]], {"a": 1}, None, [2**63], []])
def test_values_that_are_no_seeds(value):
    with pytest.raises(GuidekitError, match="seeds"):
        Seeds(value)


@pytest.mark.parametrize(("text", "shown"), [("0-7", "0-7"), ("0,3,9", "0,3,9"), ("4", "4")])
def test_seeds_are_shown_as_people_write_them(text, shown):
    assert str(Seeds(text)) == shown
