"""POST /v1/messages and its count of tokens as their clients see them."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from dspark_server.api import ServerSettings
from dspark_server.api.chat_schema import ChatRequest
from dspark_server.api.messages_schema import MessagesRequest

from .conftest import tiny_engine
from .support import Running, start

HI = [{"role": "user", "content": "say hello"}]
CALL = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Ulm"}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "rain"}]}
TOOL = {"name": "weather", "input_schema": {"type": "object"}, "description": "<&>"}


def ask(server: Running, messages: Any = None, path: str = "", **fields: Any) -> httpx.Response:
    """Without messages, those that ask for "hello"."""
    messages = HI if messages is None else messages
    body = {"model": server.engine.model_name, "max_tokens": 100, "messages": messages, **fields}
    return server.http.post(f"/v1/messages{path}", json=body)


def events(response: httpx.Response) -> list[dict]:
    """The data of each event, whose name is their type."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def refused(response: httpx.Response, status: int, kind: str = "invalid_request_error") -> str:
    body = response.json()
    assert (response.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert body.keys() == {"type", "error"}
    assert body["error"].keys() == {"type", "message"}
    return body["error"]["message"]


def test_whole(server: Running) -> None:
    answer = ask(server).json()
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message", "role": "assistant", "model": "fake", "content": [{"type": "text", "text": "hello"}],
        "stop_reason": "end_turn", "stop_sequence": None,
        "usage": {
            "input_tokens": len("say hello") - 2, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2,
            "output_tokens": 6,
        },
    }  # fmt: skip


def test_the_events_in_order(server: Running) -> None:
    begin, opened, *deltas, closed, end, stop = events(ask(server, stream=True))
    assert begin["type"] == "message_start"
    assert (begin["message"]["content"], begin["message"]["stop_reason"]) == ([], None)
    assert opened == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert {(each["type"], each["index"], each["delta"]["type"]) for each in deltas} == {
        ("content_block_delta", 0, "text_delta")
    }
    assert "".join(each["delta"]["text"] for each in deltas) == "hello"
    assert closed == {"type": "content_block_stop", "index": 0}
    assert (end["type"], end["delta"]) == ("message_delta", {"stop_reason": "end_turn", "stop_sequence": None})
    assert end["usage"] == ask(server).json()["usage"]
    assert stop == {"type": "message_stop"}


def test_an_answer_without_text_has_no_block(server: Running) -> None:
    nothing = [{"role": "user", "content": "nothing"}]
    assert ask(server, nothing).json()["content"] == []
    assert [each["type"] for each in events(ask(server, nothing, stream=True))] == [
        "message_start", "message_delta", "message_stop",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "text", "end"),
    [
        ({"max_tokens": 3}, "hel", ("max_tokens", None)),
        ({"stop_sequences": ["zz", "lo"]}, "hel", ("stop_sequence", "lo")),
    ],
)
def test_why_it_ends(server: Running, fields: dict, text: str, end: tuple) -> None:
    whole = ask(server, **fields).json()
    assert (whole["content"][0]["text"], (whole["stop_reason"], whole["stop_sequence"])) == (text, end)
    told = events(ask(server, **fields, stream=True))
    assert "".join(each["delta"]["text"] for each in told if each["type"] == "content_block_delta") == text
    assert tuple(told[-2]["delta"].values()) == end


def test_the_template_sees_what_a_chat_would_show_it() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Ulm"}'}}
    chat = [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "Ulm?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call], "reasoning": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "user", "content": "and now"},
    ]
    blocks = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "I look."}, CALL]
    messages = [
        {"role": "user", "content": "Ulm?"},
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": [RESULT, {"type": "text", "text": "and now"}]},
    ]
    system = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    fields = {"system": system, "tools": [TOOL], "tool_choice": {"type": "auto"}, "thinking": {"type": "disabled"}}
    given = MessagesRequest.model_validate({"messages": messages, **fields}).as_chat()
    function = {"name": "weather", "description": "<&>", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": function}]
    expected = ChatRequest.model_validate({"messages": chat, "tools": tools})
    assert (given.turns(), given.shown_tools) == (expected.turns(), expected.shown_tools)
    assert given.chat_template_kwargs == {"enable_thinking": False}
    assert given.opens_answer


def test_a_form_is_the_chats() -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    body = {"messages": HI, "output_config": {"effort": "low", "format": form}}
    asked = MessagesRequest.model_validate(body).as_chat().response_format
    expected = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}
    assert asked == ChatRequest.model_validate({"messages": HI, "response_format": expected}).response_format


