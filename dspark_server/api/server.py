"""Runs the application under uvicorn from before the model is loaded, and ends it well.

The socket opens first: a port in use is known at once, and probes are told that the model is loading (loading.py).

SIGTERM: readiness turns 503 and new requests are refused while the listener stays open; running requests may finish
within `shutdown_timeout`; those that do not are ended with one error event; the exit code is 0. A second signal does
not wait, nor does one while the model loads. When the engine is dead, readiness is 503, and a second later `serve`
ends with an error.
"""

import asyncio
import copy
import gc
import logging
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from types import FrameType
from typing import Any, cast

import uvicorn
import uvicorn.config
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dspark_server.api.app import create_app
from dspark_server.api.loading import Door, create_loading_app
from dspark_server.api.logs import JsonFormatter
from dspark_server.api.settings import ServerSettings
from dspark_server.engine.engine import AsyncEngine
from dspark_server.errors import ConfigError, EngineDeadError

logger = logging.getLogger(__name__)

HEADER_TIMEOUT = 30.0  # seconds in which a request's headers must have arrived
# Seconds an idle connection is kept: longer than clients (httpx 5) and proxies (60) keep theirs, so that it is they who
# close it, and never the server under a request that is on its way.
KEEP_ALIVE = 75
LAST_LOOK = 1.0  # seconds a server with a dead engine still answers: readiness shows it, requests get their error
LAST_WORDS_TIMEOUT = 5  # seconds for the last chunks to reach their readers
MOST_FRAMING = 2 << 20  # bytes of a request that are not body before its connection is cut
CHUNK_FRAMING = 16  # bytes that each byte of a body may come with, itself among them
LINGER_TIMEOUT = 30.0  # seconds in which the rest of a body must have arrived that was answered before its end
LINGER_BYTES = 64 << 20  # most of that rest: it is dropped, but many clients read only once they have sent all
MAX_PIPELINED = 64  # requests that a connection may send ahead of their answers


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with the bounds it lacks.

    Three deadlines: for a request's headers, for a reader that takes nothing, and for the rest of a body that has been
    answered. A bound on all that is not body (headers, chunk extensions, trailers: the parser keeps them before anybody
    is asked for a key), one on the rest of a body, and one on pipelined requests.
    """

    stall_timeout = 60.0
    max_header_bytes = 64 << 10
    _framing = 0  # bytes of the current request that are not body, less what its body may need
    _lingering = 0  # bytes of its body that came behind the answer
    _deadlines: dict[str, asyncio.TimerHandle]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected; it must say something."""
        self._deadlines = {}
        super().connection_made(transport)
        self._expect("headers", HEADER_TIMEOUT)

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        self._framing += len(data)
        super().data_received(data)
        if self._framing > max(MOST_FRAMING, self.max_header_bytes) or len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        """Part of a body: it may come in chunks as small as a byte, with a few bytes of framing each."""
        self._framing = max(0, self._framing - CHUNK_FRAMING * len(body))
        if self.cycle.response_complete:
            self._lingering += len(body)
            if self._lingering > LINGER_BYTES:
                self.transport.abort()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is here, and with it perhaps the next."""
        self._framing = self._lingering = 0
        self._settle("rest")
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer is on its way, perhaps before the end of its request."""
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body and not self.transport.is_closing():
            self._expect("rest", LINGER_TIMEOUT)

    def on_message_begin(self) -> None:
        """A request begins, the first of its connection or a later one."""
        super().on_message_begin()
        self._expect("headers", HEADER_TIMEOUT)

    def on_headers_complete(self) -> None:
        """The headers are here: the body has a deadline elsewhere."""
        self._settle("headers")
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """The send buffer is full; senders wait, and their tokens are merged."""
        super().pause_writing()
        self._expect("reader", self.stall_timeout)

    def resume_writing(self) -> None:
        """The reader took something."""
        self._settle("reader")
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left, or was cut off."""
        for name in list(self._deadlines):
            self._settle(name)
        super().connection_lost(exc)

    def _expect(self, name: str, seconds: float) -> None:
        self._settle(name)
        self._deadlines[name] = asyncio.get_running_loop().call_later(seconds, self.transport.abort)

    def _settle(self, name: str) -> None:
        deadline = self._deadlines.pop(name, None)
        if deadline is not None:
            deadline.cancel()


class StillLoading(Exception):
    """Told to end while a model was loading, on a thread that cannot be stopped: end the process without waiting."""


class Server(uvicorn.Server):
    """uvicorn that loads its engine once it listens, and drains it before it closes its listener."""

    def __init__(self, load: Callable[[], AsyncEngine], settings: ServerSettings) -> None:
        """`load` makes the engine; it runs on a thread that ends with it."""
        self._door = Door(create_loading_app(settings))
        super().__init__(_config(self._door, settings))
        self.engine: AsyncEngine | None = None  # once it is loaded and started
        self._load = load
        self._loading: asyncio.Task[None] | None = None
        self._settings = settings
        self._signals = 0
        self._drain: asyncio.Task[None] | None = None
        self._died: float | None = None  # monotonic seconds

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, load, serve until SIGTERM or SIGINT has been honoured, stop the engine.

        Run it on a uvloop (`uvloop.run`): uvicorn's loop setting does not apply inside a coroutine.

        Raises ConfigError where it cannot listen, what `load` raises, StillLoading, and EngineDeadError if the engine
        died: the process cannot serve any more and should end.
        """
        try:
            await super().serve(sockets)
        finally:
            if self.engine is not None:
                await self.engine.stop()
        if self.engine is None:
            if self._loading is None or not self._loading.done():
                raise StillLoading
            self._loading.result()
        elif self.engine.failure is not None:
            raise EngineDeadError(f"The engine has stopped: {self.engine.failure}.")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and begin to load. Raises ConfigError where it cannot listen; uvicorn logs why."""
        try:
            await super().startup(sockets)
        except SystemExit:
            where = f"{self.config.host}, port {self.config.port}"
            raise ConfigError(f"cannot listen at {where}: choose another with --host and --port.") from None
        self._loading = asyncio.create_task(self._load_engine())

    async def _load_engine(self) -> None:
        # libgomp keeps a pool of workers per calling thread: that of the loading thread ends with it.
        loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        loaded = loader.submit(self._prepare)
        loader.shutdown(wait=False)
        engine, app = await asyncio.wrap_future(loaded)
        await engine.start()
        self.engine, self._door.app = engine, app
        logger.info("%s ready: %s; %s", engine.model_name, engine.backend, engine.speculation)

    def _prepare(self) -> tuple[AsyncEngine, FastAPI]:
        engine = self._load()
        app = create_app(engine, self._settings)
        app.state.intake.warm_up()
        # What there is now stays as long as the server (`serve` lets it go): a full collection would look at all of it
        # each time, an eighth of a second in which nobody gets a token.
        gc.collect()
        gc.freeze()
        return engine, app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler. Not uvicorn's, which raises the signal again at the end: the exit code would not be 0."""
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self.engine is None:
            failed = self._loading is not None and self._loading.done()
            self.should_exit = self.should_exit or failed or self._signals > 0
        else:
            self._look_after(self.engine)
        return await super().on_tick(counter)

    def _look_after(self, engine: AsyncEngine) -> None:
        if self._signals and self._drain is None:
            self._drain = asyncio.create_task(self._drain_engine(engine))
        if self._drain is not None and self._drain.done():
            self._drain.result()
            self.should_exit = True
        if engine.health() != "dead":
            self._died = None
        elif self._died is None:
            self._died = monotonic()
        elif monotonic() > self._died + LAST_LOOK:
            self.should_exit = True

    async def _drain_engine(self, engine: AsyncEngine) -> None:
        logger.info("shutting down: running requests have %.0f s to finish", self._settings.shutdown_timeout)
        engine.begin_drain()
        deadline = monotonic() + self._settings.shutdown_timeout
        idle = False
        while not idle and monotonic() < deadline and self._signals < 2:
            idle = await engine.wait_idle(min(0.2, max(0.0, deadline - monotonic())))
        if not idle:
            engine.fail_all("The server is shutting down.")


