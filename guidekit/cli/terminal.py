"""What commands print: lines and counts."""

import click

from guidekit.system.untrusted import printable


def say(text: str, err: bool = False) -> None:
    """Prints lines; every command's own words go through here, so that none steers a terminal."""
    click.echo(printable(text), err=err)


def images(count: int, kind: str = "") -> str:
    """A number of images in words, such as `1 image` or `3 finished images`."""
    return f"{count} {kind}{' ' if kind else ''}image{'' if count == 1 else 's'}"
