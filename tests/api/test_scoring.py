"""Log-probabilities of a prompt, over the real engine: those its tokens had when they were generated."""

from collections.abc import Iterator

import pytest

from dspark_server.api import ServerSettings

from .conftest import tiny_engine
from .support import Running, start


@pytest.fixture(scope="module")
def tiny_server() -> Iterator[Running]:
    yield from start(ServerSettings(port=0), tiny_engine("fixed"))


@pytest.mark.parametrize("max_tokens", [0, 1], ids=["prompt alone", "and a token, as lm-eval asks"])
def test_a_prompt_is_scored_as_it_was_generated(tiny_server: Running, max_tokens: int) -> None:
    prompts = [[5, 9, 11], [7] * 20, [300, 2]]
    sampled = {"temperature": 0.9, "seed": 3, "max_tokens": 24, "logprobs": 1, "ignore_eos": True}
    written = tiny_server.complete(prompts, **sampled, return_token_ids=True).json()["choices"]
    whole = [prompt + choice["token_ids"] for prompt, choice in zip(prompts, written, strict=True)]
    fields = {"echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
    scored = tiny_server.complete(whole, **fields).json()["choices"]
    for prompt, before, after, tokens in zip(prompts, written, scored, whole, strict=True):
        logprobs = after["logprobs"]["token_logprobs"]
        assert logprobs[0] is None
        assert len(logprobs) == len(tokens) + max_tokens
        expected = before["logprobs"]["token_logprobs"]
        assert logprobs[len(prompt) : len(tokens)] == pytest.approx(expected, abs=1e-4)
