"""Bad and odd input that only the real engine can judge: a pool to its edge, rules that leave no token."""

from collections.abc import Iterator

import pytest

from dspark_server.api import ServerSettings
from tests.reliability.support import tiny_engine

from .support import Running, start
from .test_bad_input import check
from .test_completions import events

VOCABULARY = 512
CANARY = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    """A pool far smaller than the model's context."""
    yield from start(ServerSettings(port=0), tiny_engine(num_blocks=24))


def ask(server: Running) -> list[int]:
    """The canary's tokens."""
    tokens: list[int] = server.complete([5, 9, 11, 7], **CANARY).json()["choices"][0]["token_ids"]
    assert len(tokens) == 12
    return tokens


@pytest.fixture(scope="module")
def before(small: Running) -> list[int]:
    """The canary's tokens before all tests."""
    return ask(small)


@pytest.fixture(autouse=True)
def canary(small: Running, before: list[int]) -> Iterator[list[int]]:
    """The same tokens after each test, and no block held behind it."""
    yield before
    assert ask(small) == before
    small.wait(lambda: small.engine.in_flight == 0 and small.engine.stats.kv_usage == 0)


@pytest.mark.parametrize("over", [-1, 0, 1])
@pytest.mark.parametrize("answer", [1, 5])
def test_a_prompt_as_long_as_the_pool(small: Running, over: int, answer: int) -> None:
    room = small.engine.core.batcher.longest_request  # what is not left for a draft
    response = small.complete([5] * (room + over - answer), **CANARY | {"max_tokens": answer})
    if over <= 0:
        assert len(response.json()["choices"][0]["token_ids"]) == answer
        return
    error = check(response)
    assert error["code"] == "context_length_exceeded"
    assert f"the KV cache holds {room} tokens" in error["message"]


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_a_prompt_that_leaves_no_room_for_a_draft(small: Running, over: int) -> None:
    pool = small.engine.core.batcher.pool
    length = pool.num_blocks * pool.segment_size
    assert check(small.complete([5] * (length + over), max_tokens=1))["code"] == "context_length_exceeded"


@pytest.mark.parametrize("short", [1, 0, -1])
def test_a_prompt_as_long_as_the_context_is_refused_by_the_pool(small: Running, short: int) -> None:
    prompt = [5] * (small.engine.max_model_len - short)
    assert check(small.complete(prompt, max_tokens=1))["code"] == "context_length_exceeded"


def test_a_bias_against_every_token_changes_nothing(small: Running, canary: list[int]) -> None:
    """It is added to all logits alike; the law is what it was."""
    bias = {str(token): -100 for token in range(VOCABULARY)}
    fields = CANARY | {"logit_bias": bias}
    assert small.complete([5, 9, 11, 7], **fields).json()["choices"][0]["token_ids"] == canary
    sampled = small.complete([5, 9, 11, 7], **fields | {"temperature": 1.0, "top_p": 0.5, "seed": 3}).json()
    assert len(sampled["choices"][0]["token_ids"]) == 12


LEAVING_NOTHING = {
    "the only allowed token is a bad word": {"allowed_token_ids": [97], "bad_words": ["a"]},
    "the only allowed token may not come yet": {"allowed_token_ids": [97], "stop_token_ids": [97], "min_tokens": 5},
    "the form has none of the allowed": {"allowed_token_ids": [97], "structured_outputs": {"regex": "z+"}},
}


@pytest.mark.parametrize("case", LEAVING_NOTHING)
@pytest.mark.parametrize("streaming", [False, True])
def test_rules_that_leave_no_token_fail_their_request_alone(small: Running, case: str, streaming: bool) -> None:
    letters = {"allowed_token_ids": [small.engine.tokenizer.encode("a")[0]]}
    fields = {**LEAVING_NOTHING[case], **letters, "max_tokens": 10, "stream": streaming}
    if "stop_token_ids" in fields:
        fields["stop_token_ids"] = letters["allowed_token_ids"]
    response = small.complete([5, 9], **fields)
    if response.status_code == 200:
        assert streaming
        [error] = [event["error"] for event in events(response) if "error" in event]
    else:
        error = check(response)
    assert "leave no token that could follow" in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("temperature", ["1e-10", "-0", "-0.0", "5e-324"])
def test_next_to_no_temperature_is_greedy(small: Running, canary: list[int], temperature: str) -> None:
    raw = f'{{"prompt": [5, 9, 11, 7], "max_tokens": 12, "temperature": {temperature}, "ignore_eos": true, '
    raw += '"return_token_ids": true}'
    answer = small.http.post("/v1/completions", content=raw).json()
    assert answer["choices"][0]["token_ids"] == canary


@pytest.mark.parametrize("known", [1, 2, 3])
def test_a_prompt_that_ends_inside_a_character_does_not_leak(small: Running, known: int) -> None:
    """The answer's first bytes complete it; of the answer alone they are no character."""
    smile = small.engine.tokenizer.encode("🙂")
    fields = {**CANARY, "max_tokens": 1, "allowed_token_ids": [smile[known]]}
    for streaming in (False, True):
        response = small.complete([5, *smile[:known]], **fields, stream=streaming)
        parts = events(response) if streaming else [response.json()]
        text = "".join(choice["text"] for part in parts for choice in part["choices"])
        assert text in ("", "\ufffd")
