"""Bad chats: each a 4xx error object that blames the right field and repeats nothing; then a canary passes."""

from collections.abc import Iterator

import openai
import pytest

from .support import Running
from .test_bad_input import DEEP, NESTED, SECRET, check
from .test_chat import SAY, WEATHER


def body(*messages: object, **fields: object) -> dict[str, object]:
    return {"messages": list(messages) or SAY, "user": SECRET, **fields}


def said(content: object) -> dict[str, object]:
    return body({"role": "user", "content": content})


def called(call: object) -> dict[str, object]:
    return body({"role": "assistant", "tool_calls": [call]}, *SAY)


REFUSED = {
    **{f"{name}={value!r}": body(**{name: value}) for name, value in [
        ("messages", []), ("messages", "say x"), ("messages", {}), ("messages", [None]), ("messages", [5]),
        ("messages", [[]]), ("messages", [{}]),
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", True), ("max_tokens", 1.0), ("max_tokens", 2048),
        ("max_completion_tokens", 0), ("max_completion_tokens", "5"), ("max_completion_tokens", 2**31),
        ("max_completion_tokens", 2048), ("min_tokens", 2040), ("min_tokens", -1),
        ("logprobs", 1), ("logprobs", "true"), ("top_logprobs", 1), ("top_logprobs", 21), ("top_logprobs", True),
        ("tools", {}), ("tools", [5]), ("tools", [{}]), ("tools", [{"type": "function"}]),
        ("tools", [{"type": "function", "function": {"name": ""}}]), ("tools", [{**WEATHER, "type": "x"}]),
        ("tools", [{"type": "function", "function": {"name": "a" * 257}}]),
        ("tool_choice", "required"), ("tool_choice", {"type": "function", "function": {"name": "weather"}}),
        ("tool_choice", "any"), ("tool_choice", 5), ("tool_choice", []),
        ("chat_template", "{{ 1 }}"), ("chat_template", ""), ("chat_template_kwargs", []),
        ("chat_template_kwargs", {"messages": []}),
        ("add_generation_prompt", "yes"), ("continue_final_message", 1), ("add_special_tokens", 0),
        ("functions", [{"name": "a"}]), ("function_call", {"name": "a"}), ("modalities", ["text", "audio"]),
        ("audio", {"voice": "a"}), ("echo", True), ("best_of", 2), ("n", 129), ("n", 0), ("temperature", 3),
        ("stop", [""]), ("stream", 1), ("response_format", {"type": "json_schema"}), ("suffix", "x"),
    ]},
    **{f"content {content!r:.60}": said(content) for content in [
        None, 5, True, {}, [5], ["say x"], [None], [[]], [{}], [{"type": "text"}], [{"type": "text", "text": 5}],
        [{"type": 5}], [{"text": "say x"}], [{"type": "image_url", "image_url": {"url": "data:," + SECRET}}],
        [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}],
        [{"type": "text", "text": "a"}] * 1025,
    ]},
    **{f"call {call!r:.60}": called(call) for call in [
        5, {}, {"function": {}}, {"function": {"name": "a", "arguments": "[1]"}},
        {"function": {"name": "a", "arguments": 5}}, {"function": {"name": 5}},
        {"type": "x", "function": {"name": "a"}},
        {"function": {"name": "a", "arguments": "{" + SECRET}}, {"function": {"name": "a", "arguments": NESTED}},
    ]},
    "response_format=a deep schema": body(response_format={"type": "json_schema", "json_schema": {"schema": DEEP}}),
    "messages=5000 of them": body(*SAY * 5000),
    "messages=500 k numbers": body(messages=[1] * 500_000),
    "tools=513 of them": body(tools=[WEATHER] * 513),
    "chat_template_kwargs=65 of them": body(chat_template_kwargs={str(n): n for n in range(65)}),
    "no messages": {"max_tokens": 5},
    "no role": body({"content": "say x"}),
    "empty role": body({"role": "", "content": "say x"}),
    "long role": body({"role": "a" * 257, "content": "say x"}),
    "role is no string": body({"role": 5, "content": "say x"}),
    "assistant without content": body({"role": "assistant"}, *SAY),
    "assistant with an empty call list": body({"role": "assistant", "tool_calls": []}, *SAY),
    "reasoning is no string": body({"role": "assistant", "content": "", "reasoning": 5}, *SAY),
    "name": body({"role": "user", "content": "say x", "name": "a" * 257}),
    "tool call id": body({"role": "tool", "content": "say x", "tool_call_id": 5}),
    "many calls": body({"role": "assistant", "tool_calls": [WEATHER] * 129}, *SAY),
    "min above max": body(max_tokens=5, min_tokens=6),
    "continued and answered": body(continue_final_message=True, add_generation_prompt=True),
    "prompt_logprobs streamed": body(prompt_logprobs=1, stream=True),
    "stream options": body(stream_options={"include_usage": True}),
    "template fails": body({"role": "user", "content": "show"}),  # `mood` is undefined
    "long prompt": said("say " + "x" * 3000),
    "list": [body()],
}  # fmt: skip


@pytest.fixture(autouse=True)
def canary(server: Running) -> Iterator[None]:
    """Whatever a test sent, the next request works."""
    yield
    assert server.chat("say fine").json()["choices"][0]["message"]["content"] == "fine"


@pytest.mark.parametrize("case", REFUSED)
def test_refused(server: Running, case: str) -> None:
    submitted = len(server.engine.submitted)
    error = check(server.http.post("/v1/chat/completions", json=REFUSED[case]))
    assert error["type"] == "invalid_request_error"
    if "=" in case:
        assert error["param"] == case.partition("=")[0]
    elif case.startswith(("content", "call")):
        assert error["param"] == "messages"
        assert "messages.0" in error["message"]
    assert len(server.engine.submitted) == submitted


def test_images_are_refused_in_words(server: Running) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    with pytest.raises(openai.BadRequestError, match="this model takes text only") as caught:
        server.openai.chat.completions.create(model="fake", messages=[{"role": "user", "content": [image]}])
    assert caught.value.param == "messages"


def test_both_lengths_are_named(server: Running) -> None:
    error = check(server.chat("say " + "x" * 2996))
    assert "3000" in error["message"]
    assert "2048" in error["message"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert server.chat("say " + "x" * 2996, truncate_prompt_tokens=10, max_tokens=5).status_code == 200


def test_other_ways_to_be_wrong(server: Running) -> None:
    assert check(server.chat("say x", model="other"), 404)["code"] == "model_not_found"
    assert check(server.http.get("/v1/chat/completions"), 405)
    for raw in (b"", b"[]", b'{"messages": ' + NESTED.encode() + b"}", b'{"messages": [{"role": "user"'):
        check(server.http.post("/v1/chat/completions", content=raw))
