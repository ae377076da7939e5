"""Real wheels: strangers that are good, broken and in the way, and guidekit's own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from guidekit import pytest_plugin
from guidekit.cli.scaffold import FILES, new_plugin
from guidekit.testing import CHECKS
from guidekit.zoo.shipped import DEFAULT, damages, shipped_hashes

ROOT = Path(__file__).parents[2]

MORE = '''

@hookimpl
def register_backbones(register):
    """Offers `--model frame:tiny`."""
    from guidekit.testing import sd_pipeline

    register("tiny", sd_pipeline)


@hookimpl
def register_commands(register):
    """Adds `guidekit frame`."""
    import click

    register(click.Command("frame", callback=lambda: click.echo("hello from frame")))
'''


def python(*args, path=(), cwd=None, **environment):
    """A finished process of this Python that sees the folders of `path` first."""
    folders = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(folders)} | environment
    command = [sys.executable, *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, check=False
    )


def build(sources, wheels):
    """Builds a wheel of every source folder, as an author would."""
    done = python(
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "-w",
        wheels,
        *sources,
    )
    assert done.returncode == 0, done.stderr


def install(wheels, target):
    """Installs the wheels into a folder of their own."""
    done = python(
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-compile",
        "--no-index",
        "--disable-pip-version-check",
        "--target",
        target,
        *wheels,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Folders with installed plugins: `good`, `broken` on import, `clash` of another `frame`.

    `source` is where the good one was written.
    """
    folder = tmp_path_factory.mktemp("strangers")
    sources = {name: folder / name for name in ("good", "broken", "clash")}
    with open(new_plugin("frame", sources["good"]) / "guidekit_frame.py", "a") as file:
        file.write(MORE)
    new_plugin("broken", sources["broken"])
    (sources["broken"] / "guidekit_broken.py").write_text("raise RuntimeError('on import')\n")
    new_plugin("frame", sources["clash"])
    for old, new in (("guidekit-frame", "other-frame"), ("guidekit_frame", "other_frame")):
        text = (sources["clash"] / "pyproject.toml").read_text()
        (sources["clash"] / "pyproject.toml").write_text(text.replace(old, new))
    (sources["clash"] / "guidekit_frame.py").rename(sources["clash"] / "other_frame.py")
    build(sources.values(), folder / "wheels")
    for name, distribution in (
        ("good", "guidekit_frame"),
        ("broken", "guidekit_broken"),
        ("clash", "other_frame"),
    ):
        install((folder / "wheels").glob(f"{distribution}-*.whl"), folder / "on" / name)
    return {name: folder / "on" / name for name in sources} | {"source": sources["good"]}


