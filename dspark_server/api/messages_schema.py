"""The body of Anthropic's POST /v1/messages, and its translation into that of a chat completion.

The chat's schema, template and limits do the rest, so that both routes give the same prompt and the same answer.
Source: Anthropic's published reference of the Messages API.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import Field

from dspark_server.api.chat_schema import MAX_MESSAGES, MAX_NAME, MAX_PARTS, MAX_TOOLS, ChatRequest
from dspark_server.api.schema import LARGEST_COUNT, MAX_STOPS, Body, Speculation, StopString, validated
from dspark_server.errors import RequestError

BLOCKS: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}


class Turn(Body):
    """One turn. `content` is checked by `MessagesRequest.as_chat`, which can say what is wrong."""

    role: Literal["user", "assistant"]
    """Who speaks; a last turn of the assistant is continued."""
    content: Any = Field(None, json_schema_extra=BLOCKS)
    """Text, or blocks: `text`, `tool_use`, `tool_result`, `thinking`. Images and documents are refused."""


class Thinking(Body):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "disabled", "adaptive"]
    """Told to the chat template as `enable_thinking`."""
    budget_tokens: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    """Accepted; `max_tokens` is the only limit."""
    display: str | None = Field(None, max_length=MAX_NAME)
    """Accepted; without effect."""


class OutputConfig(Body):
    """The form of the answer."""

    effort: str | None = Field(None, max_length=MAX_NAME)
    """Accepted; without effect."""
    format: dict[str, Any] | None = None
    """`{"type": "json_schema", "schema": …}`: the answer is JSON of this schema."""


class MessagesRequest(Body):
    """A request of the Messages API."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"container": (), "mcp_servers": (), "output_format": ()}

    model: str | None = Field(None, max_length=1024)
    """Name of the model, as in /v1/models; absent: the one that is served."""
    max_tokens: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    """Most tokens of the answer. Needed, but not to count tokens."""
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    """The conversation, oldest first."""
    system: Any = Field(None, json_schema_extra=BLOCKS)
    """Instructions: text, or blocks of text."""
    stop_sequences: list[StopString] = Field([], max_length=MAX_STOPS)
    """Ends the answer where one of these comes up; `stop_sequence` says which."""
    stream: bool = False
    """Send server-sent events."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 is greedy: always the likeliest token."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int | None = Field(None, ge=-1, le=LARGEST_COUNT)
    """Sample from so many of the likeliest tokens."""
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Tools that the template shows to the model. Calls in its answer are not parsed: they come as text."""
    tool_choice: dict[str, Any] | None = None
    """`{"type": "auto"}` or `{"type": "none"}`; to force a call is refused."""
    thinking: Thinking | None = None
    """Whether the model thinks. Its thinking comes as the template has it, not in a block of its own."""
    output_config: OutputConfig | None = None
    """The form of the answer."""
    metadata: dict[str, Any] | None = None
    """Accepted; without effect."""
    service_tier: str | None = Field(None, max_length=MAX_NAME)
    """Accepted; without effect."""
    speculation: Speculation | None = None
    """How this request is drafted for; what comes out is the same."""

    def as_chat(self) -> ChatRequest:
        """The same request as a chat completion, checked. Raises RequestError (400)."""
        given = self.model_dump(
            include={"model", "max_tokens", "stream", "temperature", "top_p", "top_k", "speculation"},
            exclude_unset=True,
        )
        values: dict[str, Any] = {**given, "messages": list(self._turns()), "stop": self.stop_sequences}
        values["continue_final_message"] = self.messages[-1].role == "assistant"
        if self.tools:
            values["tools"] = [_tool(tool, f"tools.{index}") for index, tool in enumerate(self.tools)]
        if self.tool_choice is not None:
            values["tool_choice"] = _tool_choice(self.tool_choice)
        if self.thinking is not None:
            values["chat_template_kwargs"] = {"enable_thinking": self.thinking.type != "disabled"}
        if self.output_config is not None and self.output_config.format is not None:
            values["response_format"] = _form(self.output_config.format)
        chat = validated(ChatRequest, values)
        chat.check()
        return chat

    def _turns(self) -> Iterator[dict[str, Any]]:
        if self.system is not None:
            yield {"role": "system", "content": [_text(b, p) for b, p in _blocks(self.system, "system")]}
        called: set[str] = set()
        for index, turn in enumerate(self.messages):
            blocks = list(_blocks(turn.content, f"messages.{index}.content"))
            if turn.role == "user":
                yield from _user(blocks, called)
            else:
                yield _assistant(blocks, called)


