"""A server that runs until it is stopped, on a socket that is open before the first line."""

import socket
from collections.abc import Callable

import uvicorn

from guidekit.errors import GuidekitError
from guidekit.serve.app import make_app
from guidekit.serve.options import ServeOptions

PATIENCE = 2  # seconds for streams to end when the server stops


def run_server(options: ServeOptions, port: int, ready: Callable[[str], None]) -> None:
    """Serves until Ctrl-C; `ready` is called with the page's address.

    Raises GuidekitError for an address that cannot be had.
    """
    app, listening = make_app(options), bound(options.host, port)
    ready(link(options, listening))
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=PATIENCE, server_header=False
    )
    uvicorn.Server(config).run([listening])


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens at the address; GuidekitError says why there is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise GuidekitError(
            f"{host}:{port}: {error.strerror or error}; choose another by --port or --host"
        ) from None
    listening.set_inheritable(True)
    return listening


def link(options: ServeOptions, listening: socket.socket) -> str:
    """The page's address, with the token where there is one."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    query = "" if options.token is None else f"?token={options.token}"
    return f"http://{host}:{listening.getsockname()[1]}/{query}"
