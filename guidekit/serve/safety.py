"""Who may speak to a server, and how much: hosts, token, origin, size; what a page may load."""

import contextlib
import hmac
import ipaddress
import json
import socket
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from guidekit.serve.options import ServeOptions

COOKIE = "guidekit-token"
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-cache",
}
SAFE = ("GET", "HEAD")
SITES = ("same-origin", "none")  # of the header that browsers send; "none": typed by the user


class Refused(Exception):
    """A request that is not answered: its status, and why."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class Safety:
    """ASGI middleware that refuses what a server of one user must refuse.

    A page of another site can make a browser send requests here. It is kept out by the name that
    the browser calls this server by (rebinding of DNS), by the origin that it names, and by the
    type of the body, which no form can send.
    """

    def __init__(self, app: Callable[..., Any], options: ServeOptions):
        self.app, self.options = app, options

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers, or refuses; every answer has HEADERS."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
                there = {key.lower() for key, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(h for h in own if h[0] not in there)]
            await send(message)

        try:
            self._check(scope, headers)
            receive = _bounded(receive, headers, self.options.limits.body)
            if self.options.token is not None and self._token_of_link(scope) is not None:
                await _go_home(sending, self.options.token)
                return
            await self.app(scope, receive, sending)
        except Refused as refusal:
            await _answer(sending, refusal)

    def _check(self, scope: Any, headers: dict[str, str]) -> None:
        """Raises Refused for a request of somebody else."""
        host = headers.get("host", "")
        if not self._is_own(host):
            raise Refused(421, f"this server is not called {host!r}; add it with --name")
        if scope["method"] not in SAFE or scope["path"].startswith("/api"):
            _check_origin(headers, host)
        if scope["method"] not in SAFE:
            kind = headers.get("content-type", "").partition(";")[0].strip()
            if scope["method"] == "POST" and kind != "application/json":
                raise Refused(415, "send a body of the type application/json")
        if self.options.token is not None and not self._has_token(scope, headers):
            raise Refused(401, "open the address with its token, which the server printed")

    def _is_own(self, host: str) -> bool:
        """Whether a name or address is one of this server's; an address cannot be rebound."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        names = {"localhost", self.options.host, socket.gethostname(), *self.options.names}
        if name.lower() in {own.lower() for own in names}:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not is_loopback(self.options.host)

    def _has_token(self, scope: Any, headers: dict[str, str]) -> bool:
        """Whether the token is in the header, the cookie or the link."""
        cookies: SimpleCookie = SimpleCookie()
        with contextlib.suppress(CookieError):
            cookies.load(headers.get("cookie", ""))
        given = [headers.get("authorization", "").removeprefix("Bearer ")]
        given += [cookies[COOKIE].value] if COOKIE in cookies else []
        given += [link] if (link := self._token_of_link(scope)) else []
        wanted = (self.options.token or "").encode()
        return any(hmac.compare_digest(one.encode(), wanted) for one in given)

    def _token_of_link(self, scope: Any) -> str | None:
        """The token in the page's own address, which becomes a cookie."""
        if self.options.token is None or scope["path"] != "/" or scope["method"] != "GET":
            return None
        found = parse_qs(scope["query_string"].decode("latin-1")).get("token")
        return found[0] if found else None


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_origin(headers: dict[str, str], host: str) -> None:
    """Raises Refused for a change that a page of another site asks for."""
    origin = headers.get("origin")
    if origin is not None and _host_of(origin) != host:
        raise Refused(403, f"a page of {origin} may not use this server")
    if headers.get("sec-fetch-site", "none") not in SITES:
        raise Refused(403, "a page of another site may not use this server")


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # no address at all
        return None


def _bounded(receive: Any, headers: dict[str, str], most: int) -> Any:
    """`receive` that ends a body which is too long, whether or not it said so before."""
    text = f"a request has {most >> 20} MB at most"
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > most:
        raise Refused(413, text)
    read = 0

    async def receiving() -> Any:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > most:
            raise Refused(413, text)
        return message

    return receiving


async def _answer(send: Any, refusal: Refused) -> None:
    body = json.dumps({"error": str(refusal)}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    start = {"type": "http.response.start", "status": refusal.status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})


async def _go_home(send: Any, token: str) -> None:
    """Keeps the token as a cookie, and takes it out of the address."""
    cookie = f"{COOKIE}={token}; Path=/; HttpOnly; SameSite=Strict"
    headers = [(b"location", b"/"), (b"set-cookie", cookie.encode())]
    await send({"type": "http.response.start", "status": 303, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
