"""One folder of real scenes for the tests of a file."""

import pytest

from scene_files import write_scenes


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Real scenes of the test split, the first N, as a folder of PNG with their captions."""
    return write_scenes(tmp_path_factory.mktemp("drawn"))
