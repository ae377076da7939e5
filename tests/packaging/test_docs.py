"""What the READMEs say exists: every hook with its arguments, every command with its flags."""

import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib

import click
import pytest
import yaml

import guidekit
import guidekit.affinity
import guidekit.evaluate.judge
import guidekit.heads
import guidekit.sampler
import guidekit.semantica
import guidekit.testing
import guidekit.toolbox
import guidekit.train
from guidekit import Guidance, guidance, hookspecs
from guidekit.__main__ import main
from guidekit.run import Run
from guidekit.step import Step
from guidekit.testing import CHECKS
from pages import DOCS, ROOT, blocks, commands, python_blocks

GUIDE = (ROOT / "plugins" / "README.md").read_text()
READMES = [ROOT / "README.md", ROOT / "plugins" / "README.md", *ROOT.glob("examples/*/README.md")]
HOOKS = {name: inspect.signature(getattr(Guidance, name)) for name in guidance.HOOKS}
SPECS = {
    name: inspect.signature(value)
    for name, value in vars(hookspecs).items()
    if hasattr(value, f"{hookspecs.GROUP}_spec")
}


@pytest.mark.parametrize("name", [*HOOKS, *SPECS])
def test_every_hook_is_explained_with_its_arguments(name):
    signature = (HOOKS | SPECS)[name]
    arguments = ", ".join(argument for argument in signature.parameters if argument != "self")
    assert f"| `{name}({arguments})` |" in GUIDE


@pytest.mark.parametrize("name", [*HOOKS, *SPECS])
def test_every_hook_is_defined_with_its_arguments_in_a_test(name):
    arguments = [rf"{argument}\b[^,)]*" for argument in (HOOKS | SPECS)[name].parameters]
    made = rf"def {name}\({', '.join(arguments)}\)" if arguments else rf"\w\.{name}\(\)"
    if name == "example_condition":
        made = rf"def {name}\(cls\)"
    files = (ROOT / "tests").rglob("*.py")
    assert any(re.search(made, file.read_text()) for file in files), made


def test_every_class_variable_and_property_is_explained():
    others = [
        name
        for name, value in vars(Guidance).items()
        if isinstance(value, property) or name in inspect.get_annotations(Guidance)
    ]
    assert len(others) > 5
    for name in others:
        assert re.search(rf"`{name}\b", GUIDE), name


def test_every_check_is_explained():
    for name in CHECKS:
        assert f"| `{name}` |" in GUIDE
    assert len(re.findall(r"^\| `\w+` \|", GUIDE, re.MULTILINE)) == len(CHECKS)


def test_what_a_step_knows_is_there():
    source = inspect.getsource(Step)
    for name in set(re.findall(r"`step\.(\w+)", GUIDE)):
        assert f"self.{name}" in source or f"def {name}(" in source, name


@pytest.mark.parametrize(("cls", "word"), [(Step, "step"), (Run, "run")])
def test_all_that_a_step_and_a_run_show_is_in_the_tables(cls, word):
    source = ast.parse(inspect.cleandoc(inspect.getsource(cls.__init__)))
    assigned = {
        node.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    shown = {name for name in {*assigned, *vars(cls)} if not name.startswith("_")}
    assert len(shown) > 10
    assert not [name for name in sorted(shown) if f"`{word}.{name}" not in GUIDE]


@pytest.mark.parametrize("readme", [*READMES, *DOCS], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_command_and_flag_exists(readme):
    found = list(commands(readme))
    assert found or readme in DOCS
    for words in found:
        command = main
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            name = words.pop(0)
            command = command.commands.get(name)
            assert command, f"no command {name!r}"
        flags = {
            flag for option in command.params for flag in (*option.opts, *option.secondary_opts)
        }
        for word in words:
            assert not word.startswith("-") or word.partition("=")[0] in flags, word


def test_the_guides_example_is_a_plugin_that_holds():
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    names: dict = {"__name__": "guide"}
    exec(compile(code, "plugins/README.md", "exec"), names)
    registered = {}
    names["register_guidance"](registered.__setitem__)
    assert registered == {"haze": names["Grey"]}


@pytest.mark.parametrize("part", ["docs/results", "benchmarks", "kernels"])
def test_every_script_with_numbers_exists(part):
    text = "".join(path.read_text() for path in (ROOT / part).glob("*.md"))
    named = re.findall(r"benchmarks/\w+\.py", text)
    assert named, named
    assert all((ROOT / name).exists() for name in named), named


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 700


@pytest.mark.parametrize(
    "path",
    [
        ROOT / "README.md",
        pytest.param(ROOT / "docs/howto/attach.md", marks=pytest.mark.full),
        pytest.param(ROOT / "docs/tutorial/first-layout.md", marks=pytest.mark.full),
    ],
    ids=lambda path: path.stem,
)
def test_python_runs_as_it_stands_and_saves_an_image(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(guidekit.sampler, "STEPS", 2)
    first, *_ = python_blocks(path)
    exec(compile(first, str(path), "exec"), {"__name__": "docs"})
    (saved,) = tmp_path.glob("*.png")
    assert saved.stat().st_size > 1000


PARSERS = {
    **dict.fromkeys(
        ["", "bash"], lambda text: subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    ),
    **dict.fromkeys(["python", "py"], ast.parse),
    "toml": tomllib.loads,
    "json": json.loads,
    "yaml": yaml.safe_load,
}


@pytest.mark.parametrize("path", [*READMES, *DOCS], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_block_is_of_its_language(path):
    for language, text in blocks(path):
        if not language.startswith("{"):  # a directive of the site's
            PARSERS[language](text)


@pytest.mark.full
@pytest.mark.parametrize("page", [p for p in DOCS if python_blocks(p)], ids=lambda p: p.stem)
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(guidekit.sampler, "STEPS", 2)
    names = {"__name__": "docs"}
    for block in python_blocks(page):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.full
def test_generated_pages_are_fresh():
    command = [sys.executable, ROOT / "docs" / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def documented(module):
    """Names of a module that have a directive in the reference."""
    directive = r"^\.\. (currentmodule|auto\w+|py:data):: (?:guidekit\.(?=[A-Z]))?([\w.]+)"
    found = set()
    for page in ("api", "step-and-run", "api-rooms"):
        current, text = "guidekit", (ROOT / f"docs/reference/{page}.md").read_text()
        for kind, name in re.findall(directive, text, re.MULTILINE):
            current = name if kind == "currentmodule" else current
            found |= {name} if current == module.__name__ else set()
    return found


@pytest.mark.parametrize(
    "module",
    [
        guidekit,
        guidekit.toolbox,
        guidekit.testing,
        guidekit.affinity,
        guidekit.evaluate.judge,
        guidekit.heads,
        guidekit.semantica,
        guidekit.train,
    ],
    ids=lambda module: module.__name__,
)
def test_every_name_of_all_has_a_place_in_the_reference(module):
    assert not set(module.__all__) - documented(module)


def test_every_room_with_names_is_in_the_reference():
    named = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in ROOT.glob("guidekit/**/__init__.py")
        if "__all__ = " in path.read_text()
    }
    assert named == {
        "guidekit",
        "guidekit.testing",
        "guidekit.affinity",
        "guidekit.heads",
        "guidekit.semantica",
        "guidekit.train",
    }


@pytest.mark.parametrize("path", [*READMES, *DOCS], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_link_between_files_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target
