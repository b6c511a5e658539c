"""The page's server, on this machine alone: it shows the page, takes requests, and draws them one after the other.

It listens at 127.0.0.1 and answers only pages of its own, so that no other site that is open in the browser can ask it. Nothing
it shows is from another host: the browser is told to fetch from here alone.
"""

import asyncio
import json
import socket
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ldm.errors import Refusal
from ldm.page.session import Session, Stopped

try:
    from aiohttp import web
except ImportError as error:
    raise Refusal("ldm draw needs aiohttp: pip install 'ldm[page]'.") from error

ASSETS = Path(__file__).parent / "assets"
LIMIT = 2**26  # bytes of a request, its pictures with it
HERE = ("127.0.0.1", "localhost", "::1")
ONLY_FROM_HERE = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": ONLY_FROM_HERE,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Job:
    """One request of a page: what it is told, and whether anybody still waits for it."""

    def __init__(self) -> None:
        self.loop, self.events, self.stop = asyncio.get_running_loop(), asyncio.Queue[Any](), threading.Event()

    def tell(self, event: dict[str, Any] | None) -> None:
        """From any thread; None is the end."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Server:
    """Answers for one session; its jobs are drawn in the order in which they came."""

    def __init__(self, session: Session) -> None:
        self.session, self.jobs, self.worker = session, list[Job](), ThreadPoolExecutor(1, "drawing")

    def app(self) -> web.Application:
        """What aiohttp runs."""
        app = web.Application(middlewares=[_guard], client_max_size=LIMIT)
        app.on_response_prepare.append(_add_headers)
        app.on_shutdown.append(self._stop)
        app.on_cleanup.append(self._end)
        app.router.add_get("/", _asset)
        app.router.add_get("/page/{name}", _asset)
        app.router.add_get("/description", self._describe)
        app.router.add_get("/drawings", self._drawings)
        app.router.add_get("/drawings/{folder}/{name}", self._picture)
        app.router.add_post("/draw", self._draw)
        return app

    async def _describe(self, request: web.Request) -> web.Response:
        return web.json_response(self.session.description)

    async def _drawings(self, request: web.Request) -> web.Response:
        return web.json_response(self.session.drawings)

    async def _picture(self, request: web.Request) -> web.StreamResponse:
        folder, name = request.match_info["folder"], request.match_info["name"]
        for drawing in self.session.drawings:
            if drawing["folder"] == folder and name in (*drawing["pictures"], *drawing["shown"]):
                return web.FileResponse(self.session.out / folder / name)
        raise web.HTTPNotFound

    async def _draw(self, request: web.Request) -> web.StreamResponse:
        """Answers with a line of JSON for each thing that happens, until all is drawn; who goes away stops what he asked for."""
        said, given = await _read(request)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        job = Job()
        self.jobs.append(job)
        if len(self.jobs) > 1:
            job.tell({"waiting": len(self.jobs) - 1})
        ended = asyncio.wrap_future(self.worker.submit(self._work, job, said, given))
        ended.add_done_callback(lambda _: self._leave(job))
        try:
            await response.prepare(request)
            while (event := await job.events.get()) is not None:
                await response.write(json.dumps(event).encode() + b"\n")
            await response.write_eof()
        except ConnectionResetError:  # the page was closed
            pass
        finally:
            job.stop.set()
        return response

    def _work(self, job: Job, said: dict[str, Any], given: dict[str, bytes]) -> None:
        """In the one thread that draws."""
        try:
            if not job.stop.is_set():
                job.tell({"waiting": 0})
                self.session.draw(said, given, job.tell, job.stop.is_set)
        except Stopped:
            job.tell({"error": "stopped"})
        except Refusal as error:
            job.tell({"error": str(error)})
        except Exception as error:  # of a user's own part, or too little memory: said in one line here, whole in the terminal
            traceback.print_exc()
            job.tell({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        finally:
            job.tell(None)

    def _leave(self, job: Job) -> None:
        self.jobs.remove(job)
        for place, other in enumerate(self.jobs[1:], 1):
            other.tell({"waiting": place})

    async def _stop(self, app: web.Application) -> None:
        for job in self.jobs:
            job.stop.set()

    async def _end(self, app: web.Application) -> None:
        await asyncio.to_thread(self.worker.shutdown)


@contextmanager
def listen(port: int) -> Iterator[socket.socket]:
    """A socket at a port of 127.0.0.1.

    Raises:
        Refusal: the port is taken, or is none.
    """
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HERE[0], port))
        except (OSError, OverflowError) as error:
            raise Refusal(f"port={port}: {error}. Take another, or port=0 for a free one.") from error
        yield listening


def serve(session: Session, listening: socket.socket) -> None:
    """Serves the page until Ctrl-C, which stops what is being drawn."""
    print(
        f"The page is at http://{HERE[0]}:{listening.getsockname()[1]}, what it draws in {session.out}. Ctrl-C closes it.",
        flush=True,
    )
    settings = {"print": None, "access_log": None, "handler_cancellation": True, "shutdown_timeout": 5}
    web.run_app(Server(session).app(), sock=listening, **settings)


async def _read(request: web.Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    """-> what is said, and the pictures by name.

    Raises:
        Refusal: it is no request of the page's.
    """
    form = await request.post()
    pictures = {name: field.file.read() for name, field in form.items() if isinstance(field, web.FileField)}
    try:
        said = json.loads(form["request"])
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise Refusal("request: wanted JSON, as the page sends it.") from error
    if not isinstance(said, dict) or len(form) != len(pictures) + 1:
        raise Refusal("request: wanted values by name, and beside them pictures alone.")
    return said, pictures


@web.middleware
async def _guard(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """Answers own pages alone, and every fault in one line."""
    host, origin = request.host, request.headers.get("Origin")
    if urlsplit(f"//{host}").hostname not in HERE or (origin is not None and urlsplit(origin).netloc != host):
        return web.json_response({"error": f"This page is for 127.0.0.1 and localhost, not for {origin or host}."}, status=403)
    try:
        return await handler(request)
    except Refusal as error:
        return web.json_response({"error": str(error)}, status=400)
    except web.HTTPRequestEntityTooLarge:
        return web.json_response({"error": f"The pictures are larger than {LIMIT >> 20} MB together."}, status=413)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)


async def _asset(request: web.Request) -> web.FileResponse:
    name = request.match_info.get("name", "index.html")
    if name not in {path.name for path in ASSETS.iterdir()}:
        raise web.HTTPNotFound
    return web.FileResponse(ASSETS / name)
