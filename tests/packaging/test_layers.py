"""What import-linter cannot see: kernels know nothing of guidekit, plugins only public modules."""

import ast
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


@pytest.mark.parametrize("path", sorted((ROOT / "plugins").glob("*.py")), ids=lambda p: p.stem)
def test_plugins_do_not_import_each_other_or_private_names(path):
    own = path.stem
    foreign = {m for m in _imports(path) if m.startswith("guidekit_") and m != own}
    assert not foreign
    names = [
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("guidekit")
        for alias in node.names
    ]
    assert names and not [name for name in names if name.startswith("_")]


def test_the_core_names_no_plugin():
    plugins = {path.stem for path in (ROOT / "plugins").glob("*.py")}
    for path in (ROOT / "guidekit").rglob("*.py"):
        assert not _imports(path) & plugins, path
