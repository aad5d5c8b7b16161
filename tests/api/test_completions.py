"""POST /v1/completions as its clients see it."""

import json
import threading

import httpx
import openai
import pytest

from .fake_engine import EOS
from .support import Running

EMOJI = "naïve 🙂 👩‍👩‍👧 日本\u2028語\u0085é"


def events(response: httpx.Response) -> list[dict]:
    """Chunks of a stream that ends as it should."""
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def stream(server: Running, prompt, **fields) -> list[dict]:
    response = server.complete(prompt, stream=True, **fields)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    return events(response)


def text_of(chunks: list[dict], index: int = 0) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index)


def test_openai_client_whole(server: Running) -> None:
    answer = server.openai.completions.create(model="fake", prompt="say hello", max_tokens=50, seed=3, user="me")
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.model == "fake"
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, choice.index) == ("hello", "stop", 0)
    assert answer.usage.prompt_tokens == len("say hello")
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == 15
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_openai_client_stream(server: Running) -> None:
    options = {"include_usage": True}
    chunks = list(
        server.openai.completions.create(
            model="fake", prompt="say " + EMOJI, max_tokens=80, stream=True, stream_options=options
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == EMOJI
    assert all(chunk.choices[0].text and chunk.choices[0].finish_reason is None for chunk in chunks[:-2])
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(EMOJI.encode()) + 1
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_streams_survive_clients_that_split_at_unicode_line_ends(server: Running) -> None:
    with server.http.stream(
        "POST", "/v1/completions", json={"prompt": "say " + EMOJI, "max_tokens": 80, "stream": True}
    ) as r:
        lines = [line[6:] for line in r.iter_lines() if line]
    assert text_of([json.loads(line) for line in lines[:-1]]) == EMOJI


def test_max_tokens_is_16_when_absent_or_null(server: Running) -> None:
    for body in ({"prompt": "forever"}, {"prompt": "forever", "max_tokens": None}):
        answer = server.http.post("/v1/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] == 16
        assert answer["choices"][0]["finish_reason"] == "length"


def test_null_is_accepted_everywhere(server: Running) -> None:
    names = server.http.get("/openapi.json").json()["paths"]["/v1/completions"]["post"]["requestBody"]["content"]
    fields = set(names["application/json"]["schema"]["properties"]) | {
        "suffix",
        "logprobs",
        "logit_bias",
        "response_format",
    }
    answer = server.http.post("/v1/completions", json={**dict.fromkeys(fields), "prompt": "say x"})
    assert answer.json()["choices"][0]["text"] == "x"
    options = {"include_usage": None, "continuous_usage_stats": None}
    assert text_of(stream(server, "say x", stream_options=options)) == "x"


def test_sampling_parameters_reach_the_engine(server: Running) -> None:
    fields = {"temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.25, "min_tokens": 3, "ignore_eos": True}
    server.complete("say x", seed=2**64 - 1, stop_token_ids=[7], **fields)
    params = server.engine.submitted[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 0.5, 0, 0.25)
    assert (params.seed, params.min_tokens, params.ignore_eos) == (2**64 - 1, 3, True)
    assert params.stop_token_ids == {7}
    assert params.max_tokens == 100


def test_fields_that_ask_for_nothing_are_accepted(server: Running) -> None:
    idle = {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}, "suffix": ""}
    answer = server.complete("say x", response_format={"type": "text"}, best_of=1, unheard_of={"a": 1}, **idle)
    assert answer.json()["choices"][0]["text"] == "x"


@pytest.mark.parametrize("streaming", [False, True])
def test_prompts_times_n(server: Running, streaming: bool) -> None:
    prompts = ["say one", "say two 🙂"]
    if streaming:
        chunks = stream(server, prompts, n=2, stream_options={"include_usage": True})
        texts = [text_of(chunks, index) for index in range(4)]
        usage = chunks[-1]["usage"]
    else:
        answer = server.complete(prompts, n=2).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        texts = [choice["text"] for choice in answer["choices"]]
        usage = answer["usage"]
    assert texts == ["one", "one", "two 🙂", "two 🙂"]
    assert usage["prompt_tokens"] == 7 + 12
    assert usage["completion_tokens"] == 2 * (4 + 9)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4


@pytest.mark.parametrize("max_tokens", [100, 0])
def test_a_cut_prompt_leaves_room_for_the_answer(server: Running, max_tokens: int) -> None:
    prompt = "a" * 5000 + " forever"
    answer = server.complete(prompt, max_tokens=max_tokens, echo=not max_tokens, truncate_prompt_tokens=-1).json()
    assert answer["usage"]["prompt_tokens"] == 2048 - max_tokens
    assert answer["usage"]["completion_tokens"] == max_tokens


def test_the_id_is_the_requests_own(server: Running) -> None:
    header = {"x-request-id": "mine"}
    body = {"prompt": "say x"}
    assert server.http.post("/v1/completions", json=body, headers=header).json()["id"] == "cmpl-mine"
    named = server.http.post("/v1/completions", json={**body, "request_id": "other"}, headers=header)
    assert (named.json()["id"], named.headers["x-request-id"]) == ("cmpl-other", "mine")
    plain = server.http.post("/v1/completions", json=body)
    assert plain.json()["id"] == "cmpl-" + plain.headers["x-request-id"]


def test_unknown_fields_are_logged(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    options = {"include_usage": True, "include_obfuscation": False}
    assert text_of(stream(server, "say x", unheard_of=1, stream_options=options)) == "x"
    assert "'unheard_of'" in caplog.text
    assert "'stream_options.include_obfuscation'" in caplog.text


def test_prompts_as_token_ids(server: Running) -> None:
    ids = server.engine.tokenizer.encode("say hi")
    assert server.complete(ids).json()["choices"][0]["text"] == "hi"
    answer = server.complete([ids, ids]).json()
    assert [choice["text"] for choice in answer["choices"]] == ["hi", "hi"]
    assert answer["usage"]["prompt_tokens"] == 12


def test_a_prompt_ending_inside_a_character_does_not_leak(server: Running) -> None:
    tokenizer = server.engine.tokenizer
    smile = tokenizer.encode("🙂")
    answer = server.complete([*tokenizer.encode("say "), *smile[2:], *tokenizer.encode("ok")]).json()
    assert answer["choices"][0]["text"].endswith("ok")
    assert "🙂" not in answer["choices"][0]["text"]


@pytest.mark.parametrize("streaming", [False, True])
def test_echo(server: Running, streaming: bool) -> None:
    ids = server.engine.tokenizer.encode("say é")
    for prompt in ("say é", ids):
        if streaming:
            chunks = stream(server, prompt, echo=True)
            assert text_of(chunks) == "say éé"
            assert chunks[0]["choices"][0]["text"] == "say éé"  # the echo comes with the first token's text
        else:
            assert server.complete(prompt, echo=True).json()["choices"][0]["text"] == "say éé"


@pytest.mark.parametrize("streaming", [False, True])
def test_echo_alone(server: Running, streaming: bool) -> None:
    generated = server.engine.stats.generation_tokens
    if streaming:
        chunks = stream(server, "just this", echo=True, max_tokens=0)
        assert text_of(chunks) == "just this"
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    else:
        answer = server.complete("just this", echo=True, max_tokens=0).json()
        assert answer["choices"][0]["text"] == "just this"
        assert answer["usage"] | {"prompt_tokens_details": 0} == {
            **{"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9},
            "prompt_tokens_details": 0,
        }
    assert server.engine.stats.generation_tokens == generated


def test_what_a_request_leaves_out_is_as_the_model_has_it(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.05}
    monkeypatch.setattr(server.engine, "sampling_defaults", defaults)
    assert server.http.get("/v1/models").json()["data"][0]["sampling_defaults"] == defaults
    server.complete("say x")
    params = server.engine.submitted[-1].params
    assert {name: getattr(params, name) for name in defaults} == defaults
    server.complete("say x", temperature=1, top_k=0, top_p=None, repetition_penalty=1)
    params = server.engine.submitted[-1].params
    assert {name: getattr(params, name) for name in defaults} == defaults | {
        "temperature": 1.0, "top_k": 0, "repetition_penalty": 1.0
    }  # fmt: skip


def test_a_prompt_is_scored_once_for_all_its_choices(server: Running) -> None:
    server.complete(["say a", "say b"], n=3, echo=True, logprobs=1)
    asked = [handle.params.prompt_logprobs for handle in server.engine.submitted[-6:]]
    assert asked == [1, None, None] * 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_tokens(server: Running, streaming: bool, include: bool) -> None:
    aborted = server.engine.aborted
    fields = {"stop": ["zzz", "b🙂c"], "include_stop_str_in_output": include}
    prompt = "say aab🙂b🙂cdef and much more"
    if streaming:
        chunks = stream(server, prompt, stream_options={"include_usage": True}, **fields)
        text, last, usage = text_of(chunks), chunks[-2]["choices"][0], chunks[-1]["usage"]
    else:
        answer = server.complete(prompt, **fields).json()
        last, usage = answer["choices"][0], answer["usage"]
        text = last["text"]
    assert text == ("aab🙂b🙂c" if include else "aab🙂")
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "b🙂c")
    assert usage["completion_tokens"] == len("aab🙂b🙂c".encode())
    assert server.engine.aborted == aborted + 1  # the engine does not go on behind a stop string


def test_min_tokens_delays_stop_strings(server: Running) -> None:
    answer = server.complete("say a.b.c.d", stop=".", min_tokens=3).json()
    assert answer["choices"][0]["text"] == "a.b"


def test_stop_token_ids_and_special_tokens(server: Running) -> None:
    stop = server.engine.tokenizer.encode("!")
    choice = server.complete("say hi!you", stop_token_ids=stop).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hi", "stop", stop[0])
    choice = server.complete("say hi!you", stop_token_ids=stop, include_stop_str_in_output=True).json()["choices"][0]
    assert choice["text"] == "hi!"
    choice = server.complete("say hi", ignore_eos=True, skip_special_tokens=False).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hi<|end|>", "length", None)


def test_an_answer_without_text_is_one_chunk(server: Running) -> None:
    chunks = stream(server, "nothing")
    assert len(chunks) == 1
    choice = chunks[0]["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)


def test_half_a_character_at_the_end_is_replaced(server: Running) -> None:
    for streaming in (False, True):
        if streaming:
            assert text_of(stream(server, "say 🙂", max_tokens=2)) == "\ufffd"
        else:
            assert server.complete("say 🙂", max_tokens=2).json()["choices"][0]["text"] == "\ufffd"


def test_continuous_usage(server: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(server, "say abc", stream_options=options)
    assert chunks[0]["usage"]["completion_tokens"] == 1
    assert chunks[0]["usage"]["prompt_tokens"] == 7
    assert chunks[-2]["usage"] == chunks[-1]["usage"]
    assert chunks[-1]["usage"]["completion_tokens"] == 4


def test_return_token_ids(server: Running) -> None:
    tokenizer = server.engine.tokenizer
    expected = tokenizer.encode("a🙂")
    choice = server.complete("say a🙂", return_token_ids=True).json()["choices"][0]
    assert choice["token_ids"] == [*expected, EOS]
    assert choice["prompt_token_ids"] == tokenizer.encode("say a🙂")
    chunks = stream(server, "say a🙂", return_token_ids=True)
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == [*expected, EOS]
    assert chunks[0]["choices"][0]["prompt_token_ids"] == tokenizer.encode("say a🙂")
    assert chunks[-1]["choices"][0]["prompt_token_ids"] is None
    choice = server.complete("say abXYcd", return_token_ids=True, stop="XY").json()["choices"][0]
    assert choice["token_ids"] == tokenizer.encode("abXY")


@pytest.mark.parametrize("own_server", [{"per_step": 5}], indirect=True)
def test_several_tokens_a_step(own_server: Running) -> None:
    chunks = stream(own_server, "say 0123456789🙂abc", stream_options={"include_usage": True})
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == ["01234", "56789", "🙂a", "bc"]
    choice = own_server.complete("say abXYcd", stop="XY", return_token_ids=True).json()["choices"][0]
    assert choice["text"] == "ab"
    assert choice["token_ids"] == own_server.engine.tokenizer.encode("abXY")


def test_failure_before_the_first_token_is_a_500(server: Running) -> None:
    for streaming in (False, True):
        answer = server.complete("fail 0", stream=streaming)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
    with pytest.raises(openai.InternalServerError):
        server.openai.completions.create(model="fake", prompt="fail 0")


def test_failure_in_mid_stream_is_an_error_event(server: Running) -> None:
    *chunks, error = stream(server, "fail 3")
    assert text_of(chunks) == "x x"
    assert error["error"]["code"] == "generation_failed"
    *chunks, error = stream(server, ["fail 3", "forever"], max_tokens=1000)
    assert "error" in error
    with pytest.raises(openai.APIError):
        list(server.openai.completions.create(model="fake", prompt="fail 3", stream=True))
    assert server.complete("fail 3").status_code == 500


def test_a_detokenizer_that_fails_ends_its_request_only(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from dspark_server.engine.output import TextStream

    original = TextStream.push

    def push(self, tokens):
        if tokens and tokens[0] == server.engine.tokenizer.encode("\x07")[0]:
            raise RuntimeError("boom")
        return original(self, tokens)

    monkeypatch.setattr(TextStream, "push", push)
    neighbour: list[list[dict]] = []
    thread = threading.Thread(target=lambda: neighbour.append(stream(server, "forever", max_tokens=60)))
    thread.start()
    *_, error = stream(server, "say abc\x07def")
    thread.join()
    assert "boom" not in json.dumps(error)
    assert error["error"]["type"] == "server_error"
    assert len(text_of(neighbour[0])) == 60


def test_many_streams_at_once(server: Running) -> None:
    texts: dict[int, str] = {}

    def one(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=20) as client:
            body = {"prompt": f"say {number} {EMOJI}", "max_tokens": 80, "stream": True}
            texts[number] = text_of(events(client.post("/v1/completions", json=body)))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: f"{number} {EMOJI}" for number in range(32)}
