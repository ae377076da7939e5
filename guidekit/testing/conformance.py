"""The tests behind `pytest --guidekit-plugin NAME`; see guidekit/pytest_plugin.py."""

import pytest

from guidekit.pytest_plugin import GUIDANCES
from guidekit.testing import CHECKS, run_check


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every check for every guidance of the plugins that were named."""
    cases = [
        pytest.param(cls, check, id=f"{name}-{check}")
        for name, cls in metafunc.config.stash.get(GUIDANCES, {}).items()
        for check in CHECKS
    ]
    metafunc.parametrize(("cls", "check"), cases)


def test_guidance(cls: type, check: str) -> None:
    """One check of one guidance; skipped with the reason where it does not apply."""
    if reason := run_check(cls, check):
        pytest.skip(reason)
