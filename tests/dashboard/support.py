"""A tiny real engine (random weights, a real drafter, given costs) behind a real uvicorn, and a reader of its feed."""

import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import orjson
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dspark_server.api import ServerSettings
from dspark_server.api.server import Server
from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.engine import AsyncEngine
from dspark_server.speculation.cost_model import LONGEST, Profile
from tests import served
from tests.engine.support import FIXTURES

# Sixteen tokens cost little more than one does, those beyond are dear.
COSTS = Profile((1, 8, 16, 64), (8.0, 9.0, 11.0, 60.0), (1, 16), (0.01, 0.02), 0.0, 0.0)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, and words for the ids above: 512 in all, each with a text of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|none|>": 0, "<|begin|>": 1, "<|end|>": 2}
    for text in [*alphabet, *(f"Ġw{number}" for number in range(512 - 3 - len(alphabet)))]:
        vocabulary[text] = len(vocabulary)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in ("<|none|>", "<|begin|>", "<|end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


def core(
    *,
    selection: str = "causal",
    max_num_seqs: int = 16,
    num_blocks: int = 800,
    clock: Callable[[], float] | None = None,
) -> EngineCore:
    """The vanilla fixture pair. Without a clock costs stay as passed: steps take longer than any that is believed."""
    pair = FIXTURES / "dspark_qwen3_vanilla"
    config = EngineConfig(
        model=str(pair / "target"),
        served_model_name="tiny",
        dtype="float32",
        num_blocks=num_blocks,
        block_size=8,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=192,
        speculative=SpeculativeConfig(method="dspark", model=str(pair / "draft"), selection=selection),
    )
    weeks = itertools.count(0.0, 2 * LONGEST)
    return EngineCore.load(config, COSTS, clock=clock or (lambda: next(weeks)))


@dataclass
class Running:
    """A server under test."""

    url: str
    engine: AsyncEngine
    server: Server
    http: httpx.Client

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, by name and labels but for the model's."""
        lines = [line for line in self.http.get("/metrics").text.splitlines() if not line.startswith("#")]
        pairs = [line.rsplit(" ", 1) for line in lines]
        plain = {re.sub('(engine="0"|model_name="tiny"),?', "", name): float(value) for name, value in pairs}
        return {name.replace(",}", "}"): value for name, value in plain.items()}

    def complete(self, prompt: Any, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 40, "temperature": 0} | fields)

    def post(self, name: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/dashboard/{name}", json=body)

    def wait(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "condition not reached"
            time.sleep(0.01)

    def settle(self) -> None:
        """Wait until nothing runs: an aborted request has left the server at once, and the engine after its step."""
        stats = self.engine.stats
        self.wait(lambda: self.engine.in_flight == 0 and stats.running == 0 and stats.waiting == 0)

    @contextmanager
    def feed(self) -> Iterator["FeedReader"]:
        with self.http.stream("GET", "/dashboard/feed") as response:
            assert response.status_code == 200
            yield FeedReader(response)


class FeedReader:
    """Reads events one by one; `bytes` counts each."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.iter_lines()
        self.sizes: list[int] = []
        self.own: list[dict[str, Any]] = []  # all that was told of own prompts
        name, self.hello = self.event()
        assert name == "hello"

    @property
    def id(self) -> str:
        return str(self.hello["feed"])

    def event(self) -> tuple[str, dict[str, Any]]:
        """The next one; StopIteration at the end."""
        name, data, blank = next(self._lines), next(self._lines), next(self._lines)
        assert blank == ""
        self.sizes.append(len(data))
        return name.removeprefix("event: "), orjson.loads(data.removeprefix("data: "))

    def state(self) -> dict[str, Any]:
        name, state = self.event()
        assert name == "state"
        if state["own"]:
            self.own.append(state["own"])
        return state

    def until(self, condition: Callable[[dict[str, Any]], Any], seconds: float = 30.0) -> dict[str, Any]:
        """Read until a state fulfils the condition."""
        end = time.monotonic() + seconds
        while not condition(state := self.state()):
            assert time.monotonic() < end, f"the feed did not get there: {state}"
        return state

    def text(self, number: int) -> str:
        return "".join(segment for own in self.own if own["number"] == number for segment, _ in own["text"])


@contextmanager
def serving(made: EngineCore | None = None, **settings: Any) -> Iterator[Running]:
    """Serve in a thread."""
    engine = AsyncEngine(made or core(), tokenizer())
    with (
        served.serving(engine, ServerSettings(port=0, **settings)) as (url, server),
        httpx.Client(base_url=url, timeout=30) as http,
    ):
        yield Running(url, engine, server, http)
