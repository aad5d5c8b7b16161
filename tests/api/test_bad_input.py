"""Bad input: each a 4xx error object with a bounded body that repeats nothing of the request; then a canary passes."""

import json
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest

from .support import Running

SECRET = "s3cr3t-0123456789"
NESTED = "[" * 100_000 + "]" * 100_000
DEEP = json.loads('{"items":' * 300 + "{}" + "}" * 300)  # the body is read, and orjson would not write it


def body(**fields: object) -> dict[str, object]:
    return {"prompt": "say x", "max_tokens": 5, "user": SECRET, **fields}


REFUSED = {
    **{f"{name}={value!r}": body(**{name: value}) for name, value in [
        ("prompt", ""), ("prompt", []), ("prompt", [""]), ("prompt", [[]]), ("prompt", 3), ("prompt", True),
        ("prompt", {}), ("prompt", ["a", 1]), ("prompt", [1, "a"]), ("prompt", [1, True]), ("prompt", [[1, 2.5]]),
        ("prompt", [[1], "a"]), ("prompt", [None]), ("prompt", [-1]), ("prompt", [257]), ("prompt", [2**63]),
        ("prompt", [2**64]), ("prompt", [[[1]]]),
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2**31), ("max_tokens", 2**63), ("max_tokens", 1.0),
        ("max_tokens", "16"), ("max_tokens", True), ("max_tokens", 2048),
        ("min_tokens", -1), ("min_tokens", 6), ("min_tokens", False),
        ("n", 0), ("n", -1), ("n", 129), ("n", 2**63), ("n", True), ("best_of", 129), ("best_of", 0),
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("temperature", True), ("temperature", []),
        ("top_p", 0), ("top_p", 1.1), ("top_p", -1), ("top_p", "0.5"), ("top_p", False),
        ("top_k", -2), ("top_k", 2**31), ("top_k", 1.5), ("min_p", -0.1), ("min_p", 1.1), ("min_p", True),
        ("seed", -2), ("seed", 2**64), ("seed", 1.5), ("seed", "1"), ("seed", True),
        ("stop", ""), ("stop", [""]), ("stop", 5), ("stop", [5]), ("stop", ["a"] * 33), ("stop", "x" * 257),
        ("stop_token_ids", [-1]), ("stop_token_ids", [1.0]), ("stop_token_ids", [True]), ("stop_token_ids", 3),
        ("stop_token_ids", [2**63]), ("stop_token_ids", [257]), ("stop_token_ids", list(range(257))),
        ("stream", "yes"), ("stream", 1), ("echo", 1), ("ignore_eos", "true"), ("skip_special_tokens", 0),
        ("stream_options", {"include_usage": True}), ("stream_options", 5), ("model", 5), ("user", 5),
        ("suffix", "end"), ("logprobs", 21), ("logprobs", -1), ("logprobs", 2**63), ("logprobs", True),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", "1"), ("frequency_penalty", 2.5), ("presence_penalty", -2.5), ("repetition_penalty", 0),
        ("frequency_penalty", False), ("repetition_penalty", 1001), ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"257": 1}), ("logit_bias", [5]), ("bad_words", [""]), ("bad_words", "a"), ("bad_words", [1]),
        ("use_beam_search", True), ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2),
        ("truncate_prompt_tokens", 5000), ("allowed_token_ids", []), ("allowed_token_ids", [257]), ("priority", 1.5),
        ("structured_outputs", {}), ("structured_outputs", {"regex": "a", "choice": ["b"]}),
        ("structured_outputs", {"regex": ""}), ("structured_outputs", {"choice": []}), ("structured_outputs", "a"),
        ("structured_outputs", {"json": 5}), ("structured_outputs", {"grammar": "root ::= x"}),
        ("structured_outputs", {"grammar": "", "regex": "a"}), ("structured_outputs", {"regex": "a", "grammar": "b"}),
        ("structured_outputs", {"regex": "a" * 70_000}),
        ("response_format", {"type": "xml"}), ("response_format", {"type": "json_schema"}), ("response_format", {}),
        ("speculation", {"enabled": 1}), ("speculation", {"max_draft_tokens": -1}), ("speculation", True),
        ("prompt_embeds", "x"), ("cache_salt", "x" * 257),
    ]},
    "best_of below n": body(n=3, best_of=2),
    "best_of streamed": body(best_of=2, stream=True),
    "prompt_logprobs streamed": body(prompt_logprobs=1, stream=True),
    "two forms": body(response_format={"type": "json_object"}, structured_outputs={"regex": "a"}),
    "structured_outputs=a deep schema": body(structured_outputs={"json": DEEP}),
    "response_format=a deep schema": body(response_format={"type": "json_schema", "json_schema": {"schema": DEEP}}),
    "no prompt": {"max_tokens": 5},
    "long prompt": body(prompt="say " + "x" * 3000),
    "long prompt of ids": body(prompt=[1] * 3000),
    "very long prompt of ids": body(prompt=[1] * 500_000),
    "too many prompts": body(prompt=["x"] * 1025),
    "stream options": body(stream=True, stream_options={"include_usage": 1}),
    "500 k stop strings": body(stop=["a"] * 500_000),
    "500 k numbers as stop strings": body(stop=[1] * 500_000),
    "500 k stop tokens": body(stop_token_ids=[1] * 500_000),
    "bias of 100 k entries": body(logit_bias={str(number): 1 for number in range(100_000)}),
    "stop of 1 MB": body(stop="a" * 1_000_000),
    "list": [body()],
}  # fmt: skip

