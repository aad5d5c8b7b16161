"""A real uvicorn on a socket, over the fake engine, in a thread."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import openai

from dspark_server.api import ServerSettings
from dspark_server.api.server import Server
from dspark_server.engine.engine import AsyncEngine
from tests.served import serving

from .fake_engine import FakeEngine


@dataclass
class Running:
    """A server under test."""

    url: str
    engine: FakeEngine | AsyncEngine
    server: Server
    http: httpx.Client
    openai: openai.OpenAI

    def complete(self, prompt, **fields) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 100, **fields})

    def chat(self, messages, **fields) -> httpx.Response:
        """A text is one user message."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.http.post("/v1/chat/completions", json={"messages": messages, **fields})

    def canary(self) -> None:
        """The server still works."""
        assert self.complete("say fine").json()["choices"][0]["text"] == "fine"

    def samples(self) -> dict[str, float]:
        """Samples of /metrics by name and labels, as they stand there."""
        lines = [line for line in self.http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def wait(self, condition, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "condition not reached"
            time.sleep(0.005)


def start(settings: ServerSettings, engine: AsyncEngine | None = None, **engine_options) -> Iterator[Running]:
    """Serve in a thread, a fake engine if none is given; a generator, for fixtures."""
    engine = engine or FakeEngine(**engine_options)
    with (
        serving(engine, settings) as (url, server),
        httpx.Client(base_url=url, timeout=20) as http,
        openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client,
    ):
        yield Running(url, engine, server, http, client)
