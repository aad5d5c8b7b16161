"""POST /v1/chat/completions as its clients see it."""

import asyncio
import json
import logging
from unittest.mock import patch

import httpx
import openai
import pytest

from .fake_engine import EOS
from .support import Running
from .test_bad_input import SECRET, check
from .test_completions import EMOJI, events

SAY = [{"role": "user", "content": "say hello"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}, "description": "<&>"}}


def stream(server: Running, messages, **fields) -> list[dict]:
    response = server.chat(messages, stream=True, **fields)
    assert response.status_code == 200, response.text
    return events(response)


def text_of(chunks: list[dict], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def shown(server: Running, messages: list[dict], **fields) -> dict:
    """The chat template's input for `messages` and a last one that makes it tell."""
    with patch.object(server.engine, "per_step", 64):
        answer = server.chat([*messages, {"role": "user", "content": "show"}], **fields)
    assert answer.status_code == 200, answer.text
    return json.loads(answer.json()["choices"][0]["message"]["content"])


# -- answers -------------------------------------------------------------------------------------------------------


def test_openai_client_whole(server: Running) -> None:
    answer = server.openai.chat.completions.create(model="fake", messages=SAY, seed=3, user="me")
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "fake")
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.message.tool_calls) == ("assistant", "hello", None)
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len("say hello"), 6)
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_openai_async_client(server: Running) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            whole = await client.chat.completions.create(model="fake", messages=SAY)
            pieces = []
            async with client.chat.completions.stream(model="fake", messages=SAY) as events:
                async for event in events:
                    if event.type == "content.delta":
                        pieces.append(event.delta)
            return whole.choices[0].message.content, "".join(pieces)

    assert asyncio.run(ask()) == ("hello", "hello")


def test_openai_client_stream(server: Running) -> None:
    messages = [{"role": "user", "content": "say " + EMOJI}]
    options = {"include_usage": True}
    chunks = list(
        server.openai.chat.completions.create(model="fake", messages=messages, stream=True, stream_options=options)
    )
    *texts, last, usage = chunks
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert "".join(chunk.choices[0].delta.content for chunk in texts) == EMOJI
    # The first chunk has the role and text: an empty one would falsify the time to the first token.
    assert (texts[0].choices[0].delta.role, texts[0].choices[0].delta.content) == ("assistant", "n")
    assert all(chunk.choices[0].delta.role is None and chunk.choices[0].delta.content for chunk in texts[1:])
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in texts)
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("stop", None)
    assert usage.choices == []
    assert usage.usage.completion_tokens == len(EMOJI.encode()) + 1


def test_the_chunks_to_the_letter(server: Running) -> None:
    chunks = stream(server, "say ab", stream_options={"include_usage": True})
    head = {"id": chunks[0]["id"], "object": "chat.completion.chunk", "created": chunks[0]["created"], "model": "fake"}
    ends = {"logprobs": None, "finish_reason": None, "stop_reason": None}
    usage = {"prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 9}
    assert chunks == [
        {**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}, **ends}], "usage": None},
        {**head, "choices": [{"index": 0, "delta": {"content": "b"}, **ends}], "usage": None},
        {**head, "choices": [{"index": 0, "delta": {}, **ends, "finish_reason": "stop"}], "usage": None},
        {**head, "choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 2}}},
    ]


def test_continuous_usage(server: Running) -> None:
    chunks = stream(server, "say abc", stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 4]


@pytest.mark.parametrize("own_server", [{"per_step": 64}], indirect=True)
def test_an_answer_of_one_step_is_one_chunk(own_server: Running) -> None:
    for text in ("hello", ""):
        chunks = stream(own_server, f"say {text}" if text else "nothing")
        assert len(chunks) == 1
        choice = chunks[0]["choices"][0]
        assert (choice["delta"], choice["finish_reason"]) == ({"role": "assistant", "content": text}, "stop")
    assert own_server.chat("nothing").json()["choices"][0]["message"] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("streaming", [False, True])
