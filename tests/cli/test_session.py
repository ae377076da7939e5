"""A run as plan, session and record: made once, honest in run.json, and never silent for long."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
)

import guidekit
import tiny
from guidekit.__main__ import main
from guidekit.cli.plan import make_plan
from guidekit.cli.session import Session
from guidekit.cli.settings import Settings, make_settings, read_config
from guidekit.cli.words import unknown_words
from guidekit.engine import evaluator
from guidekit.errors import GuidekitError
from guidekit.system.progress import Progress
from guidekit.worlds import scenes
from guidekit.zoo.shipped import ZOO

PROMPT = "a red circle and a blue square on white"
COUNTING = '''
"""Count: counts how often it is prepared."""

from dataclasses import dataclass

import guidekit

prepared = []


@dataclass(kw_only=True)
class Count(guidekit.Guidance):
    """Does nothing else."""

    def prepare(self, run):
        prepared.append(tuple(run.seeds))


@guidekit.hookimpl
def register_guidance(register):
    register("count", Count)
'''


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*args):
    """The result of a command given as words."""
    return CliRunner().invoke(main, [str(arg) for arg in args])


def sample(model, *args):
    """A run of one step that must work."""
    words = ("--model", model, "--prompt", PROMPT, "--steps", 1, "--seeds", 0, "--out", "o")
    result = run("sample", *words, *args)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def record(folder="o"):
    """What run.json holds."""
    return json.loads(open(f"{folder}/run.json").read())


def test_every_batch_is_prepared_once(model, install):
    install("count", COUNTING)
    sample(model, "--plugin", "count", "--seeds", "0-4", "--batch", 2, "--no-compare")
    assert sys.modules["guidekit_count_module"].prepared == [(0, 1), (2, 3), (4,)]


def test_what_cannot_work_is_refused_before_anything_is_written(model, tmp_path):
    settings = Settings(model=str(model), prompt=PROMPT, height=30, out=tmp_path / "o")
    plan = make_plan(settings)
    with pytest.raises(GuidekitError, match="multiples of 8"):
        Session(plan)
    assert [path.name for path in plan.folder.iterdir()] == ["run.json.part"]  # its claim


def test_an_inpainting_model_is_refused_before_it_is_called():
    pipe = tiny.sd_pipeline()
    pipe.unet = UNet2DConditionModel(**tiny.SD_UNET | {"in_channels": 9})
    pipe.save_pretrained("inpaint")
    result = run("sample", "--model", "inpaint", "--prompt", PROMPT, "--steps", 1, "--out", "o")
    assert result.exit_code == 2
    assert "reads 9 channels, the latents have 4: " in result.stderr
    assert "inside guidekit.attach" in result.stderr


def test_a_plan_is_complete(model, tmp_path):
    plan = make_plan(Settings(model=str(model), prompt=PROMPT, scheduler="DPM++ 2M Karras"))
    settings = plan.settings
    assert (settings.steps, settings.cfg) == (50, plan.denoiser.cfg)
    assert (settings.device, settings.dtype) == ("cpu", "float32")
    assert settings.scheduler == "dpm++:karras"
    assert [(t.seed, t.path) for t in plan.targets] == [(i, f"{i}.png") for i in range(4)]
    assert all(target.condition is plan.condition for target in plan.targets)


def test_run_json_has_a_format(model, tmp_path):
    sample(model)
    path = tmp_path / "o/run.json"
    tables = record()
    assert tables["format"] == 1
    assert make_settings(read_config(path), {}).prompt == PROMPT
    first = {key: value for key, value in tables.items() if key != "format"}
    path.write_text(json.dumps(first))  # of before there were formats
    assert make_settings(read_config(path), {}).prompt == PROMPT
    path.write_text(json.dumps(tables | {"format": 2}))
    with pytest.raises(GuidekitError, match="reads format 1, not 2"):
        read_config(path)


def test_a_scheduler_with_options_replays_bit_for_bit(model, tmp_path):
    sample(model, "--scheduler", "EulerAncestral", "--steps", 2)
    again = run("sample", "--config", "o/run.json", "--out", "again")
    assert again.exit_code == 0, again.stderr
    assert record("again")["sample"]["scheduler"] == "euler-a"
    assert (tmp_path / "o/0.png").read_bytes() == (tmp_path / "again/0.png").read_bytes()


def test_segments_say_how_much_of_the_image_they_cover(model):
    result = sample(model, "--segment", "red circle=0,0,0.5,0.25")
    assert "segment  red circle: tokens [2, 3], 12.5% of the image" in result.stdout
    assert record()["record"]["tokens"][0]["coverage"] == 0.125


def checker(flags: bool) -> StableDiffusionSafetyChecker:
    """A tiny safety checker that flags every image or none."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, num_hidden_layers=1, image_size=16, patch_size=8)
    text = CLIPTextConfig(**small, num_hidden_layers=1)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
    )
    made = StableDiffusionSafetyChecker(config).eval()
    threshold = -2.0 if flags else 2.0  # cosines lie between
    made.concept_embeds_weights.data.fill_(threshold)
    made.special_care_embeds_weights.data.fill_(2.0)
    return made


