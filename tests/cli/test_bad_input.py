"""What can go wrong for a user: one line that names the remedy, exit 2 or 130, nothing lost."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from guidekit.__main__ import main
from guidekit.backbones.loading import load
from guidekit.cli.errors import Tracebacks, shown_errors

PROMPT = "a red circle and a blue square on white"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*args):
    """The result of a command given as words."""
    return CliRunner().invoke(main, [str(arg) for arg in args])


def sample(model, *args):
    """A run of one step, which need not work."""
    words = ("--model", model, "--prompt", PROMPT, "--steps", 1, "--seeds", 0)
    return run("sample", *words, *args)


def fails(result, *texts, code=2):
    """Checks the exit code and the one line on stderr."""
    assert result.exit_code == code, (result.output, result.exception)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for text in texts:
        assert text in result.stderr


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (["--plugin", "../x"], ["no plugin '../x'; there are adaptive, apg"]),
        (["--no-plugin", "zset"], ["--no-plugin zset: no such plugin; there are adaptive, apg"]),
        (["--plugin", "pag", "--set", "pag.sites=attn9"], ["'attn9' matches no", "it has: down"]),
        (["--plugin", "pag", "--set", "pag.sites=*.attn2"], ["cannot be perturbed", "those that"]),
        (["--segment", "red circle=0,0,1.5,1"], ["box 0,0,1.5,1", "0 <= left < right <= 1"]),
        (["--segment", "red circle=0,0,1"], ["give four numbers"]),
        (["--segment", "red circle=clear.png"], ["the mask is empty"]),
        (["--segment", "red circle=folder"], ["mask folder: not a readable image"]),
        (["--segment", "red circle=0,0,1,1@nan"], ["the strength must be finite"]),
        (["--layout", "zebra.json"], ["phrase 'zebra' does not occur", "--append-phrases"]),
        (["--layout", "nan.json"], ["layout nan.json: segment 0: box 0,0,nan,1"]),
        (["--layout", "half.json"], ["layout half.json: not a readable JSON file"]),
        (["--layout", "map.json"], ["no pixel of the map is 7; it holds 0, 255"]),
        (
            ["--config", "option.toml"],
            ["zest has no option 'scal' (the nearest is scale); it has: scale"],
        ),
        (["--config", "infinite.toml"], ["zest.scale must be a finite number, not inf"]),
        (["--config", "box.toml"], ["config: segment 0: box 0,0,2,1"]),
        (["--config", "half.json"], ["config half.json: not a readable JSON file"]),
        (["--height", "0"], ["height must be at least 1"]),
        (["--device", "meta"], ["no device 'meta'; there are cpu"]),
        (["--model", ""], ["no model ''", "not a built-in (digits-ddpm, objects"]),
        (["--model", "nobody/nothing"], ["'nobody/nothing' cannot be loaded", "check its name"]),
        (["--model", "nope:x"], ["no plugin 'nope'"]),
        (["--model", "zest:x"], ["no backbone 'zest:x'; zest registers none"]),
        (["--eta", "3", "--steps", "3"], ["images of seeds [0] are not finite", "lower"]),
        (["--out", ""], ["has no name of its own; choose another with --out"]),
        (["--out", "clear.png"], ["output folder clear.png: it is a file"]),
        (["--out", "/dev/null"], ["output folder /dev/null: Not a directory"]),
    ],
)
def test_bad_input(model, tmp_path, args, texts):
    Image.new("RGBA", (4, 4)).save("clear.png")
    grey = Image.new("L", (4, 4))
    grey.putpixel((0, 0), 255)
    grey.save("map.png")
    os.mkdir("folder")
    box = {"phrase": "red", "box": [0, 0, 1, 1]}
    layouts = {
        "zebra": {"prompt": "a red circle", "segments": [box | {"phrase": "zebra"}]},
        "nan": {"prompt": "a red circle", "segments": [box | {"box": [0, 0, float("nan"), 1]}]},
        "map": {"prompt": "a red", "map": "map.png", "segments": [{"phrase": "red", "value": 7}]},
    }
    texts_of = {f"{name}.json": json.dumps(layout) for name, layout in layouts.items()}
    texts_of |= {
        "half.json": '{"prompt":',
        "option.toml": "[plugin.zest]\nscal = 3\n",
        "infinite.toml": "[plugin.zest]\nscale = inf\n",
        "box.toml": '[[segment]]\nphrase = "red"\nbox = [0, 0, 2, 1]\n',
    }
    for name, text in texts_of.items():
        (tmp_path / name).write_text(text)
    if args[0] in ("--layout", "--config"):
        args = ["--plugin", "zest", *args]
    fails(
        run("sample", "--model", model, "--prompt", PROMPT, "--steps", 1, "--seeds", 0, *args),
        *texts,
    )
    assert not list(tmp_path.rglob("[0-9].png"))


def test_files_with_a_byte_order_mark_are_read(model, tmp_path):
    (tmp_path / "mark.toml").write_text("[sample]\nsteps = 1\n", encoding="utf-8-sig")
    layout = {"prompt": PROMPT, "segments": []}
    (tmp_path / "mark.json").write_text(json.dumps(layout), encoding="utf-8-sig")
    result = sample(model, "--config", "mark.toml", "--layout", "mark.json")
    assert result.exit_code == 0, result.stderr


OPTIONAL = {"tokenizer_config.json"}  # the classes' own defaults do


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_half_downloaded_model(model, tmp_path, damage):
    """Each file of a model in turn; what still loads is only what a model can do without."""
    folder, fine = tmp_path / "m", set()
    shutil.copytree(model, folder)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        path.unlink()
        if damage == "cut short":
            path.write_bytes(data[: len(data) // 2])
        try:
            load(str(folder), "cpu")
            fine.add(path.name)
        except ValueError as error:
            assert "download" in str(error), (path, error)
            assert "\n" not in str(error), (path, error)
        path.write_bytes(data)
    assert fine <= OPTIONAL
    load(str(folder), "cpu")


def test_a_lost_shard(model, tmp_path):
    shutil.copytree(model, "m")
    unet = tmp_path / "m/unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "d-00001-of-00002.safetensors")
    parts = {"a": "d-00001-of-00002.safetensors", "b": "d-00002-of-00002.safetensors"}
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    fails(sample("m"), "lacks d-00002-of-00002.safetensors; download the model again")
    index.write_text("{")
    fails(sample("m"), "index.json is damaged; download it again")


@contextlib.contextmanager
def small_disk(folder):
    """A file system of 128 KiB where the test may mount one, else no file above 8 KiB."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(model, tmp_path):
    """The first images fit; the disk is full before the last; what was finished is kept."""
    with small_disk(tmp_path / "disk"):
        result = run(
            "sample",
            "--model",
            model,
            "--prompt",
            PROMPT,
            "--steps",
            1,
            "--seeds",
            "0-99",
            "--batch",
            4,
            "--height",
            48,
            "--width",
            48,
            "--out",
            tmp_path / "disk/o",
        )
        fails(result, "choose another folder with --out")
        names = sorted(path.name for path in (tmp_path / "disk/o").rglob("*"))
        assert not [name for name in names if name.endswith(".part")]
        kept = list((tmp_path / "disk/o").glob("*.png"))
        for path in kept:
            Image.open(path).load()
        record = json.loads((tmp_path / "disk/o/run.json").read_text())["record"]
        assert {f"{seed}.png" for seed in record["finished"]} <= {path.name for path in kept}
        assert record["finished"]
        assert f"{len(record['finished'])} finished image" in result.stderr


