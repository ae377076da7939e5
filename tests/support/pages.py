"""The blocks and commands of the pages, in their order."""

import re
import shlex
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [page for page in DOCS if page.parent.name in ("tutorial", "howto")]


def blocks(page):
    """Language and text of every block of code, also of those in a list."""
    found = re.findall(r"^ *```(\S*)\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [(language, textwrap.dedent(text)) for language, text in found]


def commands(page):
    """Every `guidekit ...` of the code blocks, as words, also behind a launcher's `-m`."""
    text = "\n".join(body for _, body in blocks(page)).replace("\\\n", " ")
    for part in re.split(r"&&|\n", text):
        found = re.match(
            r"\s*(?:run: )?(?:(?:torchrun|accelerate launch) .*-m )?(guidekit .*)", part
        )
        if found:
            yield shlex.split(found[1], comments=True)[1:]


def python_blocks(page):
    """What a reader can run as it stands; blocks of extras or of a reader's own files are `py`."""
    return [text for language, text in blocks(page) if language == "python"]
