"""How Sphinx builds the site: `.ci/run docs`, or `sphinx-build -W docs build/site`."""

import importlib.metadata
import os
import re
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from gallery_images import new_images  # noqa: E402

SOURCE = "https://github.com/guidekit/guidekit/blob/main"

project = "guidekit"
author = "the guidekit authors"
release = importlib.metadata.version("guidekit")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["gallery/*.ipynb", "gallery/GALLERY_HEADER.rst", "sg_execution_times.rst"]
# Single backticks in docstrings are names: a link where there is a page for one.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# README-style links and callables of the configuration are no part of the cached state.
suppress_warnings = ["config.cache", "myst.header"]

html_theme = "furo"
html_title = "guidekit"
html_static_path = ["_static"]
html_css_files = ["site.css"]
copybutton_prompt_text = "$ "


TITLE = re.compile(r"^# %% (.+)", re.MULTILINE)


def staged() -> str:
    """The scripts of `examples/` alone: the template of a plugin beside them is no example."""
    folder = HERE.parent / "build" / "examples"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HERE.parent / "examples", folder, ignore=shutil.ignore_patterns("plugin"))
    for script in folder.glob("*.py"):  # the gallery shows the lines below a cell's mark
        script.write_text(TITLE.sub(r"# %%\n# \1", script.read_text()))
    return str(folder)


sphinx_gallery_conf = {
    "examples_dirs": [staged()],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"\.py$",
    "image_scrapers": (new_images,),
    # Small enough for a CPU: the built-in model and few steps.
    "reset_argv": lambda conf, variables: arguments(Path(variables["src_file"]).stem),
    "plot_gallery": "True",
    "run_stale_examples": False,
    "show_memory": False,
    "min_reported_time": 10_000,
    "remove_config_comments": True,
}


def arguments(example: str) -> list[str]:
    """The arguments with which the site runs an example."""
    return {"train_semantica": ["scenes", "20"]}.get(example, [])


# Files outside of this folder that are pages of the site.
INSIDE = {
    "plugins/README.md": "reference/plugin-guide.md",
    "SECURITY.md": "explanation/what-is-trusted.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
INCLUDE = re.compile(r"```{include} (\S+)\n```\s*")
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def led(app, docname: str, source: list[str]) -> None:
    """Puts included files in their place; links that leave this folder lead to page or source."""
    page = HERE / docname
    if included := INCLUDE.fullmatch(source[0]):
        page = (page.parent / included[1]).resolve()
        source[0] = page.read_text()

    def lead(match: re.Match) -> str:
        target = (page.parent / match[1]).resolve()
        path = str(target.relative_to(HERE.parent))
        if target.is_relative_to(HERE):
            where = f"/{target.relative_to(HERE)}{match[2] or ''}"
        else:
            where = f"/{INSIDE[path]}" if path in INSIDE else f"{SOURCE}/{path}"
        return f"]({where})"

    if page.suffix != ".rst" and "gallery" not in docname:
        source[0] = LINK.sub(lead, source[0])


def setup(app) -> None:
    """Connects what this file defines."""
    app.connect("source-read", led)
