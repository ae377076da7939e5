"""Every command of the tutorials and how-to pages runs, in the page's order, on small files."""

import glob
import itertools
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from guidekit.__main__ import main
from guidekit.evaluate.lpips import load_lpips
from lpips_weights import nothing_downloaded
from pages import PAGES, ROOT, blocks, commands
from workplaces import WORKPLACES, extractor, installed, picture, scale

SERVES = "it runs until it is stopped; tests/serve has its tests"
#: What is not run, by page and command, and why.
LEFT_OUT = {
    ("own-world", "train objects --cutouts cutouts --out runs"): "the one before, for hours",
    ("serve", "serve"): SERVES,
    ("serve", "serve --control path/to/controlnet --control path/to/adapter --file kitchen.json"
     " --file affinity"): SERVES,
    ("serve", "serve --host 0.0.0.0 --model scenes --max-side 512 --max-steps 100"): SERVES,
    ("serve", "serve --model digits-ddpm --plugin fewshot --file head"): SERVES,
}  # fmt: skip

#: Options that make a run short, after the page's: those of the first word that a command has.
SHORT = {
    "--shard": "--shard 1/2 --out mine --quiet",  # the page's is a launcher's, on another disk
    "--plan": "--quiet",
    "--count": "--count 4 --block 2 --steps 2 --quiet",
    "--image-folder": "--per-image 1 --steps 2 --quiet",
    "clip.encoder=RN50/openai": "--set clip.encoder=scenes-clip --steps 2 --seeds 0 --quiet",
    "sample": "--steps 2 --seeds 0 --quiet",
    "tune": "--steps 2 --seeds 0 --rounds 1 --quiet",
    "train": "--fast-dev-run --set steps=1 --set batch=2 --quiet",
    "transfer": "--fast-dev-run --quiet",
    "readout": "--iterations 2 --quiet",
    "augment": "--per-class 1 --tries 1 --steps 2 --quiet",
}


def short(words):
    """A command with its files found, as a shell does, and the options that make it short."""
    found = [name for word in words for name in (sorted(glob.glob(word)) or [word])]
    more = next((options for word, options in SHORT.items() if word in words), "")
    return [*found, *shlex.split(more)]


def after(words, monkeypatch):
    """What makes a short run leave what the page's leaves."""
    if words[:2] == ["plugins", "new"]:
        installed(monkeypatch)
    for made in Path().glob("**/fast-dev-run/*"):
        whole = made.parent.parent / made.name
        if whole.exists():  # with a recipe beside
            shutil.copytree(made, whole, dirs_exist_ok=True)
        else:
            made.rename(whole)


@pytest.mark.full
@pytest.mark.parametrize("page", [p for p in PAGES if any(commands(p))], ids=lambda p: p.stem)
def test_every_command_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    WORKPLACES.get(page.stem, list)()
    for words in commands(page):
        if (page.stem, " ".join(words)) in LEFT_OUT:
            continue
        line = short(words)
        done = CliRunner().invoke(main, line)
        assert done.exit_code == 0, (line, done.output, done.exception)
        after(words, monkeypatch)
        made = [name for flag, name in itertools.pairwise(line) if flag == "--out"]
        assert all(Path(name).exists() for name in made[-1:]), (line, made)


def test_few_commands_are_left_out_and_none_that_no_page_has():
    known = {(page.stem, " ".join(words)) for page in PAGES for words in commands(page)}
    assert set(LEFT_OUT) <= known
    assert len(LEFT_OUT) <= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_no_command_of_a_block_is_overlooked(page):
    text = "\n".join(text for language, text in blocks(page) if language in ("", "bash", "yaml"))
    names = "|".join(main.list_commands(None))
    assert len(re.findall(rf"\bguidekit (?:{names})\b", text)) == len([*commands(page)])


def with_extras(name, number):
    """A block of a how-to page that needs an extra."""
    found = [text for language, text in blocks(ROOT / f"docs/howto/{name}.md") if language == "py"]
    return found[number]


@pytest.mark.full
def test_the_weights_of_lpips_are_saved_in_the_form_that_eval_reads(tmp_path, monkeypatch):
    theirs = pytest.importorskip("torch_fidelity.sample_similarity_lpips")
    nothing_downloaded(monkeypatch, theirs)
    monkeypatch.chdir(tmp_path)
    exec(with_extras("evaluate", 0), {})
    image = Image.new("RGB", (32, 32))
    assert load_lpips(Path("lpips.safetensors")).distance(image, image) == 0


@pytest.mark.full
def test_torch_fidelity_reads_an_extractor_as_the_page_says(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    monkeypatch.chdir(tmp_path)
    extractor()
    for folder, number in itertools.product("ab", range(3)):
        picture(f"{folder}/{number}.png")
    exec(with_extras("evaluate", 1), {})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_draws_the_pages_plan(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    scale()
    text = with_extras("scale", 0).replace("workers=8, num_gpus=1", "workers=1")
    ray.init(num_cpus=5, include_dashboard=False, log_to_driver=False, object_store_memory=2**28)
    try:
        exec(text.replace("/shared", str(tmp_path)), {})
    finally:
        ray.data.DataContext.get_current().checkpoint_config = None
        ray.shutdown()
    assert [*(tmp_path / "set").glob("*.tar")]
    assert [*(tmp_path / "rows").iterdir()]
