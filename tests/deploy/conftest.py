"""Live servers: one with the real engine for its series, one with a fake engine for all else."""

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dspark_server.api import ServerSettings
from tests.api.conftest import shared_server, tiny_engine
from tests.api.support import start

from .promql import Series

__all__ = ["live", "shared_server"]


@pytest.fixture(scope="session")
def live() -> Iterator[dict[str, Series]]:
    """Series of a server with the real engine, a drafter and measured costs, after some requests."""
    for server in start(ServerSettings(port=0), tiny_engine("causal")):
        for number in range(4):
            assert server.complete([7 + number, 9], max_tokens=12, temperature=number % 2).status_code == 200
        found = {}
        for family in text_string_to_metric_families(server.http.get("/metrics").text):
            for sample in family.samples:
                found[sample.name] = Series(family.name, family.type, frozenset(sample.labels))
        yield found