def test_n_choices(server: Running, streaming: bool) -> None:
    if streaming:
        chunks = stream(server, "say two 🙂", n=3, stream_options={"include_usage": True})
        texts = [text_of(chunks, index) for index in range(3)]
        roles = [choice["index"] for chunk in chunks for choice in chunk["choices"] if "role" in choice["delta"]]
        assert sorted(roles) == [0, 1, 2]
        usage = chunks[-1]["usage"]
    else:
        answer = server.chat("say two 🙂", n=3).json()
        texts = [choice["message"]["content"] for choice in answer["choices"]]
        usage = answer["usage"]
    assert texts == ["two 🙂"] * 3
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (12, 3 * 9)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_stop_strings(server: Running, streaming: bool) -> None:
    if streaming:
        chunks = stream(server, "say a.b.c", stop=["b."])
        text, last = text_of(chunks), chunks[-1]["choices"][0]
    else:
        last = server.chat("say a.b.c", stop=["b."]).json()["choices"][0]
        text = last["message"]["content"]
    assert (text, last["finish_reason"], last["stop_reason"]) == ("a.", "stop", "b.")


def test_the_answer_may_fill_the_context(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine, "per_step", 64)
    choice = server.chat("forever", max_tokens=None).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert server.engine.submitted[-1].params.max_tokens == 2048 - len("forever")
    both = ({"max_tokens": first, "max_completion_tokens": second} for first, second in ((5, 5), (5, 9), (9, 5)))
    for fields in ({"max_tokens": 5}, {"max_completion_tokens": 5}, *both):
        assert server.chat("forever", **fields).json()["usage"]["completion_tokens"] == 5
    least = server.chat("forever", max_tokens=9, max_completion_tokens=5, min_tokens=6)
    assert "`max_completion_tokens`" in check(least)["message"]


@pytest.mark.parametrize(("limit", "kept"), [({"max_completion_tokens": 100}, 1948), ({}, 2047)])
def test_a_cut_conversation_leaves_room_for_the_answer(server: Running, limit: dict, kept: int) -> None:
    answer = server.chat("a" * 5000 + " forever", truncate_prompt_tokens=-1, **limit).json()
    assert answer["usage"] == {**answer["usage"], "prompt_tokens": kept, "completion_tokens": 2048 - kept}


def test_sampling_parameters_reach_the_engine(server: Running) -> None:
    server.chat(
        "say x",
        temperature=0,
        top_p=0.5,
        seed=2**64 - 1,
        frequency_penalty=0.5,
        repetition_penalty=1.25,
        logit_bias={"5": 2},
        bad_words=["zz"],
        priority=-3,
        speculation={"max_draft_tokens": 2},
        response_format={"type": "json_object"},
        min_tokens=2,
    )
    params = server.engine.submitted[-1].params
    assert (params.temperature, params.top_p, params.seed, params.min_tokens) == (0, 0.5, 2**64 - 1, 2)
    assert (params.frequency_penalty, params.repetition_penalty, params.logit_bias) == (0.5, 1.25, ((5, 2.0),))
    assert (params.priority, params.max_draft_tokens) == (-3, 2)
    assert params.bad_words
    assert params.grammar is not None