def test_a_last_turn_of_the_assistant_is_continued() -> None:
    messages = [*HI, {"role": "assistant", "content": "hel"}]
    assert MessagesRequest.model_validate({"messages": messages}).as_chat().continue_final_message


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": kind, "source": {}}]}], text)
        for kind, text in (("image", "`messages.0.content.1` is an image"), ("document", "is a document"))
    ]
    + [
        ([{"role": "user", "content": [{**RESULT, "content": [{"type": "image"}]}]}], "no earlier `tool_use`"),
        ([{"role": "assistant", "content": [CALL]}, {"role": "user", "content": [{**RESULT, "content": [{"type": "image"}]}]}], "`messages.1.content.0.content.0` is an image"),  # noqa: E501
        ([{"role": "user", "content": [{**RESULT, "tool_use_id": ["c1"]}]}], "no earlier `tool_use`"),
        ([{"role": "robot", "content": "a"}], "`messages.0.role`"),
        ([{"role": "user", "content": 5}], "`messages.0.content`"),
        ([{"role": "user", "content": [5]}], "`messages.0.content.0`"),
        ([{"role": "user"}], "`messages.0.content`"),
        ([], "`messages`"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_named(server: Running, messages: list, place: str) -> None:
    for path in ("", "/count_tokens"):
        assert place in refused(ask(server, messages, path), 400)
    server.canary()


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": None}, {"max_tokens": 0}, {"temperature": -1}, {"stop_sequences": [""]}, {"system": 5},
        {"tool_choice": {"type": "any"}}, {"tool_choice": {"type": "tool", "name": "weather"}}, {"tool_choice": {}},
        {"tools": [{"type": ["custom"]}]},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, {"tools": [{"name": "a"}]},
        {"thinking": {"type": "maybe"}}, {"container": "x"}, {"output_config": {"format": {"type": "x"}}},
        {"messages": [{"role": "user", "content": "x" * 5000}]},
    ],
)  # fmt: skip
def test_bad_fields(server: Running, fields: dict) -> None:
    refused(ask(server, **fields), 400)
    refused(ask(server, **fields, stream=True), 400)
    server.canary()


def test_errors_have_this_apis_shape(server: Running) -> None:
    refused(server.http.post("/v1/messages", content=b"{"), 400)
    refused(server.http.get("/v1/messages"), 405)
    refused(server.http.post("/v1/messages/batches", json={}), 404, "not_found_error")
    refused(ask(server, model="other"), 404, "not_found_error")
    failing = [{"role": "user", "content": "fail 0"}]
    refused(ask(server, failing), 500, "api_error")
    *_, last = events(ask(server, [{"role": "user", "content": "fail 3"}], stream=True))
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")


def test_count_is_that_of_the_answer(server: Running) -> None:
    usage = ask(server).json()["usage"]
    counted = server.http.post("/v1/messages/count_tokens", json={"model": "fake", "messages": HI}).json()
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


@pytest.fixture
def keyed() -> Iterator[Running]:
    yield from start(ServerSettings(port=0, api_key=("first", "second")))


def test_either_header_holds_the_key(keyed: Running) -> None:
    body = {"model": "fake", "max_tokens": 9, "messages": HI}
    for headers in ({"x-api-key": "second"}, {"Authorization": "Bearer first"}):
        assert keyed.http.post("/v1/messages", json=body, headers=headers).status_code == 200
    for headers in ({}, {"x-api-key": "firs"}, {"x-api-key": ""}):
        refused(keyed.http.post("/v1/messages", json=body, headers=headers), 401, "authentication_error")


def test_a_client_that_leaves_ends_its_request(server: Running) -> None:
    body = {"model": "fake", "max_tokens": 1900, "messages": [{"role": "user", "content": "forever"}], "stream": True}
    with server.http.stream("POST", "/v1/messages", json=body) as response:
        next(response.iter_lines())
    server.wait(lambda: server.engine.in_flight == 0)


@pytest.fixture(scope="module")
def tiny_server() -> Iterator[Running]:
    engine = tiny_engine("fixed")
    engine.tokenizer.chat_template = "{{ messages[-1].content }}"
    yield from start(ServerSettings(port=0), engine)


def test_drafted_answers_are_those_of_a_chat(tiny_server: Running) -> None:
    fields = {"max_tokens": 24, "temperature": 0}
    chat = tiny_server.chat(HI, **fields).json()
    whole = ask(tiny_server, **fields).json()
    text = chat["choices"][0]["message"]["content"]
    assert whole["content"][0]["text"] == text
    told = events(ask(tiny_server, **fields, stream=True, speculation={"enabled": False}))
    assert "".join(each["delta"]["text"] for each in told if each["type"] == "content_block_delta") == text
    assert told[-2]["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]
