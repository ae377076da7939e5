"""What import-linter cannot see: kernels know nothing of guidekit, plugins only public modules."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels" / "guidekit_kernels").glob("*.py")), ids=lambda p: p.stem
)
def test_kernels_do_not_import_guidekit(path):
    assert not {m for m in _imports(path) if m.split(".")[0] == "guidekit"}


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path):
    """A clone lies in a folder called guidekit, which Python may take for a namespace package."""
    (tmp_path / "guidekit").mkdir()
    code = "import guidekit; print(guidekit.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()) == ROOT / "guidekit" / "__init__.py"


PROMISED = {"guidekit", "guidekit.toolbox", "guidekit.testing"}
# What an implementation package shows by its own `__all__`.
PACKAGES = {
    "guidekit.affinity",
    "guidekit.evaluate",
    "guidekit.heads",
    "guidekit.semantica",
    "guidekit.train",
    "guidekit.worlds",
}
# Plugins whose method has a package of its own beside the core.
IMPLEMENTATIONS = {
    "guidekit_clip": "guidekit.noisy_clip",
    "guidekit_fewshot": "guidekit.heads",
    "guidekit_readout": "guidekit.heads",
    "guidekit_semantica": "guidekit.semantica",
}


def _own(modules):
    return {m for m in modules if m.split(".")[0] == "guidekit"}


@pytest.mark.parametrize("path", sorted((ROOT / "plugins").glob("*.py")), ids=lambda p: p.stem)
def test_plugins_import_what_is_promised_and_their_own_package(path):
    modules = _imports(path)
    assert not {m for m in modules if m.startswith("guidekit_") and m != path.stem}
    own = IMPLEMENTATIONS.get(path.stem, "nothing")
    others = {m for m in _own(modules) - PROMISED if f"{m}.".startswith(f"{own}.") is False}
    assert not others
    assert not [name for name in _names(path) if name.startswith("_")]


def _names(path):
    return [
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("guidekit")
        for alias in node.names
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda p: p.stem)
def test_examples_import_what_is_promised(path):
    assert _own(_imports(path)) <= PROMISED | PACKAGES


DOCS = [ROOT / "README.md", ROOT / "plugins" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_docs_import_what_is_promised(path):
    found = re.findall(r"^\s*(?:from|import) (guidekit[.\w]*)", path.read_text(), re.MULTILINE)
    assert _own(found) <= PROMISED | PACKAGES


@pytest.mark.parametrize("module", sorted(PROMISED | PACKAGES))
def test_every_promised_name_is_there(module):
    package = importlib.import_module(module)
    for name in getattr(package, "__all__", ()):
        assert getattr(package, name) is not None


def test_the_core_names_no_plugin():
    plugins = {path.stem for path in (ROOT / "plugins").glob("*.py")}
    for path in (ROOT / "guidekit").rglob("*.py"):
        assert not _imports(path) & plugins, path


@pytest.mark.parametrize("module", ["guidekit", "guidekit.toolbox", "guidekit.testing"])
def test_names_that_come_lazily_are_there_for_type_checkers(module):
    """Those of `if TYPE_CHECKING`, from where they really live."""
    found = importlib.import_module(module)
    tree = ast.parse(Path(found.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    base = "guidekit.testing" if module == "guidekit.testing" else "guidekit"
    named = {alias.name: node.module for node in block.body for alias in node.names}
    assert named == {name: f"{base}.{home}" for name, home in found._HOME.items()}