RAW = {
    "empty": b"",
    "text": b"hello",
    "null": b"null",
    "number": b"5",
    "truncated": json.dumps(body()).encode()[:-1],
    "truncated string": b'{"prompt": "say',
    "NaN": b'{"prompt": "say x", "temperature": NaN}',
    "Infinity": b'{"prompt": "say x", "temperature": Infinity}',
    "-Infinity": b'{"prompt": "say x", "top_p": -Infinity}',
    "1e309": b'{"prompt": "say x", "temperature": 1e309}',
    "-1e309": b'{"prompt": "say x", "seed": -1e309}',
    "huge integer": b'{"prompt": "say x", "seed": ' + b"9" * 5000 + b"}",
    "deep": NESTED.encode(),
    "deep prompt": f'{{"prompt": {NESTED}}}'.encode(),
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "lone surrogate": b'{"prompt": "say \\ud800"}',
    "lone surrogate in a stop": b'{"prompt": "say x", "stop": "\\udc00"}',
    "surrogate in UTF-8": b'{"prompt": "say \xed\xa0\x80"}',
    "not UTF-8": b'{"prompt": "say \xff"}',
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(body()).encode(),
    "gzip": b"\x1f\x8b\x08\x00" + b"\x00" * 100,
    "NUL": b'{"prompt": "say x\x00"}',
}


