"""Servers for the tests of the HTTP edge."""

from collections.abc import Iterator

import pytest

from dspark_server.api import ServerSettings

from .support import Running, start


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Running]:
    yield from start(ServerSettings(port=0, max_body_bytes=4 << 20))


@pytest.fixture
def server(shared_server: Running) -> Iterator[Running]:
    """The shared server; nothing may be left running by a test."""
    yield shared_server
    shared_server.wait(lambda: shared_server.engine.in_flight == 0)


@pytest.fixture
def own_server(request) -> Iterator[Running]:
    """A server of its own, with `indirect` options for the fake engine and the settings."""
    options = dict(getattr(request, "param", {}))
    settings = ServerSettings(port=0, **options.pop("settings", {}))
    yield from start(settings, **options)
