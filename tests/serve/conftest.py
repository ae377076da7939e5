"""One server of a tiny model for all tests of the API, one of `scenes` for those in a browser."""

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


@pytest.fixture(scope="session")
def scenes_port(tmp_path_factory):
    """A server with the model `scenes` and the plugins of a layout."""
    from guidekit.serve.options import ServeOptions

    own = ServeOptions(
        models=("scenes", "scenes-ddpm"),
        plugins=("zest", "pww", "pag", "ilvr"),
        out=tmp_path_factory.mktemp("scenes"),
        device="cpu",
        preview=1,
    )
    with serving(own) as port:
        yield port


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    from browsing import CHROMIUM

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def context(browser):
    from browsing import WAIT

    made = browser.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True)
    made.set_default_timeout(WAIT)
    yield made
    made.close()


@pytest.fixture
def page(context, port):
    """The page of the module's server; an error of its scripts fails the test."""
    from browsing import opened

    errors = []
    yield opened(context, port, errors)
    assert errors == []
