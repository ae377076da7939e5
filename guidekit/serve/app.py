"""The server: the page's files, and the API that it and any other client use.

The API is run.json: POST a run, GET its events, GET its files, DELETE to stop it. See
docs/reference/serve-api.md.
"""

import asyncio
import contextlib
import mimetypes
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from guidekit import __version__
from guidekit.errors import GuidekitError, where_of
from guidekit.images import COLOURS
from guidekit.labels import label_sets
from guidekit.registry import Registry
from guidekit.serve.asked import read_asked
from guidekit.serve.jobs import ENDED, Job, Jobs, NoRunError, QueueFullError, records
from guidekit.serve.knobs import plugin_knobs
from guidekit.serve.models import Models
from guidekit.serve.opened import opened
from guidekit.serve.options import ServeOptions
from guidekit.serve.safety import HEADERS, Safety
from guidekit.system.untrusted import inside, parse_json

VERSION = 1  # of the API
ASKERS = 4  # threads that ask models
STATIC = Path(__file__).parent / "static"
SHOWN = (".html", ".json", ".png")  # files of a run that are sent
#: A run's report has its styles inside and no script.
REPORT = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; frame-ancestors 'none'"


class Server:
    """The answers of a server; `app` is what uvicorn runs."""

    def __init__(self, options: ServeOptions):
        self.options, self.registry = options, Registry()
        self.knobs = plugin_knobs(self.registry, options.plugins)  # imports them
        self.models = Models(options.device, options.dtype)
        self.jobs = Jobs(options, self.models)
        self._streams = 0
        self._askers = ThreadPoolExecutor(ASKERS, "guidekit models")
        self.app = Starlette(
            routes=[
                Route("/api", self.about),
                Route("/api/models/{name:path}", self.model),
                Route("/api/tokens", self.tokens, methods=["POST"]),
                Route("/api/open", self.open, methods=["POST"]),
                Route("/api/runs", self.runs),
                Route("/api/runs", self.post, methods=["POST"]),
                Route("/api/runs/{id}", self.run),
                Route("/api/runs/{id}", self.delete, methods=["DELETE"]),
                Route("/api/runs/{id}/events", self.events),
                Route("/api/runs/{id}/files/{path:path}", self.file),
                Route("/", self.page),
                Mount("/static", StaticFiles(directory=STATIC)),
            ],
            middleware=[Middleware(Safety, options=options)],
            exception_handlers={
                GuidekitError: _refusal,
                NoRunError: _no_run,
                QueueFullError: _full,
                HTTPException: _no_answer,
                Exception: _bug,
            },
            lifespan=self.lifespan,
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Draws while the server runs."""
        with self.jobs.working():
            yield
        self._askers.shutdown(wait=False, cancel_futures=True)

    async def page(self, _: Request) -> Response:
        """The page."""
        return FileResponse(STATIC / "index.html")

    async def about(self, _: Request) -> Response:
        """What this server is, and all that a request may name."""
        limits = vars(self.options.limits)
        return JSONResponse(
            {
                "version": VERSION,
                "guidekit": __version__,
                "models": self.options.models,
                "plugins": self.knobs,
                "files": sorted(self.options.files),
                "controls": sorted(self.options.controls),
                "labels": label_sets(),
                "limits": {k: v for k, v in limits.items() if isinstance(v, int)},
                "colours": COLOURS,
            }
        )

    async def model(self, request: Request) -> Response:
        """A model's size, defaults and schedulers; it is loaded for it."""
        name = self._own_model(request.path_params["name"])
        return JSONResponse(await self._asked(self.models.facts, name))

    async def tokens(self, request: Request) -> Response:
        """The tokens of a prompt, and which of them each phrase is."""
        body = await _json(request)
        prompt, phrases = body.get("prompt", ""), body.get("phrases", [])
        entries = isinstance(phrases, list) and all(isinstance(p, dict) for p in phrases)
        if not isinstance(prompt, str) or not entries or len(prompt) > self.options.limits.text:
            raise GuidekitError("give `prompt`, a text, and `phrases`, a list of objects")
        if len(phrases) > self.options.limits.segments:
            raise GuidekitError(f"{self.options.limits.segments} phrases at most")
        name = self._own_model(body.get("model", self.options.models[0]))
        return JSONResponse(await self._asked(self.models.tokens, name, prompt, phrases))

    async def _asked(self, ask: Callable[..., Any], *given: Any) -> Any:
        """What a model says. It may load for long, so others than these wait in other threads."""
        return await asyncio.get_running_loop().run_in_executor(self._askers, ask, *given)

    def _own_model(self, name: Any) -> str:
        if not isinstance(name, str) or name not in self.options.models:
            there = ", ".join(self.options.models)
            raise GuidekitError(f"this server has no model {name!r}; it was started with {there}")
        return str(name)

    async def open(self, request: Request) -> Response:
        """What dropped files hold: layers, settings, plugins."""
        body = await _json(request)
        folder = Path(tempfile.mkdtemp(prefix="guidekit-"))

        def read() -> dict[str, Any]:
            try:
                return opened(body, self.options, folder / "files")
            finally:
                shutil.rmtree(folder)

        return JSONResponse(await run_in_threadpool(read))

    async def runs(self, _: Request) -> Response:
        """All runs, the newest last."""
        return JSONResponse({"runs": [self._summary(job) for job in list(self.jobs.all.values())]})

    async def post(self, request: Request) -> Response:
        """A new run: 201 and how it stands."""
        body = await _json(request)

        def add() -> Job:
            return self.jobs.add(
                lambda folder: read_asked(body, self.options, self.registry, folder)
            )

        job = await run_in_threadpool(add)
        where = {"location": f"/api/runs/{job.id}"}
        return JSONResponse(self._summary(job), status_code=201, headers=where)

    async def run(self, request: Request) -> Response:
        """One run: how it stands, what was asked, run.json of each of its parts, its files."""
        job = self._job(request)
        found = await run_in_threadpool(records, job)
        more = {"body": job.asked.body, "records": found, "files": _files(job)}
        return JSONResponse(self._summary(job) | more)

    async def delete(self, request: Request) -> Response:
        """Stops a run; one that has ended stays as it is."""
        job = self._job(request)
        if job.state not in ENDED:
            self.jobs.end(job)
        return JSONResponse(self._summary(job))

    async def events(self, request: Request) -> Response:
        """The events of a run, those that are past first."""
        job = self._job(request)
        last = request.headers.get("last-event-id", "0")
        if self._streams >= self.options.limits.streams:
            text = "too many listeners; try again later"
            return JSONResponse({"error": text}, 503, {"retry-after": "5"})

        async def stream() -> AsyncIterator[str]:
            self._streams += 1
            try:
                yield "retry: 1000\n\n"
                async for text in job.events.follow(int(last) if last.isdecimal() else 0):
                    yield text
            finally:
                self._streams -= 1

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def file(self, request: Request) -> Response:
        """A file of a run's folder."""
        job, name = self._job(request), request.path_params["path"]
        if job.folder is None:
            return _missing(name)
        path = inside(job.folder, name, "file")
        if path.suffix not in SHOWN or not os.path.isfile(path):
            return _missing(name)
        own = {"content-security-policy": REPORT} if path.suffix == ".html" else None
        return FileResponse(path, headers=own, media_type=mimetypes.guess_type(path.name)[0])

    def _job(self, request: Request) -> Job:
        id = request.path_params["id"]
        if id not in self.jobs.all:
            raise NoRunError(f"no run {id!r}; the server was started anew, or it is long past")
        return self.jobs.all[id]

    def _summary(self, job: Job) -> dict[str, Any]:
        """How a run stands."""
        settings = job.asked.settings
        return {
            "id": job.id,
            "state": job.state,
            "position": self.jobs.position(job),
            "error": job.error,
            "made": job.made,
            "seconds": round(job.seconds, 2),
            "done": job.done,
            "total": job.total,
            "folder": None if job.folder is None else str(job.folder),
            "model": settings.model,
            "prompt": settings.prompt or "",
            "plugins": list(settings.plugin),
            "seeds": list(settings.seeds),
            "compare": settings.compare and bool(settings.plugin) and not job.asked.axes,
            "grid": [[axis.name, list(axis.values)] for axis in job.asked.axes],
            "last": job.events.last,
        }


async def _json(request: Request) -> dict[str, Any]:
    """The object of a request's body."""
    body = parse_json(await request.body(), sent=True)
    if not isinstance(body, dict):
        raise GuidekitError("the body must be a JSON object")
    return body


def _files(job: Job) -> list[str]:
    """Files of a run that may be read, by their paths in its folder."""
    if job.folder is None or not job.folder.is_dir():
        return []
    paths = (path for path in job.folder.rglob("*") if path.suffix in SHOWN and path.is_file())
    return sorted(path.relative_to(job.folder).as_posix() for path in paths)


def _missing(name: str) -> Response:
    return JSONResponse({"error": f"no file {name!r} of this run"}, status_code=404)


async def _refusal(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


async def _no_answer(_: Request, error: Exception) -> Response:
    """No such address, or none for this method."""
    known = cast(HTTPException, error)
    return JSONResponse({"error": known.detail}, known.status_code, known.headers)


async def _bug(_: Request, error: Exception) -> Response:
    """What nobody foresaw; the server's log has it. It is answered outside of Safety."""
    whose = where_of(error) or "guidekit"
    text = f"a bug of {whose}, {type(error).__name__}; the server's log says where"
    return JSONResponse({"error": text}, 500, HEADERS)


async def _no_run(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=404)


async def _full(_: Request, error: Exception) -> Response:
    text = "the queue is full; try again when a run has ended"
    return JSONResponse({"error": text}, 429, {"retry-after": "5"})


def make_app(options: ServeOptions) -> Callable[..., Any]:
    """The ASGI application of a server. Raises GuidekitError for a plugin that cannot be loaded."""
    return Server(options).app
