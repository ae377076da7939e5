"""`guidekit` and `python -m guidekit`: the group of commands, which import torch when they run."""

import copy
import sys
from typing import Any

import click

from guidekit import __version__
from guidekit.cli.affinity import affinity
from guidekit.cli.doctor import doctor
from guidekit.cli.errors import Tracebacks, shown_errors, traceback_option
from guidekit.cli.evaluate import evaluate
from guidekit.cli.heads import augment, fit
from guidekit.cli.plugins import plugins
from guidekit.cli.sample import sample
from guidekit.cli.status import status
from guidekit.cli.train import train
from guidekit.cli.transfer import transfer
from guidekit.cli.tune import tune
from guidekit.errors import GuidekitError, blame
from guidekit.serve.command import serve

EPILOG = "Plugins add commands under their own names; `guidekit plugins` lists the plugins."


class Commands(click.Group):
    """The built-in commands, and those of a plugin when one of that name is asked for."""

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """A command by name; the plugin of that name is imported for it."""
        own = super().get_command(ctx, name)
        return own or _plugin_command(name)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command; click itself would answer Ctrl-C with an empty line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None

    def main(self, args=None, prog_name=None, **extra) -> None:
        """Runs, and turns errors into one line and an exit code."""
        tracebacks = Tracebacks()
        extra |= {"standalone_mode": False, "obj": tracebacks}
        with shown_errors(tracebacks):
            code = super().main(args, prog_name or "guidekit", **extra)
            sys.exit(code if isinstance(code, int) else 0)


def _plugin_command(name: str) -> click.Command | None:
    """The one command of a plugin, or a group of its several; None if it has none."""
    from guidekit.registry import Registry, entries

    if name not in {entry.name for entry in entries()}:
        return None
    commands = Registry().commands(name)
    if not commands:
        raise GuidekitError(f"plugin {name!r} adds no command; see guidekit plugins show {name}")
    commands = [_blamed(command, name) for command in commands]
    if len(commands) == 1:
        return commands[0]
    return click.Group(name, commands={c.name: c for c in commands})


def _blamed(command: click.Command, plugin: str) -> click.Command:
    """A copy of a plugin's command whose unexpected errors name the plugin."""

    def invoke(ctx: click.Context) -> Any:
        with blame(plugin, f"command {command.name}"):
            return command.invoke(ctx)

    blamed = copy.copy(command)
    blamed.invoke = invoke
    return blamed


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="guidekit")
@traceback_option
def main() -> None:
    """Steer frozen diffusion backbones while they sample."""


OWN = (
    sample,
    serve,
    status,
    evaluate,
    tune,
    plugins,
    fit,
    augment,
    affinity,
    transfer,
    train,
    doctor,
)
for command in OWN:
    main.add_command(command)

if __name__ == "__main__":
    main(prog_name="guidekit")