def fails(done, *texts):
    """Checks the exit code and the one line on stderr."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for text in texts:
        assert text in done.stderr


def test_a_good_stranger_and_a_broken_one_are_listed(strangers):
    done = python("-m", "guidekit", "plugins", path=[strangers["good"], strangers["broken"]])
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert rows["frame"][1:4] == ["0.1.0", "third-party,", "guidekit-frame"]
    assert rows["frame"][4:]  # its first words, read from the source
    assert rows["broken"][2] == "third-party,"
    assert rows["zest"][2] == "first-party"


def test_a_good_stranger_draws_its_own_model_and_a_broken_one_is_kept_out(strangers, tmp_path):
    (tmp_path / "run.toml").write_text("[plugin.frame]\n[plugin.broken]\n")
    command = [
        "-m",
        "guidekit",
        "sample",
        "--config",
        "run.toml",
        "--model",
        "frame:tiny",
        "--prompt",
        "a red circle",
        "--seeds",
        0,
        "--steps",
        2,
        "--out",
        "o",
    ]
    where = {"path": [strangers["good"], strangers["broken"]], "cwd": tmp_path}
    fails(python(*command, **where), "guidekit-broken 0.1.0", "RuntimeError: on import")
    assert not (tmp_path / "o").exists()
    done = python(*command, "--no-plugin", "broken", **where)
    assert done.returncode == 0, done.stderr
    assert "energy   frame" in done.stdout
    assert (tmp_path / "o" / "run.json").is_file()


def test_a_strangers_command(strangers):
    done = python("-m", "guidekit", "frame", path=[strangers["good"], strangers["broken"]])
    assert (done.returncode, done.stdout) == (0, "hello from frame\n"), done.stderr


def test_a_stranger_that_raises_is_named_with_its_distribution(strangers):
    done = python("-m", "guidekit", "broken", path=[strangers["broken"]])
    fails(done, "guidekit-broken 0.1.0", "RuntimeError: on import")


def test_what_a_stranger_offers_is_shown_with_the_commands_to_type(strangers):
    done = python("-m", "guidekit", "plugins", "show", "frame", path=[strangers["good"]])
    for command in (
        "sample --plugin frame --set frame.scale=30.0",
        "sample --model frame:tiny",
        "frame --help",
    ):
        assert f"guidekit {command}" in done.stdout


def test_a_clash_names_both(strangers):
    path = [strangers["good"], strangers["clash"]]
    listed = python("-m", "guidekit", "plugins", path=path)
    assert listed.returncode == 0
    assert listed.stdout.count("\nframe ") == 2
    done = python("-m", "guidekit", "plugins", "show", "frame", path=path)
    fails(done, "guidekit-frame", "other-frame", "uninstall all but one")


def test_strangers_can_be_kept_out(strangers):
    command = ["-m", "guidekit", "plugins", "show", "frame"]
    done = python(*command, path=[strangers["good"]], GUIDEKIT_PLUGINS="acme")
    fails(done, "guidekit-frame", "GUIDEKIT_PLUGINS")


def test_conformance_and_the_templates_own_tests(strangers, tmp_path):
    command = ["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    own = strangers["source"] / "test_frame.py"
    done = python(
        *command, own, "--guidekit-plugin", "frame", path=[strangers["good"]], cwd=tmp_path
    )
    count = len(CHECKS) + own.read_text().count("def test_")
    assert done.returncode == 0, done.stdout
    assert f"{count - 1} passed, 1 skipped" in done.stdout, done.stdout  # it acts in no groups
    done = python(*command, "--guidekit-plugin", "broken", path=[strangers["broken"]], cwd=tmp_path)
    assert done.returncode == 4, done.stdout
    assert "guidekit-broken 0.1.0" in done.stderr, done.stdout


@pytest.mark.parametrize(("named", "first"), [(True, ["test_own.py"]), (False, [])])
def test_the_checks_run_alone_unless_tests_are_named(named, first):
    source = pytest.Config.ArgsSource
    config = SimpleNamespace(
        getoption=lambda option: ["zest"],
        stash=pytest.Stash(),
        args=["test_own.py"],
        args_source=source.ARGS if named else source.TESTPATHS,
    )
    pytest_plugin.pytest_configure(config)
    assert config.args == [*first, str(ROOT / "guidekit" / "testing" / "conformance.py")]
    assert list(config.stash[pytest_plugin.GUIDANCES]) == ["zest"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["Frame"], "use small letters"),
        (["zest"], "'zest' is already offered by guidekit"),
        (["fresh", "--out", "."], "exists already"),
    ],
)
def test_new_refuses(args, says, tmp_path):
    fails(python("-m", "guidekit", "plugins", "new", *args, cwd=tmp_path), says)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with guidekit installed from its wheel."""
    folder = tmp_path_factory.mktemp("own")
    left = shutil.ignore_patterns(".git", "*.egg-info", "build", "__pycache__", "runs", ".*_cache")
    shutil.copytree(ROOT, folder / "source", ignore=left)
    build([folder / "source"], folder / "wheels")
    install((folder / "wheels").glob("guidekit-*.whl"), folder / "site")
    shutil.rmtree(folder / "source")
    return folder / "site"


def test_the_wheel_draws_with_the_built_in_model_from_anywhere(site, tmp_path):
    command = ["-m", "guidekit", "sample", "--plugin", "zest", "--steps", "2", "--seeds", "0"]
    done = python(*command, "--json", path=[site], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    assert run["record"]["model"]["path"] == str(site / "guidekit" / "zoo" / DEFAULT)
    assert run["record"]["finished"] == [0]
    assert run["record"]["energy"]["zest"]
    assert (tmp_path / run["folder"] / "0.png").is_file()
    assert damages(site / "guidekit" / "zoo") == dict.fromkeys(shipped_hashes(), "")


def test_the_wheel_holds_every_plugin_and_the_template(site, tmp_path):
    names = {path.relative_to(site).as_posix() for path in site.rglob("*.*")}
    assert {f"guidekit/example_plugin/{file}" for file in FILES} <= names
    assert {path.name for path in (ROOT / "plugins").glob("guidekit_*.py")} <= names
    made = python("-m", "guidekit", "plugins", "new", "my_own", path=[site], cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    folder = tmp_path / "guidekit-my_own"
    assert "MyOwn" in (folder / "guidekit_my_own.py").read_text()
    texts = [path.read_text() for path in folder.iterdir()]
    assert len(texts) == 4
    assert not any("vignette" in text.lower() for text in texts)