@pytest.mark.parametrize("flags", [True, False])
def test_a_safety_checker_does_what_it_does_in_the_bare_pipeline(tmp_path, flags):
    pipe = tiny.sd_pipeline()
    size = {"height": 16, "width": 16}
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    pipe.register_modules(safety_checker=checker(flags), feature_extractor=processor)
    pipe.register_to_config(requires_safety_checker=True)
    pipe.save_pretrained("safe")
    result = sample("safe", "--cfg", 5, "--plugin", "pag")
    draws = torch.Generator().manual_seed(0)
    bare = pipe(PROMPT, num_inference_steps=1, guidance_scale=5.0, generator=draws).images[0]
    assert np.array_equal(np.array(bare), np.array(Image.open("o/unguided/0.png")))
    assert np.array(bare).any() != flags
    assert np.array(Image.open("o/0.png")).any() != flags
    assert "safety checker looked at every image" in result.stdout
    assert ("safety checker blackened seeds [0]" in result.stdout) == flags
    drawn = guidekit.sample(pipe, PROMPT, seeds=[0], steps=1, cfg=5.0).finish()
    assert drawn.black == [flags]
    assert np.array_equal(np.array(guidekit.toolbox.to_image(drawn.images[0])), np.array(bare))


def test_words_that_a_built_in_model_never_read_are_noted():
    words = ("--prompt", "a cat on a Sofa", "--steps", 1, "--seeds", 0, "--out", "o")
    result = run("sample", *words)
    assert result.exit_code == 0, result.stderr
    assert "note     objects has never read 'Sofa'" in result.stdout


def test_every_word_of_the_world_is_known():
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "scenes/tokenizer")
    captions = [scenes.scene(seed).caption for seed in range(200)]
    assert not {word for text in captions for word in unknown_words(tokenizer, text)}
    assert unknown_words(tokenizer, "a cat on a sofa, a cat, 3 circle") == ["cat", "sofa"]


