"""`guidekit plugins new`: a copy of the template plugin under another name."""

import re
from pathlib import Path

from guidekit.errors import GuidekitError
from guidekit.registry import entries

# Of the folder examples/plugin; it may also hold what pip compiled.
FILES = ("README.md", "guidekit_vignette.py", "pyproject.toml", "test_vignette.py")
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def template() -> Path:
    """The folder of the template: in the installed package, or in a checkout."""
    here = Path(__file__).parent.parent
    installed = here / "example_plugin"
    return installed if installed.is_dir() else here.parent / "examples" / "plugin"


def new_plugin(name: str, folder: Path | None = None) -> Path:
    """Writes a distribution `guidekit-NAME` with one guidance into a new folder, and returns it.

    Raises GuidekitError for a name that is no entry's name or taken, and for a folder that exists.
    """
    if not NAME.fullmatch(name):
        raise GuidekitError(
            f"plugin name {name!r}: use small letters, digits and _, a letter first"
        )
    if taken := [entry for entry in entries() if entry.name == name]:
        raise GuidekitError(f"plugin {name!r} is already offered by {taken[0].distribution}")
    folder = Path(f"guidekit-{name}") if folder is None else folder
    if folder.exists():
        raise GuidekitError(f"{folder} exists already; name another folder with --out")
    texts = {file: (template() / file).read_text() for file in FILES}
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise GuidekitError(f"{folder}: {error.strerror}; name another folder with --out") from None
    for file, text in texts.items():
        (folder / _renamed(file, name)).write_text(_renamed(text, name))
    return folder


def _renamed(text: str, name: str) -> str:
    """The template's text with its name, and that of its class, replaced."""
    camel = "".join(part.capitalize() for part in name.split("_"))
    return text.replace("vignette", name).replace("Vignette", camel)