def _config(app: Door, settings: ServerSettings) -> uvicorn.Config:
    class ConfiguredProtocol(Protocol):
        stall_timeout = settings.stall_timeout
        max_header_bytes = settings.max_header_bytes

    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=ConfiguredProtocol,
        ws="none",
        lifespan="on",
        access_log=settings.access_log,
        log_config=_log_config(settings),
        log_level=settings.log_level,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=LAST_WORDS_TIMEOUT,
    )


class PathFilter(logging.Filter):
    """Leaves requests to some paths out of uvicorn's access log; a query string changes nothing."""

    def __init__(self, paths: Iterable[str]) -> None:
        super().__init__()
        self._paths = frozenset(paths)

    def filter(self, record: logging.LogRecord) -> bool:
        """The arguments of such a record are client, method, path with query, HTTP version and status."""
        _, _, path, *_ = cast("tuple[str, ...]", record.args)
        return path.partition("?")[0] not in self._paths


def _log_config(settings: ServerSettings) -> dict[str, Any]:
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["filters"] = {"paths": {"()": PathFilter, "paths": settings.disable_access_log_for_endpoints}}
    config["handlers"]["access"]["filters"] = ["paths"]
    if settings.log_format == "json":
        config["formatters"] = {name: {"()": JsonFormatter} for name in config["formatters"]}
    return config


async def serve(
    load: Callable[[], AsyncEngine],
    settings: ServerSettings | None = None,
    *,
    sockets: list[socket.socket] | None = None,
) -> None:
    """Serve the engine that `load` makes; see Server.serve."""
    try:
        await Server(load, settings or ServerSettings()).serve(sockets)
    finally:
        gc.unfreeze()


def run(load: Callable[[], AsyncEngine], settings: ServerSettings | None = None) -> None:
    """The same on a uvloop of its own; returns after a graceful shutdown."""
    import uvloop

    uvloop.run(serve(load, settings))
