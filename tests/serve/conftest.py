"""One server of a tiny model for all tests of the API."""

import pytest

from serving import Client, serving


@pytest.fixture(scope="session")
def options(model, tmp_path_factory):
    """What the server was started with: the tiny model and some plugins."""
    from guidekit.serve.options import Limits, ServeOptions

    return ServeOptions(
        models=(str(model),),
        plugins=("zest", "pag", "ilvr", "fewshot", "clip", "energy"),
        out=tmp_path_factory.mktemp("out"),
        device="cpu",
        preview=1,
        limits=Limits(steps=50, images=4, side=256, cells=6, queue=60, segments=4),
    )


@pytest.fixture(scope="session")
def port(options):
    """Where the server listens."""
    with serving(options) as port:
        yield port


@pytest.fixture
def client(port):
    """A client of the server."""
    return Client(port)


@pytest.fixture
def body(model):
    """A run of one image in two steps."""
    sample = {"model": str(model), "prompt": "a red circle on white", "steps": 2, "seeds": [3]}
    return {"format": 1, "sample": sample | {"compare": False}}