@pytest.mark.full
def test_a_line_comes_before_torch_is_imported(tmp_path):
    code = (
        "import sys\n"
        "class Told:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print('torch', flush=True)\n"
        "sys.meta_path.insert(0, Told())\n"
        "from guidekit.__main__ import main\n"
        "main(['sample', '--model', 'nope'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "loading  nope"
    assert "torch" in lines[1:]


def test_progress_in_a_log_is_a_line_now_and_then(capsys):
    with Progress(seconds=0.2) as progress:
        for step in range(1, 11):
            time.sleep(0.05)
            progress(step, 10)
    lines = capsys.readouterr().out.splitlines()
    assert 1 <= len(lines) <= 4
    assert all(line.startswith("drawing  step ") and " of 10, " in line for line in lines)
    with Progress(silent=True, seconds=0) as progress:
        progress(1, 10)
    assert capsys.readouterr() == ("", "")


def test_how_branches_rode_is_kept_and_replayed(model, monkeypatch):
    """run.json says it, a replay is bit for bit, and does as the file says where it says else."""
    monkeypatch.setattr(evaluator, "_MEASURED", {})
    words = ("--plugin", "zest", "--set", "zest.stop=1", "--segment", "red circle=0,0,0.5,1")
    sample(model, *words, "--no-compare")
    found = record()
    ((kind, mode),) = found["record"]["calls"].items()
    assert kind == "null+cond*"
    assert mode in ("batched", "split")
    replay("o/run.json", "again")
    assert record("again")["record"]["calls"] == {kind: mode}
    assert pixels("again/0.png") == pixels("o/0.png")
    other = {"batched": "split", "split": "batched"}[mode]
    found["record"]["calls"] = {kind: other}
    Path("o/run.json").write_text(json.dumps(found))
    replay("o/run.json", "other")
    assert record("other")["record"]["calls"] == {kind: other}
    monkeypatch.setattr(evaluator, "_MEASURED", {})
    replay("o/run.json", "unmeasured")
    assert evaluator._MEASURED == {}


def test_a_file_with_another_way_to_ride_is_refused(model):
    sample(model)
    found = record()
    found["record"]["calls"] = {"null+cond*": "together"}
    Path("o/run.json").write_text(json.dumps(found))
    result = run("sample", "--config", "o/run.json", "--out", "again")
    assert result.exit_code == 2
    assert "calls must be one of batched, split" in result.stderr


def replay(config, out):
    result = run("sample", "--config", config, "--out", out)
    assert result.exit_code == 0, (result.stderr, result.exception)


def pixels(path):
    return Image.open(path).tobytes()


@pytest.mark.full
def test_a_compiled_denoiser_is_in_the_record(model):
    """`--compile` with a backend; without one it is torch's own. The replay compiles again."""
    sample(model, "--compile", "eager", "--no-compare")
    assert record()["sample"]["compile"] == "eager"
    assert make_settings({}, {"compile": "inductor"}).compile == "inductor"
    words = ("--model", model, "--prompt", PROMPT, "--out", "p")
    result = run("sample", *words, "--compile", "nvfuser2")
    assert result.exit_code == 2
    assert "there are" in result.stderr
    assert "inductor" in result.stderr


def test_the_other_plugin_that_a_model_is_tuned_for_is_proposed():
    words = ("sample", "--steps", 1, "--seeds", 0, "--no-compare", "--out", "a run")
    last = run(*words, "--plugin", "zest").stdout.splitlines()[-1]
    assert last == (
        "next     guidekit sample --config 'a run/run.json' --plugin pww  # tuned for objects too"
    )


def test_a_plugin_that_never_acted_is_explained(model):
    result = sample(model, "--plugin", "pag", "--set", "pag.scale=0")
    assert result.stdout.splitlines()[-1] == "next     guidekit plugins show pag"


def test_the_list_of_plugins_describes_them_without_an_import(install, tmp_path):
    install("acme", '"""Acme: does what it says.\n\nMore."""\nraise RuntimeError("imported")\n')
    install("bare", "raise RuntimeError('imported')\n")
    install("broken", '"""Broken')
    rows = {row["name"]: row for row in json.loads(run("plugins", "--json").stdout)["plugins"]}
    assert rows["acme"]["summary"] == "Acme: does what it says."
    assert rows["bare"]["summary"] == rows["broken"]["summary"] == ""
    assert rows["zest"]["summary"].startswith("ZestGuide: ")
    lines = [" ".join(line.split()) for line in run("plugins").stdout.splitlines()]
    assert "acme 1.2 third-party, guidekit-acme Acme: does what it says." in lines
    assert "guidekit_acme_module" not in sys.modules


def test_tuned_defaults_are_told():
    text = run("plugins", "show", "zest").stdout
    assert (
        "tuned for --model scenes: scale 0.75, stop 0.75, loss power4 where you give no other"
        in text
    )
    assert "tuned for" not in run("plugins", "show", "pag").stdout
