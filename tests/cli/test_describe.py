"""`doctor`, `plugins show` and the words of the command line."""

import json
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from guidekit.__main__ import main
from guidekit.cli import doctor
from guidekit.cli.describe import describe_plugin, plugin_text
from guidekit.cli.sample import sample
from guidekit.cli.settings import Settings, dump, sample_keys
from guidekit.registry import Registry, entries
from guidekit.worlds import digits
from guidekit.zoo import shipped as integrity

NAMES = [entry.name for entry in entries() if entry.first_party]
QUICK = ("cfg", "clip", "fewshot", "pag", "pww", "zest")  # examples run in the tier `fast`


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_doctor_tries_what_it_says():
    result = run("doctor", "--json")
    facts = json.loads(result.stdout)
    assert facts["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert facts["attention"]["eager"] == facts["attention"]["sdpa"] == "works"
    assert facts["devices"][0] == "cpu"
    assert facts["models"]["scenes"] == "intact, loads"
    assert facts["healthy"]
    assert result.exit_code == 0
    assert "model         scenes: intact, loads" in doctor.doctor_text(facts)


def test_doctor_runs_every_implementation(monkeypatch):
    from guidekit.attention import call as attention

    assert doctor.tried("sdpa") == "works"
    right = attention._ATTEND["sdpa"]

    def wrong(*args):
        out, maps = right(*args)
        return 2 * out, maps

    def broken(*args):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setitem(attention._ATTEND, "sdpa", wrong)
    assert doctor.tried("sdpa").startswith("wrong: it differs from eager attention by")
    monkeypatch.setitem(attention._ATTEND, "sdpa", broken)
    assert doctor.tried("sdpa") == "fails: no kernel image"


def test_the_list_of_hashes_is_that_of_the_models():
    """After a change of a built-in model: python -m guidekit.zoo.shipped."""
    assert integrity.shipped_hashes() == integrity.file_hashes()
    assert set(integrity.damages().values()) == {""}
    assert not [p for p in integrity.ZOO.rglob("*.json") if '"_name_or_path": "/' in p.read_text()]


def test_the_built_in_models_stay_small_together():
    size = sum(file.stat().st_size for file in integrity.ZOO.rglob("*") if file.is_file())
    assert size < 60 * 2**20


def test_damaged_models_are_named_with_the_repair(tmp_path, monkeypatch):
    zoo = tmp_path / "zoo"
    shutil.copytree(integrity.ZOO, zoo)
    weights = zoo / "scenes/unet/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1  # it still loads
    weights.write_bytes(data)
    (zoo / "scenes-judge/config.json").unlink()
    (zoo / "stray").mkdir()
    found = integrity.damages(zoo)
    assert "unet/diffusion_pytorch_model.safetensors is damaged" in found["scenes"]
    assert "config.json is missing; reinstall guidekit" in found["scenes-judge"]
    assert found["stray"].startswith("its hashes were not shipped")
    shutil.rmtree(zoo / "scenes")
    assert "model_index.json is missing" in integrity.damages(zoo)["scenes"]
    monkeypatch.setattr(integrity, "damages", lambda: found)
    result = run("doctor")
    assert result.exit_code == 1
    assert "scenes: unet/diffusion_pytorch_model.safetensors is damaged; reinstall" in result.stdout


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in NAMES]
)
def test_the_example_of_every_plugin_runs(name, model, tmp_path, monkeypatch):
    """As it is printed; on a tiny model where the words name none."""
    monkeypatch.chdir(tmp_path)
    facts = describe_plugin(name)
    assert facts["guidances"]
    for guidance in facts["guidances"]:
        text, _, before = guidance["example"].partition("  # after ")
        program, *words = shlex.split(text)
        assert program == "guidekit"
        assert "random" not in text  # what nobody trained shows nothing
        if before:
            prepare(shlex.split(before)[1:])
        small = ("--steps", 2, "--seeds", 0, "--no-compare", "--json")
        own = () if "--model" in words else ("--model", model)
        result = run(*words, *own, *small)
        assert result.exit_code == 0, result.stderr
        ran = json.loads(result.stdout)
        assert list(ran["plugin"]) == [guidance["name"]]
        assert ran["record"]["finished"] == [0]


def prepare(words):
    """Runs the command that an example comes after: `fit` with a few digits, or a few pairs."""
    if "readout" in words:
        for part in ("images", "targets"):
            (Path(words[1]) / part).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (8, 8), 60 * i).save(Path(words[1]) / part / f"{i}.png")
        words = [*words, "--iterations", "2"]
    else:
        digits.write_shots(words[1], 2)
    result = run(*words)
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_plugin_is_explained(name):
    facts = describe_plugin(name)
    text = plugin_text(facts)
    for guidance in facts["guidances"]:
        assert guidance["about"]
        assert guidance["paper"] in text
        assert guidance["example"] in text
        for option in guidance["options"]:
            comment = option["comment"]
            assert comment, option
            assert "\n" not in comment, option
            assert comment in text, option
            assert option["default"] is not None or "none" in comment, option


def test_flag_field_and_key_are_one_word():
    """--append-phrases, Settings.append_phrases, [sample] append_phrases, the key of run.json."""
    own = {"config", "quiet", "as_json", "traceback", "plugin", "no_plugin", "set", "segment"}
    own |= {"control", "grid"}
    own |= {"plan", "count", "block", "form", "shard"}  # of plans of blocks: fields of BlockPlan
    options = {option.name: option for option in sample.params if isinstance(option, click.Option)}
    assert set(options) - own == set(sample_keys())
    for name in set(options) - own:
        assert options[name].opts == [f"--{name.replace('_', '-')}"]
    assert set(dump(Settings())["sample"]) == set(sample_keys()) - {"out", "layout"}
    assert set(dump(Settings())) == {"sample", "plugin", "segment", "control"}


def test_options_of_plugins_are_one_word_in_flag_toml_and_run_json(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--model", model, "--steps", 1, "--seeds", 0, "--no-compare", "--json")
    (tmp_path / "run.toml").write_text("[plugin.seg]\nscale = 1.5\nblur = 2.0\n")
    flags = ("--plugin", "seg", "--set", "seg.scale=1.5", "--set", "seg.blur=2")
    runs = [
        json.loads(run("sample", *words, *more).stdout)["plugin"]
        for more in (flags, ("--config", "run.toml"))
    ]
    assert runs[0] == runs[1]
    assert set(runs[0]["seg"]) == {
        option["option"] for option in describe_plugin("seg")["guidances"][0]["options"]
    }
    made = Registry().make_guidance("seg", runs[0]["seg"])
    options = {name: getattr(made, name) for name in runs[0]["seg"]}
    assert json.loads(json.dumps(options)) == runs[0]["seg"]


def test_what_to_try_next_can_be_tried(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--model", model, "--steps", 1, "--seeds", 0, "--no-compare", "--out", "o")
    text = run("sample", "--plugin", "apg", *words).stdout
    assert "next     guidekit sample --config o/run.json --seeds 1  # other seeds" in text


def cpu_seconds(*args):
    """Processor time of a Python process, which a busy machine hardly changes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *args], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("args", [["--help"], ["sample", "--help"], ["plugins"]])
def test_help_costs_little_over_python_itself(args):
    bare = min(cpu_seconds("-c", "pass") for _ in range(2))
    assert min(cpu_seconds("-m", "guidekit", *args) for _ in range(2)) - bare < 0.3