def _user(blocks: list[tuple[dict[str, Any], str]], called: set[str]) -> Iterator[dict[str, Any]]:
    """Yield a user's turn: each result of a tool as a message of its own, texts between them as the user's."""
    texts: list[dict[str, str]] = []
    for block, place in blocks:
        if block["type"] != "tool_result":
            texts.append(_text(block, place))
            continue
        if texts:
            yield {"role": "user", "content": texts}
            texts = []
        identifier = block.get("tool_use_id")
        if not isinstance(identifier, str) or identifier not in called:
            raise RequestError(f"`{place}`: no earlier `tool_use` block has this `tool_use_id`.", param="messages")
        inner = block.get("content")
        content = [] if inner is None else [_text(b, p) for b, p in _blocks(inner, f"{place}.content")]
        yield {"role": "tool", "tool_call_id": identifier, "content": content}
    if texts or not blocks:
        yield {"role": "user", "content": texts}


def _assistant(blocks: list[tuple[dict[str, Any], str]], called: set[str]) -> dict[str, Any]:
    texts, calls, thoughts = [], [], []
    for block, place in blocks:
        match block["type"]:
            case "tool_use":
                name, identifier, arguments = block.get("name"), block.get("id"), block.get("input")
                if not isinstance(name, str) or not isinstance(identifier, str) or not isinstance(arguments, dict):
                    raise RequestError(f"`{place}` needs `id`, `name` and `input`, an object.", param="messages")
                called.add(identifier)
                function = {"name": name, "arguments": orjson.dumps(arguments).decode()}
                calls.append({"id": identifier, "type": "function", "function": function})
            case "thinking":
                thoughts.append(_string(block, "thinking", place))
            case "redacted_thinking":
                pass  # holds nothing that a model could read
            case _:
                texts.append(_text(block, place))
    turn: dict[str, Any] = {"role": "assistant", "content": texts}
    if calls:
        turn["tool_calls"] = calls
    if thoughts:
        turn["reasoning"] = "\n".join(thoughts)
    return turn


def _blocks(content: Any, place: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each block and its place. Raises RequestError for anything but text or a list of blocks."""
    if isinstance(content, str):
        yield {"type": "text", "text": content}, place
        return
    if not isinstance(content, list) or len(content) > MAX_PARTS:
        raise RequestError(f"`{place}` must be a string or a list of at most {MAX_PARTS} blocks.")
    for index, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise RequestError(f"`{place}.{index}` must be an object with a `type`.")
        yield block, f"{place}.{index}"


def _text(block: dict[str, Any], place: str) -> dict[str, str]:
    """Return a text block as a chat's part. Raises RequestError for any other block."""
    kind = block["type"]
    if kind in ("image", "document"):
        raise RequestError(f"`{place}` is {'an' if kind == 'image' else 'a'} {kind}; this model takes text only.")
    if kind != "text":
        raise RequestError(f"`{place}` has a `type` that is not supported here.")
    return {"type": "text", "text": _string(block, "text", place)}


def _string(block: dict[str, Any], field: str, place: str) -> str:
    value = block.get(field)
    if not isinstance(value, str):
        raise RequestError(f"`{place}.{field}` must be a string.")
    return value


def _tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise RequestError(f"`{place}` is a tool that Anthropic's servers run; only tools of the client's are served.")
    schema = tool.get("input_schema")
    if not isinstance(tool.get("name"), str) or not isinstance(schema, dict):
        raise RequestError(f"`{place}` needs a `name` and an `input_schema`, an object.")
    function = {"name": tool["name"], "description": tool.get("description"), "parameters": schema}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _form(form: dict[str, Any]) -> dict[str, Any]:
    if form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        raise RequestError(
            '`output_config.format` must be `{"type": "json_schema", "schema": …}`, the schema an object.'
        )
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": form["schema"]}}


def _tool_choice(choice: dict[str, Any]) -> str:
    kind = choice.get("type")
    if kind in ("auto", "none"):
        return str(kind)
    if kind in ("any", "tool"):
        raise RequestError('Forcing a tool call is not supported by this server; use `{"type": "auto"}`.')
    raise RequestError("`tool_choice.type` must be `auto` or `none`.")