def test_null_is_accepted_everywhere(server: Running) -> None:
    post = server.http.get("/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["messages"]
    assert "$ref" not in json.dumps(schema)
    names = ["name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content", "refusal", "audio", "annotations"]
    empty = dict.fromkeys(names)
    fields = dict.fromkeys([*schema["properties"], "functions", "function_call", "audio", "modalities", "echo"])
    answer = server.http.post("/v1/chat/completions", json={**fields, "messages": [{**SAY[0], **empty}]})
    assert answer.json()["choices"][0]["message"]["content"] == "hello"


def test_fields_that_ask_for_nothing_are_accepted(server: Running) -> None:
    idle = {"modalities": ["text"], "function_call": "none", "functions": [], "echo": False, "top_logprobs": 0}
    idle |= {"stop": [], "stop_token_ids": [], "bad_words": [], "logprobs": False}
    answer = server.chat("say x", tools=[], chat_template_kwargs={}, documents=[{"text": "a"}], store=False, **idle)
    assert answer.json()["choices"][0]["message"]["content"] == "x"


def test_failures(server: Running) -> None:
    for streaming in (False, True):
        assert server.chat("fail 0", stream=streaming).status_code == 500
    *chunks, error = stream(server, "fail 3")
    assert text_of(chunks) == "x x"
    assert error["error"]["code"] == "generation_failed"


@pytest.mark.parametrize("own_server", [{"capacity": 2}], indirect=True)
def test_a_full_queue_is_refused_before_rendering(own_server: Running) -> None:
    own_server.engine.in_flight += 1  # somebody has a place
    answer = own_server.chat("refuse", n=2)
    assert answer.status_code == 503
    assert "retry-after" in answer.headers
    own_server.engine.in_flight -= 1
    never = own_server.chat("refuse", n=3)  # to come again would not help
    assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
    own_server.canary()


def test_a_client_that_leaves_is_aborted(server: Running) -> None:
    aborted = server.engine.aborted
    with server.http.stream(
        "POST", "/v1/chat/completions", json={"messages": [{"role": "user", "content": "forever"}], "stream": True}
    ) as response:
        assert isinstance(response, httpx.Response)
        next(response.iter_lines())
    server.wait(lambda: server.engine.aborted == aborted + 1)


# -- log-probabilities and token ids --------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_logprobs(server: Running, streaming: bool) -> None:
    """One entry per token, also those that are part of a character: their bytes are exact."""
    if streaming:
        chunks = stream(server, "say a🙂", logprobs=True, top_logprobs=2)
        entries = [entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]]
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "a"}
    else:
        entries = server.chat("say a🙂", logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == "a🙂<|end|>".encode()
    assert [entry["token"] for entry in entries] == ["a", *"\ufffd" * 4, "<|end|>"]
    assert all(entry["logprob"] == -0.5 for entry in entries)
    own, other = entries[0]["top_logprobs"]
    assert own == {"token": "a", "logprob": -0.5, "bytes": [97]}
    assert (other["token"], other["logprob"], other["bytes"]) == ("!", -1.0, [33])


def test_logprobs_in_the_openai_client_and_as_ids(server: Running) -> None:
    answer = server.openai.chat.completions.create(model="fake", messages=SAY, logprobs=True)
    assert [entry.token for entry in answer.choices[0].logprobs.content[:-1]] == list("hello")
    assert all(entry.top_logprobs == [] for entry in answer.choices[0].logprobs.content)
    ids = server.engine.tokenizer.encode("a")
    fields = {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    for none in ({}, {"top_logprobs": 0}, {"top_logprobs": None}):
        plain = server.chat("say a", logprobs=True, **none).json()["choices"][0]["logprobs"]["content"]
        assert [each["top_logprobs"] for each in plain] == [[], []]
    entry = server.chat("say a", **fields).json()["choices"][0]["logprobs"]["content"][0]
    assert entry["token"] == entry["top_logprobs"][0]["token"] == f"token_id:{ids[0]}"
    assert entry["bytes"] == [97]


def test_prompt_logprobs_and_token_ids_stand_beside_the_choices(server: Running) -> None:
    """As in vLLM: there is one prompt, however many choices."""
    ids = server.engine.tokenizer.encode("say a")
    answer = server.chat("say a", n=2, prompt_logprobs=0, return_token_ids=True).json()
    assert answer["prompt_token_ids"] == ids
    assert answer["prompt_logprobs"][0] is None
    assert [list(each) for each in answer["prompt_logprobs"][1:]] == [[str(token)] for token in ids[1:]]
    for choice in answer["choices"]:
        assert choice["token_ids"] == [ids[-1], EOS]
        assert choice["logprobs"] is None
    chunks = stream(server, "say a", return_token_ids=True)
    assert [chunk["prompt_token_ids"] for chunk in chunks] == [ids, None]
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[ids[-1]], [EOS]]


# -- what the template is given -------------------------------------------------------------------------------------


def test_messages_reach_the_template(server: Running) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Århus"}'}}
    given = shown(
        server,
        [
            {"role": "developer", "content": "Be <brief>."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
            {"role": "assistant", "tool_calls": [call], "refusal": None, "reasoning_content": "hm"},
            {"role": "tool", "content": "rain", "tool_call_id": "c1"},
            {"role": "assistant", "content": "", "tool_calls": None},
        ],
        tools=[WEATHER],
        tool_choice="auto",
        chat_template_kwargs={"mood": "sunny"},
    )
    function = {"name": "weather", "arguments": {"city": "Århus"}}
    assert given["messages"] == [
        {"role": "system", "content": "Be <brief>."},  # a template that knows no developers
        {"role": "user", "content": "a\nb", "name": "Ann"},
        {
            **{"role": "assistant", "content": "", "reasoning": "hm", "reasoning_content": "hm"},
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "show"},
    ]
    assert (given["tools"], given["open"], given["mood"]) == ([WEATHER], True, "sunny")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_reaches_the_template_under_both_names(server: Running, name: str) -> None:
    thoughts = {"role": "assistant", name: "hm"}
    given = shown(server, [*SAY, thoughts], chat_template_kwargs={"mood": 1})["messages"]
    assert given[1] == {"role": "assistant", "content": "", "reasoning": "hm", "reasoning_content": "hm"}


@pytest.mark.parametrize("role", ["function", "tool", "critic", "Ünvoiced role"])
def test_any_role_goes_to_the_template(server: Running, role: str) -> None:
    given = shown(server, [{"role": role, "content": "hi", "name": "f"}], chat_template_kwargs={"mood": 1})["messages"]
    assert given[0] == {"role": role, "content": "hi", "name": "f"}


@pytest.mark.parametrize(
    ("said", "content"),
    [
        ({"content": []}, ""),
        ({"content": ""}, ""),
        ({"content": [{"type": "text", "text": ""}, {"type": "text", "text": "b"}]}, "\nb"),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"content": [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}]}, "a\nb"),
        ({"content": None, "refusal": "No."}, "No."),
        ({"content": None, "tool_calls": [{"type": None, "function": {"name": "f", "arguments": None}}]}, ""),
    ],
)
def test_contents(server: Running, said: dict, content: str) -> None:
    messages = [{"role": "assistant", **said}]
    assert shown(server, messages, chat_template_kwargs={"mood": 1})["messages"][0]["content"] == content


