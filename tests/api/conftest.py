"""Servers for the tests of the HTTP edge."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark_server.api import ServerSettings
from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.engine import AsyncEngine
from dspark_server.speculation.cost_model import Profile

from .fake_engine import build_tokenizer
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


COSTS = Profile((1, 64, 256), (1e-3, 1.1e-3, 2e-3), (1, 16), (2e-4, 3e-4), 0.0, 0.0)  # drafting pays


def tiny_engine(selection: str) -> AsyncEngine:
    """The real engine over a random model and its drafter, or without ("none"); one token per byte, as the fake one."""
    pair = Path(__file__).parents[1] / "fixtures" / "dspark_qwen3_vanilla"
    speculative = SpeculativeConfig(method="none")
    if selection != "none":
        speculative = SpeculativeConfig(method="dspark", model=str(pair / "draft"), selection=selection)
    config = EngineConfig(
        model=str(pair / "target"), served_model_name="tiny", dtype="float32", num_blocks=256, speculative=speculative
    )
    return AsyncEngine(EngineCore.load(config, COSTS), build_tokenizer())
