"""One tiny server for all tests that leave it as they found it."""

from collections.abc import Iterator

import pytest

from .support import Running, serving


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture
def server(shared_server: Running) -> Iterator[Running]:
    """Nothing may be left running, and the policy is what it was."""
    yield shared_server
    shared_server.settle()
    shared_server.post("policy", policy="causal", drafter="dspark")