def test_weights_that_a_full_disk_does_not_take_are_not_called_damaged(tmp_path, capsys):
    path = tmp_path / "disk/a.safetensors"
    with small_disk(tmp_path / "disk"), pytest.raises(SystemExit) as left:
        with shown_errors(Tracebacks()):
            save_file({"a": torch.zeros(10**6)}, path)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "weights could not be written" in line
    assert line.endswith("free some space, or choose another folder with --out")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_way_of_being_full_names_the_remedy(model, monkeypatch, code):
    from guidekit.outputs import folders

    def full(*_, **__):
        raise OSError(code, os.strerror(code), "o/0.png")

    monkeypatch.setattr(folders, "save_image", full)
    fails(sample(model), f"o/0.png: {os.strerror(code)}; free some space, or choose another folder")


@pytest.fixture
def closed(tmp_path):
    """A folder that nobody may write in; root may everywhere, so it gets a file system."""
    folder = tmp_path / "closed"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if os.getuid() != 0:
        folder.chmod(0o500)
    elif not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this root may not mount")
    yield folder
    if os.getuid() == 0:
        subprocess.run(["umount", str(folder)], check=True)


def test_an_output_folder_that_cannot_be_written(model, closed):
    reason = "Permission denied" if os.getuid() else "Read-only file system"
    fails(sample(model, "--out", closed), f"output folder {closed}: {reason}; choose another with")


def test_a_template_that_cannot_be_written():
    fails(run("plugins", "new", "abc", "--out", "/proc/abc"), "name another folder with --out")


@pytest.mark.full
def test_ctrl_c_in_the_middle(model, tmp_path):
    """A real signal to a real process, after its first image."""
    words = [
        "sample",
        "--model",
        model,
        "--prompt",
        PROMPT,
        "--steps",
        "4",
        "--seeds",
        "0-99",
        "--batch",
        "1",
        "--plugin",
        "pag",
        "--no-compare",
        "--out",
        "o",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "guidekit", *map(str, words)],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # Processes that a shell started in the background ignore the signal, and so would this one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "o/1.png").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    record = json.loads((tmp_path / "o/run.json").read_text())["record"]
    finished = record["finished"]
    assert process.returncode == 130
    assert record["status"] == "stopped"
    kept = "1 finished image is" if len(finished) == 1 else f"{len(finished)} finished images are"
    assert stderr.splitlines() == [f"stopped: {kept} in o"]
    assert finished == list(range(len(finished)))
    assert len(finished) >= 1
    for seed in finished:
        Image.open(tmp_path / f"o/{seed}.png").load()
    assert (tmp_path / "o/index.html").is_file()
    assert not list(tmp_path.rglob("*.part"))
