"""The real engine behind HTTP: what the fake one cannot say."""

from collections.abc import Iterator

import pytest

from dspark_server.api import ServerSettings

from .conftest import tiny_engine
from .support import Running, start
from .test_completions import stream


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


@pytest.mark.parametrize("streaming", [False, True])
def test_choices_share_the_scores_of_their_prompt(tiny_server: Running, streaming: bool) -> None:
    prompts = [[5, 9, 11, 7, 8], [9, 300]]
    fields = {"echo": True, "logprobs": 2, "max_tokens": 3, "ignore_eos": True, "n": 3}
    if streaming:
        chunks = [chunk["choices"][0] for chunk in stream(tiny_server, prompts, **fields)]
        found: dict[int, list[float | None]] = {}
        for chunk in chunks:
            found.setdefault(chunk["index"], []).extend(chunk["logprobs"]["token_logprobs"])
        values = [found[index] for index in range(6)]
    else:
        choices = tiny_server.complete(prompts, **fields).json()["choices"]
        values = [choice["logprobs"]["token_logprobs"] for choice in choices]
    for first, prompt in ((0, prompts[0]), (3, prompts[1])):
        alone = tiny_server.complete(prompt, echo=True, logprobs=2, max_tokens=0).json()["choices"][0]["logprobs"]
        for each in values[first : first + 3]:
            assert len(each) == len(prompt) + 3
            assert each[: len(prompt)] == [None, *(pytest.approx(v, abs=1e-4) for v in alone["token_logprobs"][1:])]


def test_a_prompt_that_fills_the_context_can_be_scored(tiny_server: Running) -> None:
    longest = tiny_server.engine.max_model_len
    prompt = [3 + index % 400 for index in range(longest)]
    answer = tiny_server.complete(prompt, echo=True, logprobs=0, max_tokens=0).json()
    assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == longest
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (longest, 0)
    for tokens, more in ((prompt, 1), ([*prompt, 5], 0)):
        refused = tiny_server.complete(tokens, echo=True, logprobs=0, max_tokens=more)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert f"{longest} tokens" in refused.json()["error"]["message"]


def test_the_parts_of_a_requests_time_add_up(tiny_server: Running) -> None:
    def times() -> dict[str, float]:
        names = ("request_queue_time", "request_prefill_time", "request_decode_time")
        names += ("time_to_first_token", "e2e_request_latency")
        samples = tiny_server.samples()
        return {
            name: next(v for key, v in samples.items() if key.startswith(f"vllm:{name}_seconds_sum{{"))
            for name in names
        }

    before = times()
    for _ in range(5):
        assert tiny_server.complete([5, 9, 11], max_tokens=40, ignore_eos=True).status_code == 200
    after = times()
    queue, prefill, decode, first, whole = (after[name] - before[name] for name in after)
    assert min(queue, prefill, decode) > 0
    # The clocks of the two threads are one; what is left is tokenizing before, and the way between the threads.
    assert queue + prefill < first < queue + prefill + 0.5
    assert queue + prefill + decode < whole < queue + prefill + decode + 0.5
