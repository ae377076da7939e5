"""Plugins of strangers, as an index would install them."""

import sys
import textwrap

import pytest


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a third-party distribution with one plugin on the path: `install(name, source)`."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def make(name: str, source: str) -> None:
        module = f"guidekit_{name}_module"
        (site / f"{module}.py").write_text(textwrap.dedent(source))
        info = site / f"guidekit_{name}-1.2.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: guidekit-{name}\nVersion: 1.2\n"
        (info / "METADATA").write_text(text)
        (info / "entry_points.txt").write_text(f"[guidekit]\n{name} = {module}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return make
