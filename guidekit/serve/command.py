"""`guidekit serve`. Everything that needs torch or a server is imported inside."""

import importlib.util
import secrets
from pathlib import Path
from typing import Any

import click

from guidekit.cli.errors import traceback_option
from guidekit.cli.terminal import say
from guidekit.errors import GuidekitError

NEEDED = ("starlette", "uvicorn")


@click.command()
@click.option("--model", multiple=True, help="Models to offer; repeat [the built-in ones].")
@click.option("--plugin", multiple=True, help="Plugins to offer; repeat [all installed].")
@click.option("--no-plugin", multiple=True, help="Plugins to leave out.")
@click.option(
    "--file",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="File or folder that a run may name, such as a head or an affinity; repeat.",
)
@click.option(
    "--control",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a ControlNet or T2I-Adapter to offer; repeat.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the runs [out/serve].")
@click.option("--host", default="127.0.0.1", help="Address to listen at [127.0.0.1].")
@click.option("--port", default=8080, type=click.IntRange(0, 65535), help="Port [8080]; 0: any.")
@click.option("--name", multiple=True, help="Name that browsers may call this server by.")
@click.option("--token", help="What clients must know [made where --host is not this machine].")
@click.option("--device", help="cpu, cuda, cuda:1 [cuda if there is one].")
@click.option("--dtype", help="float32, float16 or bfloat16.")
@click.option("--preview", default=3, help="Steps from one preview to the next, 0 for none [3].")
@click.option("--max-side", type=int, help="Most pixels of an image's longer side [1024].")
@click.option("--max-steps", type=int, help="Most denoising steps [250].")
@click.option("--max-images", type=int, help="Most images of a run [16].")
@click.option("--max-queue", type=int, help="Most runs that wait [64].")
@traceback_option
def serve(host: str, port: int, token: str | None, **given: Any) -> None:
    """Open a page to paint masks on, turn knobs and draw."""
    _require_extra()
    say("loading  plugins")
    from guidekit.serve.safety import is_loopback

    token = token or (None if is_loopback(host) else secrets.token_urlsafe(24))
    options = _options(host, token, given)
    from guidekit.serve.running import run_server

    run_server(options, port, lambda link: say(f"open     {link}\nstop     Ctrl-C"))


def _require_extra() -> None:
    """Raises GuidekitError where the extra is not installed."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise GuidekitError(
                f"guidekit serve needs {name}; install it by pip install 'guidekit[serve]'"
            )


def _options(host: str, token: str | None, given: dict[str, Any]) -> Any:
    """What the flags say. Raises GuidekitError for models and plugins that there are not."""
    from guidekit.serve.options import Limits, ServeOptions

    names = ("side", "steps", "images", "queue")
    limits = {name: given[f"max_{name}"] for name in names if given[f"max_{name}"] is not None}
    for name, value in limits.items():
        if value < 1:
            raise GuidekitError(f"--max-{name} must be at least 1, not {value}")
    return ServeOptions(
        models=given["model"] or _built_in(),
        plugins=_plugins(given["plugin"], given["no_plugin"]),
        files=_named(given["file"], "--file"),
        controls=_named(given["control"], "--control"),
        out=given["out"] or Path("out") / "serve",
        device=given["device"],
        dtype=given["dtype"],
        host=host,
        names=given["name"],
        token=token,
        preview=max(0, given["preview"]),
        limits=Limits(**limits),
    )


def _named(paths: tuple[Path, ...], flag: str) -> dict[str, Path]:
    """Files and folders by their last names, by which requests name them."""
    found = {path.name or path.resolve().name: path for path in paths}
    if len(found) < len(paths):
        raise GuidekitError(f"two {flag} have the same last name; rename one")
    return found


def _built_in() -> tuple[str, ...]:
    """The built-in models, the default first."""
    from guidekit.backbones.loading import built_in
    from guidekit.zoo.shipped import DEFAULT

    return tuple(sorted(built_in(), key=lambda name: (name != DEFAULT, name)))


def _plugins(named: tuple[str, ...], blocked: tuple[str, ...]) -> tuple[str, ...]:
    """The plugins to offer; of those that nobody named, one that cannot be loaded is left out."""
    from guidekit.registry import Registry, entries

    registry, found = Registry(blocked), []
    exist = dict.fromkeys(entry.name for entry in entries())
    for name in named or [name for name in exist if name not in blocked]:
        try:
            registry.load(name)
        except GuidekitError as error:
            if named:
                raise
            say(f"note     {error}")
            continue
        found.append(name)
    return tuple(found)
