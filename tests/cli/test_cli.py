"""The command line with a tiny real model: what it writes, and what it says when it fails."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from commands import PROMPT, SEGMENTS, draw, fails, pictures
from guidekit.cli.train import next_step
from plans import run


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_help_is_quick_and_needs_no_torch():
    code = (
        "import sys\nfrom guidekit.__main__ import main\n"
        "try:\n    main(['sample', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"
    assert "--append-phrases" in out.stdout


def test_a_guided_run(model, tmp_path):
    result = draw(model, "--plugin", "zest", "--seeds", "0-2", "--batch", 2)
    assert re.search(r"^sites    zest: \d+ from \S+ to \S+$", result.stdout, re.MULTILINE)
    line = r"^energy   zest \S+ -> \S+, change \S+ of the model's output$"
    assert re.search(line, result.stdout, re.MULTILINE)
    line = r"^inside   .+ \d+% of the last attention inside its mask$"
    assert re.search(line, result.stdout, re.MULTILINE)
    assert (
        "look at  o/index.html\nnext     guidekit sample --config o/run.json --seeds 3-5  # other"
        in result.stdout
    )
    out = tmp_path / "o"
    names = set(pictures(out))
    assert names == {
        *(f"{folder}{seed}.png" for folder in ("", "unguided/", "overlay/") for seed in range(3)),
        *(f"attention/{seed}-{segment}.png" for seed in range(3) for segment in range(2)),
    }
    assert (out / "index.html").is_file()
    record = json.loads((out / "run.json").read_text())["record"]
    assert record["status"] == "finished"
    assert record["finished"] == [0, 1, 2]
    assert record["tokens"][0]["tokens"] == ["red</w>", "circle</w>"]
    assert all("attn2" in site for site in record["sites"]["zest"])
    assert [len(row["energy"]) for row in record["account"]] == [3]
    assert len(record["model"]["hash"]) == 64
    assert record["versions"]["torch"]


def test_guided_and_unguided_pictures_differ(model, tmp_path):
    draw(model, "--plugin", "zest", "--seeds", 0)
    files = pictures(tmp_path / "o")
    assert (
        Image.open(tmp_path / "o/0.png").tobytes()
        != Image.open(tmp_path / "o/unguided/0.png").tobytes()
    )
    assert len(files) == 5


def test_no_plugin_draws_what_the_bare_pipeline_draws(model, tmp_path):
    draw(model, "--seeds", 3, "--cfg", 5)
    pipe = tiny.sd_pipeline()
    generator = torch.Generator().manual_seed(3)
    image = pipe(PROMPT, num_inference_steps=2, guidance_scale=5.0, generator=generator).images[0]
    assert np.array_equal(np.array(image), np.array(Image.open(tmp_path / "o/3.png")))
    assert not (tmp_path / "o/unguided").exists()


def test_nothing_is_overwritten(model, tmp_path):
    draw(model, "--seeds", 0)
    before = pictures(tmp_path / "o")
    draw(model, "--seeds", 0)
    assert pictures(tmp_path / "o") == before
    assert (tmp_path / "o-2/0.png").is_file()


def test_the_example_needs_no_options(model):
    result = run("sample", "--model", model, "--steps", 1, "--seeds", 0, "--plugin", "zest")
    assert result.exit_code == 0, result.stderr
    assert "a cake, a glass and a lemon on a blue background" in result.stdout
    assert "wrote    out/20" in result.stdout


def test_json_is_one_object(model):
    result = draw(model, "--plugin", "zest", "--seeds", 0, "--json")
    run = json.loads(result.stdout)
    assert run["folder"] == "o"
    assert run["plugin"]["zest"]["scale"] == 1.0
    assert draw(model, "--seeds", 0, "--quiet").stdout == ""


def test_missing_phrases_can_be_appended(model):
    args = ("--append-phrases", "--json", "--seeds", 0)
    run = json.loads(draw(model, *args, segments=("green circle=0,0,1,1",)).stdout)
    assert run["sample"]["prompt"] == f"{PROMPT} green circle"


def test_a_layout(model, tmp_path):
    layout = {"prompt": PROMPT, "segments": [{"phrase": "red circle", "box": [0, 0, 0.5, 1]}]}
    (tmp_path / "l.json").write_text(json.dumps(layout))
    args = ("--model", model, "--layout", "l.json", "--steps", 1, "--seeds", 0, "--json")
    result = run("sample", *args)
    assert json.loads(result.stdout)["segment"][0]["box"] == [0, 0, 0.5, 1]


def test_a_toml_file(model, tmp_path):
    (tmp_path / "sub").mkdir()
    Image.new("L", (4, 4), 255).save(tmp_path / "sub/all.png")
    (tmp_path / "sub/run.toml").write_text(
        f'[sample]\nmodel = "{model}"\nprompt = "{PROMPT}"\nsteps = 2\nseeds = [1]\nout = "here"\n'
        '[plugin.zest]\nstop = 1.0\n[[segment]]\nphrase = "red circle"\nmask = "all.png"\n'
    )
    result = run("sample", "--config", "sub/run.toml")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "sub/here/masks/0-red-circle.png").is_file()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--plugin", "nope"], "no plugin 'nope'; there are"),
        (
            ["--plugin", "zest", "--set", "zest.scal=2"],
            "zest has no option 'scal' (the nearest is scale); it has: scale",
        ),
        (["--plugin", "zest", "--set", "zest.scale=nan"], "zest.scale must be a finite number"),
        (["--plugin", "zest", "--set", "zest.scale=big"], "zest.scale must be a number"),
        (["--plugin", "zest", "--no-plugin", "zest"], "blocked by --no-plugin"),
        (["--set", "zest.scale=2"], "add --plugin zest"),
        (["--scheduler", "magic"], "no scheduler 'magic'; there are ddim"),
        (["--scheduler", "euler", "--eta", "1"], "has no eta"),
        (["--attention", "magic"], "no attention implementation 'magic'"),
        (["--steps", "0"], "steps must be at least 1, not 0"),
        (["--steps", "many"], "'many' is not a valid integer"),
        (["--cfg", "nan"], "cfg must be a finite number"),
        (["--seeds", "3-1"], "write a range such as 0-7"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--height", "30"], "multiples of 8"),
        (["--dtype", "int8"], "dtype must be one of float32"),
        (["--device", "magic"], "no device 'magic'; there are cpu"),
        (["--memory", "much"], "memory must be one of fast, low"),
        (["--segment", "green star=0,0,1,1"], "phrase 'green star' does not occur in the prompt"),
        (["--segment", "red circle=0.5,0,0.1,1"], "0 <= left < right <= 1"),
        (["--segment", "red circle=gone.png"], "mask gone.png: no such file"),
        (["--segment", "red circle=empty.png"], "the mask is empty"),
        (["--segment", "red circle=text.png"], "not a readable image"),
        (["--segment", "red circle"], "write PHRASE=MASK.png"),
        (["--layout", "gone.json"], "layout gone.json: no such file"),
        (["--layout", "text.png"], "not a readable JSON file"),
        (["--config", "gone.toml"], "config gone.toml: no such file"),
        (["--out", "text.png/o"], "output folder text.png/o: "),
        (["--out", "/proc/o"], "output folder /proc/o: "),
        (["--nonsense"], "No such option"),
    ],
)
def test_bad_input_of_sample(model, tmp_path, args, text):
    Image.new("L", (4, 4)).save(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("no image")
    result = run("sample", "--model", model, "--prompt", PROMPT, "--steps", 1, "--seeds", 0, *args)
    fails(result, text)
    assert not list(tmp_path.glob("out/*/*"))


def test_segments_without_a_prompt(model):
    fails(run("sample", "--model", model, "--segment", SEGMENTS[0]), "give --prompt")


def test_a_plugin_without_segments(model):
    args = ("--model", model, "--prompt", PROMPT, "--plugin", "zest")
    fails(run("sample", *args), "zest needs segments")


def test_models_that_cannot_be_loaded(model, tmp_path):
    fails(run("sample", "--model", "nope"), "no model 'nope'")
    (tmp_path / "bare").mkdir()
    fails(run("sample", "--model", "bare"), "has no model_index.json")
    for name, change in (("damaged", _damage), ("pickled", _pickle)):
        folder = tmp_path / name
        folder.mkdir()
        for path in model.rglob("*"):
            target = folder / path.relative_to(model)
            target.mkdir() if path.is_dir() else os.link(path, target)
        change(folder / "unet/diffusion_pytorch_model.safetensors")
    fails(run("sample", "--model", "damaged"), "is damaged")
    fails(run("sample", "--model", "pickled"), "is a pickle")
    assert not list(tmp_path.glob("out/*"))


def _damage(weights):
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data[: len(data) // 2])


def _pickle(weights):
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(b"")


def interrupt(monkeypatch, after: int, error: BaseException):
    """Makes the scheduler's step number `after` raise."""
    from guidekit.sampler import Sampling

    step, count = Sampling._scheduler_step, iter(range(1000))

    def counting(self, *args):
        if next(count) == after:
            raise error
        return step(self, *args)

    monkeypatch.setattr(Sampling, "_scheduler_step", counting)


