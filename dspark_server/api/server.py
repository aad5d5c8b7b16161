"""Runs the application under uvicorn, from before the model is loaded to a clean end.

The socket opens first: a port in use is known at once, and probes learn that the model is loading (loading.py).

SIGTERM: readiness turns 503 and new requests are refused while the listener stays open; running requests may finish
within `shutdown_timeout`; those that do not are ended with one error event; the exit code is 0. A second signal ends
the server at once, as does one while the model loads. When the engine is dead, readiness is 503, and a second later
`serve` ends with an error.
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
# Seconds an idle connection is kept: longer than clients (httpx 5) and proxies (60) keep theirs, so that they close
# it, and never the server while a request is on its way.
KEEP_ALIVE = 75
LAST_LOOK = 1.0  # seconds a server with a dead engine still answers: readiness shows it, requests get their error
LAST_WORDS_TIMEOUT = 5  # seconds for the last chunks to reach their readers
MOST_FRAMING = 2 << 20  # most bytes of a request besides its body; beyond, its connection is closed
CHUNK_FRAMING = 16  # bytes allowed per byte of a body in chunks, that byte included
LINGER_TIMEOUT = 30.0  # seconds for the rest of a body after an early answer
LINGER_BYTES = 64 << 20  # most bytes of that rest; it is dropped, but many clients read only after sending all
MAX_PIPELINED = 64  # requests that a connection may send ahead of their answers


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with the bounds it lacks.

    Three deadlines: for a request's headers, for a reader that takes nothing, and for the rest of a body after an early
    answer. Limits on everything besides the body (headers, chunk extensions, trailers: the parser stores them before
    keys are checked), on the rest of a body, and on pipelined requests.
    """

    stall_timeout = 60.0
    max_header_bytes = 64 << 10
    _framing = 0  # bytes of the current request besides its body, less the allowance for chunks
    _lingering = 0  # bytes of its body that came after the answer
    _deadlines: dict[str, asyncio.TimerHandle]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline for the first headers."""
        self._deadlines = {}
        super().connection_made(transport)
        self._expect("headers", HEADER_TIMEOUT)

    def data_received(self, data: bytes) -> None:
        """Parse bytes from the client and apply the limits."""
        self._framing += len(data)
        super().data_received(data)
        if self._framing > max(MOST_FRAMING, self.max_header_bytes) or len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        """Count part of a body: chunks may be as small as a byte, with a few bytes of framing each."""
        self._framing = max(0, self._framing - CHUNK_FRAMING * len(body))
        if self.cycle.response_complete:
            self._lingering += len(body)
            if self._lingering > LINGER_BYTES:
                self.transport.abort()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Reset the counts: the request is complete, and the next one may follow."""
        self._framing = self._lingering = 0
        self._settle("rest")
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Start the deadline for the rest of the body, if the answer came before its end."""
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body and not self.transport.is_closing():
            self._expect("rest", LINGER_TIMEOUT)

    def on_message_begin(self) -> None:
        """Start the deadline for the headers of a request, the first of its connection or a later one."""
        super().on_message_begin()
        self._expect("headers", HEADER_TIMEOUT)

    def on_headers_complete(self) -> None:
        """End the deadline for headers; the body has a deadline elsewhere."""
        self._settle("headers")
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """Start the reader's deadline: the send buffer is full, senders wait, and their tokens are merged."""
        super().pause_writing()
        self._expect("reader", self.stall_timeout)

    def resume_writing(self) -> None:
        """End the reader's deadline: it took data."""
        self._settle("reader")
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End all deadlines: the client left, or was cut off."""
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
    """The server had to end while a model was loading on a thread that cannot be stopped: end the process at once."""


class Server(uvicorn.Server):
    """uvicorn that loads its engine after it listens, and drains it before it closes its listener."""

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
        """Listen, load, serve until SIGTERM or SIGINT is handled, stop the engine.

        Run it on a uvloop (`uvloop.run`): uvicorn's loop setting does not apply inside a coroutine.

        Raises ConfigError if it cannot listen, the errors of `load`, StillLoading, and EngineDeadError if the engine
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
        """Listen, and begin to load. Raises ConfigError if it cannot listen; uvicorn logs the reason."""
        try:
            await super().startup(sockets)
        except SystemExit:
            where = f"{self.config.host}, port {self.config.port}"
            raise ConfigError(f"cannot listen at {where}: choose another with --host and --port.") from None
        self._loading = asyncio.create_task(self._load_engine())

    async def _load_engine(self) -> None:
        # libgomp keeps a pool of workers per calling thread: the loading thread's pool ends with that thread.
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
        # Objects made so far live as long as the server (`serve` releases them): a full collection would scan them, an
        # eighth of a second in which no request gets a token.
        gc.collect()
        gc.freeze()
        return engine, app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Count a signal. uvicorn's handler would raise the signal again at the end: the exit code would not be 0."""
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Watch loading, signals and the engine; called ten times a second."""
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
    """Drops requests to some paths from uvicorn's access log; query strings are ignored."""

    def __init__(self, paths: Iterable[str]) -> None:
        super().__init__()
        self._paths = frozenset(paths)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log a record; its arguments are client, method, path with query, HTTP version and status."""
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
    """Serve on a new uvloop; returns after a graceful shutdown."""
    import uvloop

    uvloop.run(serve(load, settings))
