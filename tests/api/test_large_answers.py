"""Large answers: their JSON is made beside the event loop, and is the same."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_server.api import encoding, responses
from dspark_server.api.encoding import json_pieces, writes
from dspark_server.engine.output import TokenDecoder

from .support import Running

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(SCALARS, lambda each: st.lists(each) | st.dictionaries(st.text(), each), max_leaves=20)
PROMPT = "forever " * 20
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"prompt": PROMPT, "n": 128, "echo": True, "logprobs": 3}),
    "stream": ("/v1/completions", {"prompt": PROMPT, "n": 128, "echo": True, "logprobs": 3, "stream": True}),
    "chat": ("/v1/chat/completions", {"n": 128, "logprobs": True, "top_logprobs": 5, "return_token_ids": True}),
}


def joined(text: str) -> dict[int, dict[str, list[Any]]]:
    """All events of each choice together: how many tokens an event has depends on time."""
    choices: dict[int, dict[str, list[Any]]] = {}
    for line in text.splitlines():
        if line.startswith("data: {"):
            (choice,) = orjson.loads(line.removeprefix("data: "))["choices"]
            whole = choices.setdefault(choice["index"], {"text": []})
            for name, values in {"text": list(choice["text"]), **choice["logprobs"]}.items():
                whole.setdefault(name, []).extend(values)
    return choices


@given(VALUES, st.integers(1, 4), st.integers(1, 30))
def test_the_pieces_are_the_json(value: Any, piece: int, write: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "SLICE", piece)
        patch.setattr(encoding, "WRITE", write)
        pieces = list(json_pieces(value))
        parts = writes(pieces)
    assert b"".join(pieces) == b"".join(parts) == orjson.dumps(value)
    assert all(len(part) < write + max(map(len, pieces)) for part in parts)


def test_a_long_list_is_divided() -> None:
    pieces = list(json_pieces({"choices": {"logprobs": {"tokens": ["abc"] * 10_000}}}))
    assert max(map(len, pieces)) <= encoding.SLICE * len('"abc",')


@pytest.mark.parametrize("own_server", [{"capacity": 128}], indirect=True)
@pytest.mark.parametrize("case", REQUESTS)
def test_the_loop_serves_others_meanwhile(case: str, own_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is not finished before another request has been served."""
    path, fields = REQUESTS[case]
    body = {"messages": [{"role": "user", "content": PROMPT}], **fields} if case == "chat" else fields

    def answer() -> Any:
        text = own_server.http.post(path, json={"max_tokens": 6, "temperature": 0, **body}).raise_for_status().text
        return joined(text) if case == "stream" else {**orjson.loads(text), "id": "", "created": 0}

    with monkeypatch.context() as patch:
        patch.setattr(responses, "LARGE", 1 << 40)
        expected = answer()
    begun, served, piece = threading.Event(), threading.Event(), TokenDecoder.piece

    def waiting(self: TokenDecoder, token: int) -> bytes:
        begun.set()
        assert served.wait(30)
        return piece(self, token)

    monkeypatch.setattr(TokenDecoder, "piece", waiting)
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(answer)
        try:
            assert begun.wait(30)
            assert own_server.http.get("/health").status_code == 200
        finally:
            served.set()
        assert answered.result() == expected


def test_small_answers_change_no_thread(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, piece = set(), TokenDecoder.piece

    def recorded(self: TokenDecoder, token: int) -> bytes:
        seen.add(threading.current_thread().name)
        return piece(self, token)

    monkeypatch.setattr(TokenDecoder, "piece", recorded)
    server.complete("say hello", logprobs=2).raise_for_status()
    assert len(seen) == 1
    assert not next(iter(seen)).startswith("asyncio")