def test_what_the_openai_client_answered_can_be_sent_back(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    """The message as its client has it holds a null for everything that the answer does not have."""
    message = server.openai.chat.completions.create(model="fake", messages=SAY).choices[0].message
    answer = server.openai.chat.completions.create(model="fake", messages=[*SAY, message, *SAY])
    assert answer.choices[0].message.content == "hello"
    assert server.chat([*SAY, message.model_dump(), *SAY]).status_code == 200
    assert "unknown" not in caplog.text


def test_unknown_fields_of_messages_are_logged_once(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    part = {"type": "text", "text": "say x", "cache_control": {"type": "ephemeral"}, "annotations": None}
    odd = {"role": "user", "content": [part, part], "weight": 1, "nothing": None}
    assert server.chat([odd, odd, odd], unheard_of=1, store=None).status_code == 200
    lines = [record.message for record in caplog.records if "unknown" in record.message]
    names = "'unheard_of', 'messages[].weight', 'messages[].content[].cache_control'"
    assert lines == [f"ignoring 3 unknown request field(s): {names}"]


def test_a_seed_of_minus_one_is_none(server: Running) -> None:
    assert server.chat("say x", seed=-1).status_code == 200
    assert server.complete("say x", seed=-1).status_code == 200
    assert [handle.params.seed for handle in server.engine.submitted[-2:]] == [None, None]


def test_what_the_template_is_told(server: Running) -> None:
    assert shown(server, SAY, tools=[WEATHER], tool_choice="none", chat_template_kwargs={"mood": 1})["tools"] is None
    odd = {"mood": 1, "self": 2, "range": 3, "": 4, "no name": 5}
    assert shown(server, SAY, chat_template_kwargs=odd)["mood"] == 1
    assert shown(server, SAY, add_generation_prompt=False, chat_template_kwargs={"mood": 1})["open"] is False


def test_a_final_message_is_continued(server: Running) -> None:
    begun = [*SAY, {"role": "assistant", "content": "say on "}]
    assert server.chat(begun, continue_final_message=True, return_token_ids=True).json()["prompt_token_ids"] == (
        server.engine.tokenizer.encode("say on ")
    )


def test_what_the_template_does_not_use_is_logged(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        server.chat("say x", chat_template_kwargs={"enable_thinking": True}, documents=[], nonsense=1)
    assert "does not use 'enable_thinking'" in caplog.text
    assert "'documents', 'nonsense'" in caplog.text


def test_the_template_refuses(server: Running) -> None:
    error = check(server.chat([{"role": "user", "content": SECRET}, {"role": "user", "content": "refuse"}]))
    assert error["message"].endswith("Roles must alternate.")
    assert (error["param"], error["code"]) == ("messages", "chat_template_error")


@pytest.mark.parametrize("own_server", [{"chat_template": None}, {"chat_template": "{% if %}"}], indirect=True)
def test_a_model_without_a_template(own_server: Running) -> None:
    error = check(own_server.chat("say x"))
    assert "--chat-template" in error["message"]
    assert error["code"] == "no_chat_template"
    own_server.canary()