def check(response: httpx.Response, status: int = 400) -> dict:
    """An error object and nothing else."""
    assert response.status_code == status, response.text[:300]
    assert response.headers["content-type"] == "application/json"
    assert len(response.content) < 1500
    assert SECRET not in response.text
    assert "Traceback" not in response.text
    payload = response.json()
    assert set(payload) == {"error"}
    error = payload["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.fixture(autouse=True)
def canary(server: Running) -> Iterator[None]:
    """Whatever a test sent, the next request works, and nothing reached the engine that should not."""
    yield
    server.canary()
    assert server.engine.state == "ready"


@pytest.mark.parametrize("case", REFUSED)
def test_refused(server: Running, case: str) -> None:
    submitted = len(server.engine.submitted)
    error = check(server.http.post("/v1/completions", json=REFUSED[case]))
    assert error["type"] == "invalid_request_error"
    if "=" in case and case != "max_tokens=2048":
        assert error["param"] == case.partition("=")[0]
    assert len(server.engine.submitted) == submitted


@pytest.mark.parametrize("case", RAW)
def test_refused_bytes(server: Running, case: str) -> None:
    headers = {"content-type": "application/json"}
    check(server.http.post("/v1/completions", content=RAW[case], headers=headers))


@pytest.mark.parametrize("name", ["response_format", "stream_options", "logit_bias", "speculation"])
def test_what_must_be_an_object_is_called_one(server: Running, name: str) -> None:
    error = check(server.http.post("/v1/completions", json=body(**{name: "x"})))
    assert error["message"] == f"`{name}`: Input should be an object."


def test_odd_but_fine(server: Running) -> None:
    for raw in (
        b'{"prompt": "no", "prompt": "say x"}',
        b'{"prompt": "say x", "temperature": -0.0, "top_p": 1, "seed": 0}',
        b'{"prompt": "say x", "temperature": 1e-10}',
        b'{"prompt": "say x", "a\\u0000b": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"prompt": "say x", "' + b"k" * 100_000 + b'": 1}',
    ):
        assert server.http.post("/v1/completions", content=raw).json()["choices"][0]["text"] == "x"
    for text in ("\x00", "\ufeff", "<|end|>"):
        assert server.complete("say " + text, skip_special_tokens=False).status_code == 200


def test_both_lengths_are_named(server: Running) -> None:
    for prompt in ([1] * 3000, "say " + "x" * 2996):
        error = check(server.complete(prompt))
        assert "3000" in error["message"]
        assert "2048" in error["message"]
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_a_prompt_up_to_the_context_is_served(server: Running, over: int) -> None:
    response = server.complete([65] * (2047 + over), max_tokens=1)
    if over <= 0:
        assert response.json()["usage"]["prompt_tokens"] == 2047 + over
    else:
        assert check(response)["code"] == "context_length_exceeded"


def test_what_can_never_fit_is_not_tokenized(server: Running) -> None:
    text = "say " + "é" * 1_000_000
    encoded = server.engine.encoded
    for response in (server.complete(text), server.complete(["say x", text]), server.chat(text)):
        error = check(response)
        assert "2048" in error["message"]
        assert "1000004" in error["message"]
        assert error["code"] == "context_length_exceeded"
    assert server.engine.encoded == encoded + 1  # the short one
    kept = server.complete(text, truncate_prompt_tokens=4, max_tokens=2, echo=True).json()["choices"][0]["text"]
    assert kept == "ééx "


def test_unknown_model(server: Running) -> None:
    error = check(server.complete("say x", model="other"), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    with pytest.raises(openai.NotFoundError):
        server.openai.completions.create(model="other", prompt="say x")
    check(server.http.get("/v1/models/other"), 404)


def test_openai_sees_a_bad_request(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.completions.create(model="fake", prompt="say x", temperature=7)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    "path", ["/index.html", "/v1", "/v1/completion", "/v1/completions/", "//v1/completions", "/v1%2fcompletions/x"]
)
def test_unknown_route(server: Running, path: str) -> None:
    check(server.http.post(server.url + path, json={}), 404)


ELSEWHERE = {
    "/v1/responses": "/v1/chat/completions",
    "/api/show": "/v1/models",
    "/api/chat": "/v1/chat/completions",
    "/generate": "/v1/completions",
    "/api/generate": "/v1/completions",
    "/completion": "/v1/completions",
    "/api/tags": "/v1/models",
    "/healthz": "/health",
}
NOT_SERVED = [
    *("/v1/embeddings", "/v1/audio/transcriptions", "/v1/audio/speech", "/v1/rerank", "/v1/images/generations"),
    *(
        "/score",
        "/pooling",
        "/classify",
        "/v1/moderations",
        "/v1/files",
        "/v1/batches",
        "/v1/load_lora_adapter",
        "/sleep",
    ),
]
MISTAKEN = {
    "/chat/completions": "/v1/chat/completions",
    "/completions": "/v1/completions",
    "/v1/chat/completions/": "/v1/chat/completions",
    "//v1//completions": "/v1/completions",
    "/v1/v1/chat/completions": "/v1/chat/completions",
}


@pytest.mark.parametrize("path", [*ELSEWHERE, *NOT_SERVED])
def test_routes_of_other_servers_are_named(server: Running, path: str) -> None:
    for method in ("GET", "POST"):
        error = check(server.http.request(method, server.url + path, json={"input": SECRET}), 404)
        assert error["type"] == "not_found_error"
        assert error["message"].startswith(f"{path} is not served here")
        assert ELSEWHERE.get(path, "text only") in error["message"]
    below = check(server.http.post(server.url + path + "/" + SECRET, json={}), 404)
    assert below["message"] == error["message"]


@pytest.mark.parametrize("path", MISTAKEN)
def test_a_path_that_is_nearly_right_is_corrected(server: Running, path: str) -> None:
    error = check(server.http.post(server.url + path, json={}), 404)
    assert error["message"] == f"There is nothing at this path; use {MISTAKEN[path]}."


def test_the_openai_client_is_told_what_is_not_served(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings is not served here"):
        server.openai.embeddings.create(model="fake", input="x")
    with pytest.raises(openai.NotFoundError, match="use POST /v1/chat/completions"):
        server.openai.responses.create(model="fake", input="x")


@pytest.mark.parametrize("own_server", [{"settings": {"api_key": "k"}}], indirect=True)
def test_routes_of_other_servers_are_behind_the_key(own_server: Running) -> None:
    assert own_server.http.post("/v1/embeddings", json={}).status_code == 401
    answer = own_server.http.post("/v1/embeddings", json={}, headers={"authorization": "Bearer k"})
    assert "/v1/embeddings is not served here" in check(answer, 404)["message"]


@pytest.mark.parametrize(
    ("method", "path", "takes"),
    [
        ("GET", "/v1/completions", ["POST"]),
        ("DELETE", "/health", ["GET"]),
        ("PUT", "/ping", ["GET", "POST"]),
        ("DELETE", "/v1/models/fake", ["GET"]),
    ],
)
def test_wrong_method(server: Running, method: str, path: str, takes: list[str]) -> None:
    response = server.http.request(method, path)
    assert check(response, 405)["message"] == f"This path takes {' or '.join(takes)} only."
    assert response.headers["allow"] == ", ".join(takes)


def test_body_over_the_cap(server: Running) -> None:
    huge = b'{"prompt": "' + b"x" * (5 << 20) + b'"}'
    check(server.http.post("/v1/completions", content=huge), 413)

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(huge), 65536):
            yield huge[start : start + 65536]

    encoded = server.engine.encoded
    check(server.http.post("/v1/completions", content=chunks()), 413)
    assert server.engine.encoded == encoded


def raw_request(server: Running, data: bytes) -> bytes:
    """Bytes as they are, and what comes back until the server closes or says nothing for a while."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=3) as connection:
        connection.sendall(data)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
            if b"\r\n\r\n" in answer and (b"}" in answer or b"Invalid" in answer):
                break
        return answer


def test_false_content_length(server: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %s\r\n\r\n"
    assert raw_request(server, head % b"99999999999" + b"{}").startswith(b"HTTP/1.1 413")
    assert raw_request(server, head % b"-5" + b"{}").startswith(b"HTTP/1.1 400")
    assert raw_request(server, head % b"abc" + b"{}").startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("own_server", [{"settings": {"body_timeout": 0.5}}], indirect=True)
def test_a_body_shorter_than_announced_times_out(own_server: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n"
    assert raw_request(own_server, head + b'{"prompt": "say x"}').startswith(b"HTTP/1.1 408")
    own_server.canary()


def test_huge_headers(server: Running) -> None:
    check(server.http.get("/health", headers={"x-large": "x" * 1_000_000}), 431)
    check(server.http.post("/v1/completions", json=body(), headers={"x-request-id": "x" * 1_000_000}), 431)


def test_request_ids(server: Running) -> None:
    given = server.http.get("/live", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    response = server.complete("say x", stream=True)
    assert len(response.headers["x-request-id"]) == 32
    for odd in (b"a b", b"x" * 129, b"\xff", b""):
        response = server.http.get("/live", headers={"x-request-id": odd})
        assert len(response.headers["x-request-id"]) == 32
    twice = server.http.get("/live", headers=[("x-request-id", "one"), ("x-request-id", "two")])
    assert twice.headers.get_list("x-request-id") == ["one"]
    assert check_id(server.http.post("/v1/completions", content=b"{", headers={"x-request-id": "bad-1"})) == "bad-1"


def check_id(response: httpx.Response) -> str:
    check(response)
    return response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("value", "words"),
    [([""], "at least 1 character"), (["a", 5], "valid string"), (["a"] * 33, "at most 32 items"), (5, "valid string")],
)
def test_of_two_forms_the_one_that_was_meant_is_blamed(server: Running, value: object, words: str) -> None:
    error = server.complete("say x", stop=value).json()["error"]
    assert error["param"] == "stop" and words in error["message"]
