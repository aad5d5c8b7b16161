"""POST /tokenize and /detokenize: vLLM's shapes, the tokens of completions, and bad input."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from dspark_server.api import tokens as module

from .support import Running
from .test_bad_input import RAW, SECRET, check
from .test_chat import WEATHER
from .test_completions import EMOJI


@pytest.fixture(autouse=True)
def canary(server: Running) -> Iterator[None]:
    yield
    assert server.http.post("/detokenize", json={"tokens": [72, 105]}).status_code == 200
    server.canary()


def endpoint(server: Running) -> module.Tokens:
    return server.server.config.app.app.state.tokens


def test_tokenize(server: Running) -> None:
    answer = server.http.post("/tokenize", json={"model": "fake", "prompt": "hi"})
    assert answer.headers["content-type"] == "application/json"
    ids = server.engine.tokenizer.encode("hi")
    assert answer.json() == {"count": 2, "max_model_len": 2048, "tokens": ids, "token_strs": None}
    answer = server.http.post("/tokenize", json={"prompt": "a <|end|>", "return_token_strs": True, "model": None})
    assert answer.json()["token_strs"] == ["a", "Ġ", "<|end|>"]
    assert server.http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []


@pytest.mark.parametrize("text", [EMOJI, "  two  spaces , here .", "\x00\ufeff", "<|end|>mid<|end|>"])
def test_detokenize_gives_the_text_back(server: Running, text: str) -> None:
    tokens = server.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert server.http.post("/detokenize", json={"model": "fake", "tokens": tokens}).json() == {"prompt": text}


def test_its_tokens_are_those_of_completions(server: Running) -> None:
    prompt = "say " + EMOJI
    tokens = server.http.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
    answer = server.complete(prompt, return_token_ids=True).json()
    assert answer["choices"][0]["prompt_token_ids"] == tokens


def test_messages_have_the_tokens_of_chat_completions(server: Running) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "show"}]
    for extra in ({}, {"add_generation_prompt": False}, {"continue_final_message": True}, {"tools": [WEATHER]}):
        said = {"chat_template_kwargs": {"mood": 1}, **extra}
        answer = server.http.post("/tokenize", json={"messages": messages, "return_token_strs": True, **said}).json()
        chat = server.chat(messages, return_token_ids=True, max_tokens=1, **said)
        assert chat.json()["prompt_token_ids"] == answer["tokens"]
        assert len(answer["token_strs"]) == answer["count"] == len(answer["tokens"])


CHATS = {
    "text": {"messages": SECRET},
    "empty": {"messages": []},
    "no role": {"messages": [{"content": "hi"}]},
    "refused by the template": {"messages": [{"role": "user", "content": "refuse"}]},
    "nothing said": {"messages": [{"role": "user"}]},
    "both": {"messages": [{"role": "user", "content": "hi"}], "prompt": "x"},
    "a template": {"messages": [{"role": "user", "content": "hi"}], "chat_template": "{{ messages }}"},
    "two endings": {
        "messages": [{"role": "user", "content": "hi"}],
        "add_generation_prompt": True,
        "continue_final_message": True,
    },
}


@pytest.mark.parametrize("case", CHATS)
def test_messages_are_refused_as_in_a_chat(server: Running, case: str) -> None:
    error = check(server.http.post("/tokenize", json={"user": SECRET, **CHATS[case]}))
    assert error["param"] in ("messages", "chat_template", "continue_final_message")


def test_a_long_conversation_is_refused(own_server: Running) -> None:
    messages = [{"role": "user", "content": "x" * (module.MAX_TEXT + 1)}]
    error = check(own_server.http.post("/tokenize", json={"messages": messages}))
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("own_server", [{"chat_template": None}], indirect=True)
def test_a_model_without_a_template_takes_no_messages(own_server: Running) -> None:
    error = check(own_server.http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}))
    assert error["code"] == "no_chat_template"
    assert own_server.http.post("/tokenize", json={"prompt": "hi"}).json()["count"] == 2


def test_special_tokens_are_added_unless_not_wanted(own_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        seen.append(add_special_tokens)
        return [1]

    monkeypatch.setattr(endpoint(own_server)._tokenizer, "encode", encode)
    for extra in ({}, {"add_special_tokens": False}, {"add_special_tokens": None}):
        own_server.http.post("/tokenize", json={"prompt": "x", **extra})
    assert seen == [True, False, True]


TOKENIZE = {f"{name}={value!r}"[:60]: {"prompt": "x", "user": SECRET, name: value} for name, value in [
    ("prompt", None), ("prompt", 3), ("prompt", ["x"]), ("prompt", [1, 2]), ("prompt", True), ("prompt", {}),
    ("prompt", "x" * (module.MAX_TEXT + 1)), ("model", 5), ("add_special_tokens", 1), ("add_special_tokens", "no"),
    ("return_token_strs", 0),
]}  # fmt: skip

DETOKENIZE = {f"{name}={value!r}"[:60]: {"tokens": [1], "user": SECRET, name: value} for name, value in [
    ("tokens", None), ("tokens", 3), ("tokens", "hi"), ("tokens", {}), ("tokens", [-1]), ("tokens", [257]),
    ("tokens", [1.0]), ("tokens", [True]), ("tokens", ["1"]), ("tokens", [None]), ("tokens", [[1]]),
    ("tokens", [2**63]), ("tokens", [2**64]), ("tokens", [0] * (module.MAX_TOKENS + 1)), ("model", []),
]}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZE)
def test_tokenize_refuses(own_server: Running, case: str) -> None:
    error = check(own_server.http.post("/tokenize", json=TOKENIZE[case]))
    assert error["param"] == case.partition("=")[0]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("case", DETOKENIZE)
def test_detokenize_refuses(server: Running, case: str) -> None:
    error = check(server.http.post("/detokenize", json=DETOKENIZE[case]))
    assert error["param"] == case.partition("=")[0]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
@pytest.mark.parametrize("case", RAW)
def test_refused_bytes(server: Running, path: str, case: str) -> None:
    check(server.http.post(path, content=RAW[case]))


@pytest.mark.parametrize(("path", "field", "fine"), [("/tokenize", "prompt", "x"), ("/detokenize", "tokens", [])])
def test_what_both_refuse(server: Running, path: str, field: str, fine: object) -> None:
    assert check(server.http.post(path, json={}))["param"] == field
    assert check(server.http.post(path, json={field: fine, "model": "other"}), 404)["code"] == "model_not_found"
    check(server.http.get(path), 405)
    check(server.http.post(path, content=b"x" * (5 << 20)), 413)


def test_a_long_text_holds_nobody_up(own_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, finish = threading.Event(), threading.Event()

    def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        begun.set()
        assert finish.wait(20)
        return [1, 2, 3]

    monkeypatch.setattr(endpoint(own_server)._tokenizer, "encode", encode)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(own_server.http.post, "/tokenize", json={"prompt": "long"})
        assert begun.wait(20)
        own_server.canary()
        finish.set()
        assert answer.result().json()["count"] == 3


def test_a_full_line_is_told_to_wait(own_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 0)
    response = own_server.http.post("/tokenize", json={"prompt": "x"})
    check(response, 503)
    assert int(response.headers["retry-after"]) >= 1