def stopped(model, *args):
    """A run of three batches of one image and two steps."""
    words = ("--prompt", PROMPT, "--steps", 2, "--seeds", "0-2", "--batch", 1, "--out", "o")
    return run("sample", "--model", model, *words, *args)


def test_ctrl_c_keeps_what_is_finished(model, tmp_path, monkeypatch):
    interrupt(monkeypatch, 5, KeyboardInterrupt())
    fails(stopped(model), "stopped: 2 finished images are in o", code=130)
    assert set(pictures(tmp_path / "o")) == {"0.png", "1.png"}
    record = json.loads((tmp_path / "o/run.json").read_text())["record"]
    assert record["status"] == "stopped"
    assert record["finished"] == [0, 1]
    assert (tmp_path / "o/index.html").is_file()


def test_ctrl_c_while_the_model_is_loaded(model, tmp_path, monkeypatch):
    from guidekit.cli import models

    def load(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load_model", load)
    fails(stopped(model), "stopped", code=130)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("json_", [(), ("--json",)])
def test_a_failure_in_a_later_batch(model, tmp_path, monkeypatch, json_):
    from guidekit.errors import NonFiniteError

    interrupt(monkeypatch, 3, NonFiniteError("gradient of zest is not finite"))
    fails(stopped(model, *json_), "not finite; 1 finished image is in o")
    assert set(pictures(tmp_path / "o")) == {"0.png"}
    assert json.loads((tmp_path / "o/run.json").read_text())["record"]["status"] == "failed"


def test_too_little_memory_names_the_remedy(model, monkeypatch):
    interrupt(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory.\nmuch more"))
    fails(stopped(model), "try --batch 1 or --memory low (CUDA out of memory.)")


def test_rejected_pictures_are_drawn_again(model, tmp_path, monkeypatch):
    from guidekit import Guidance

    monkeypatch.setattr(Guidance, "accept", lambda self, images: torch.zeros(len(images)) > 0)
    draw(model, "--plugin", "zest", "--seeds", 0, "--tries", 2, "--no-compare")
    record = json.loads((tmp_path / "o/run.json").read_text())["record"]
    assert "no try was accepted for seeds [0]" in record["notes"][0]
    assert len(record["account"][0]["seeds"]) == 2


def test_plugins_are_listed():
    result = run("plugins")
    assert result.exit_code == 0
    assert "first-party" in result.stdout
    names = [entry["name"] for entry in json.loads(run("plugins", "--json").stdout)["plugins"]]
    assert {"cfg", "multidiffusion", "pww", "zest"} <= set(names)


def test_a_plugin_is_shown():
    text = run("plugins", "show", "zest").stdout
    assert "arXiv:2306.13754" in text
    assert "keeps the logarithms finite" in text
    assert "fraction of the steps, from the noisy end" in text  # an inherited option
    facts = json.loads(run("plugins", "show", "zest", "--json").stdout)
    options = {o["option"]: o for o in facts["guidances"][0]["options"]}
    assert options["top"]["default"] == 20
    assert options["top"]["type"] == "a whole number"
    assert all(option["comment"] for option in options.values())
    fails(run("plugins", "show", "nope"), "no plugin 'nope'")


def test_commands_of_a_plugin_are_imported_when_named(monkeypatch):
    import click

    from guidekit import registry

    named = []

    def commands(self, name):
        named.append(name)
        return [click.Command("zest", callback=lambda: click.echo("hello"))]

    monkeypatch.setattr(registry.Registry, "commands", commands)
    assert "doctor" in run("--help").stdout
    assert named == []
    assert run("zest").stdout == "hello\n"
    assert named == ["zest"]


def test_unknown_commands_and_recipes():
    fails(run("nope"), "No such command 'nope'")
    fails(run("zest"), "plugin 'zest' adds no command")
    fails(run("train", "nope"), "no recipe nope; there are")
    fails(run("train", "scenes", "--set", "nope=1"), "no option 'nope'; there are")
    fails(run("train", "scenes", "--set", "steps"), "write OPTION=VALUE, such as steps=100")
    assert run().exit_code == 0
    assert "sample" in run().stdout


def test_a_trained_model_names_what_it_is_for(tmp_path):
    for file, words in (
        ("model_index.json", f"guidekit sample --model {tmp_path}"),
        ("noisy_clip.json", f"guidekit sample --plugin clip --set clip.encoder={tmp_path}"),
    ):
        (tmp_path / file).write_text("{}")
        assert next_step(tmp_path) == f"\nnext     {words}"
        (tmp_path / file).unlink()
    assert next_step(tmp_path) == ""
    (tmp_path / "model_index.json").write_text('{"_class_name": "SemanticaPipeline"}')
    assert next_step(tmp_path).endswith("--plugin semantica --image IMAGE")
