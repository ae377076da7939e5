"""`pytest --guidekit-plugin NAME`: the conformance checks of an installed plugin as tests.

pytest loads this module in every run, so it imports nothing heavy until the option is given.
"""

from pathlib import Path

import pytest

from guidekit.errors import GuidekitError

GUIDANCES = pytest.StashKey[dict[str, type]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option."""
    parser.getgroup("guidekit").addoption(
        "--guidekit-plugin",
        action="append",
        default=[],
        metavar="NAME",
        help="run guidekit's conformance checks on an installed plugin; repeat for several",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Imports the named plugins; their checks run alone unless tests are named as well."""
    names = config.getoption("guidekit_plugin")
    if not names:
        return
    try:
        config.stash[GUIDANCES] = _guidances(names)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    checks = str(Path(__file__).parent / "testing" / "conformance.py")
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    config.args = [*config.args, checks] if named else [checks]


def _guidances(names: list[str]) -> dict[str, type]:
    """Guidances by name: all of an entry, or the one that is named."""
    from guidekit.registry import Registry

    registry, found = Registry(), {}
    for name in names:
        offered = registry.load(name.partition(".")[0]).guidances
        found |= {name: registry.guidance_class(name)} if "." in name else offered
    if not found:
        raise GuidekitError(f"{', '.join(names)} registers no guidance")
    return found
