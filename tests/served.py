"""An application under test: uvicorn on a socket of its own, in a thread."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvloop

from dspark_server.api import ServerSettings
from dspark_server.api.server import Server
from dspark_server.engine.engine import AsyncEngine


@contextmanager
def serving(engine: AsyncEngine, settings: ServerSettings) -> Iterator[tuple[str, Server]]:
    """URL and server of an engine (or what passes for one), ready, until the block ends."""
    server = Server(lambda: engine, settings)
    thread = threading.Thread(target=uvloop.run, args=(server.serve(),))
    thread.start()
    while server.engine is None:
        assert thread.is_alive(), "the server ended while starting"
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive()
