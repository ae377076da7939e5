"""Checks that every relative link of the Markdown files leads to a file; exits with 1 if not."""

import re
import subprocess
import sys
from pathlib import Path

LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?(?:\s+\"[^\"]*\")?\)")
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)


def broken(page: Path) -> list[str]:
    """Links of a page to files that there are not."""
    links = LINK.findall(CODE.sub("", page.read_text()))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    return [link for link in local if not (page.parent / link).exists()]


def main() -> None:
    """Prints the broken links of all Markdown files that git knows."""
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    if not listed:
        sys.exit("git knows no Markdown file here")
    lines = [f"{page}: no file {link}" for page in listed for link in broken(Path(page))]
    print("\n".join(lines) or f"{len(listed)} pages, every link leads to a file")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
