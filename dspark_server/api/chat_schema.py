"""The body of a chat completion: a conversation, which a chat template renders, and the options of its answer."""

from typing import Annotated, Any, ClassVar

import orjson
from pydantic import Field

from dspark_server.api.schema import LARGEST_COUNT, MAX_LOGPROBS, UNSUPPORTED, Body, GenerationRequest
from dspark_server.errors import RequestError

MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message
MAX_TOOLS = 512
MAX_TOOL_CALLS = 128  # of one message
MAX_NAME = 256  # characters of a name or an id
MAX_TEMPLATE_KWARGS = 64

# Template variables that are set from the conversation itself, or that a request must not set.
RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
)

# Types of message parts that hold text, and the field with the text; the last two as in OpenAI's Responses API.
TEXT_PARTS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}

TEXT_OR_PARTS: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "type": {"enum": list(TEXT_PARTS), "description": "Other kinds are refused."},
                    "text": {"type": "string", "description": "The text; of a refusal it is `refusal`."},
                },
                "required": ["type"],
            },
        },
        {"type": "null"},
    ]
}


class Message(Body):
    """One turn. `content` and `tool_calls` are checked by `Conversation.turns`, which can say what is wrong."""

    parts: ClassVar[dict[str, frozenset[str]]] = {"content": frozenset({"type", *TEXT_PARTS.values()})}

    role: str = Field(min_length=1, max_length=MAX_NAME)
    """`system`, `user`, `assistant`, `tool` or any other that the template knows; `developer` may become `system`."""
    content: Any = Field(None, json_schema_extra=TEXT_OR_PARTS)
    """Text, or a list of text parts, which stand on lines of their own."""
    name: str | None = Field(None, max_length=MAX_NAME)
    """Handed to the template."""
    reasoning: str | None = None
    """Handed to the template, under both names."""
    reasoning_content: str | None = None
    """Older name of `reasoning`."""
    refusal: str | None = None
    """Content of an assistant that has none else."""
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None
    """Calls the assistant made, as OpenAI has them; `arguments` is a JSON object as text, or the object."""
    tool_call_id: str | None = Field(None, max_length=MAX_NAME)
    """The call that a `tool` message answers; handed to the template."""


class Conversation(Body):
    """Messages and options that a chat template renders into a prompt."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    """The conversation, oldest first."""
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Functions that the template shows to the model. Calls in its answer are not parsed: they come as text."""
    tool_choice: Any = Field(None, json_schema_extra={"enum": ["none", "auto", None]})
    """`"none"` hides the tools from the model; to force a call is refused."""
    add_generation_prompt: bool | None = None
    """The prompt ends with the beginning of an answer; absent: true unless the last message is continued."""
    continue_final_message: bool = False
    """The answer goes on where the last message ends."""
    chat_template: Any = None
    """Refused: a template is a program. `--chat-template FILE` gives the server another one."""
    chat_template_kwargs: dict[str, Any] = Field({}, max_length=MAX_TEMPLATE_KWARGS)
    """Further variables of the template."""
    add_special_tokens: bool = False
    """Add the tokenizer's special tokens to the rendered prompt; templates write them themselves."""

    @property
    def opens_answer(self) -> bool:
        """Whether the prompt ends with the beginning of an assistant's turn."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model sees; none with `tool_choice: "none"`."""
        return None if self.tool_choice == "none" else self.tools or None

    def turns(self) -> list[dict[str, Any]]:
        """The messages for a template: plain dicts, content as one string, arguments of calls as objects.

        Raises RequestError for content that is not text, and for an empty turn.
        """
        return [_turn(message, f"messages.{index}") for index, message in enumerate(self.messages)]

    def check_conversation(self) -> None:
        """Check the rules beyond types, except those of `turns`. Raises RequestError."""
        if self.chat_template is not None:
            raise RequestError(
                "`chat_template` is refused in requests: a template is a program. Start the server with "
                "--chat-template FILE to use another one.",
                param="chat_template",
                code="unsupported",
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "`continue_final_message` and `add_generation_prompt` exclude each other: the last message is either "
                "continued or answered.",
                param="continue_final_message",
            )
        if not RESERVED.isdisjoint(self.chat_template_kwargs):
            raise RequestError(
                "`chat_template_kwargs` must not hold what the request says elsewhere: "
                f"{', '.join(sorted(RESERVED.intersection(self.chat_template_kwargs)))}.",
                param="chat_template_kwargs",
            )
        if self.tool_choice not in (None, "none", "auto"):
            forced = self.tool_choice == "required" or isinstance(self.tool_choice, dict)
            raise RequestError(
                'Forcing a tool call is not supported by this server; use `tool_choice: "auto"`.'
                if forced
                else '`tool_choice` must be "none" or "auto".',
                param="tool_choice",
                code="unsupported" if forced else None,
            )
        for index, tool in enumerate(self.tools or ()):
            function = tool.get("function")
            if (
                tool.get("type") not in ("function", None)
                or not isinstance(function, dict)
                or not _is_name(function.get("name"))
            ):
                raise RequestError(
                    f'`tools.{index}` must be {{"type": "function", "function": {{"name": …}}}}, the name of at most '
                    f"{MAX_NAME} characters.",
                    param="tools",
                )


class ChatRequest(Conversation, GenerationRequest):
    """A chat completion request."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **UNSUPPORTED,
        "audio": (),
        "best_of": (1,),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "web_search_options": (),
    }

    max_tokens: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    """OpenAI's older name of `max_completion_tokens`; of two the smaller counts."""
    max_completion_tokens: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    """Most tokens of the answer; absent: as many as the context holds."""
    logprobs: bool = False
    """Log-probabilities of the answer's tokens."""
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    """So many alternatives for each token; with `logprobs` only."""

    @property
    def wanted_logprobs(self) -> int | None:
        """See the base class."""
        return self.top_logprobs if self.logprobs else None

    @property
    def limit(self) -> tuple[str, int | None]:
        """Name and value of the field that limits the answer's tokens: the smaller of both."""
        most, older = self.max_completion_tokens, self.max_tokens
        if older is not None and (most is None or older < most):
            return "max_tokens", older
        return "max_completion_tokens", most

    def check(self) -> None:
        """See the base class."""
        super().check()
        self.check_conversation()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
        name, limit = self.limit
        if limit is not None and self.min_tokens > limit:
            raise RequestError(f"`min_tokens` must not exceed `{name}`.", param="min_tokens")


def _turn(message: Message, place: str) -> dict[str, Any]:
    content, reasoning = message.content, message.reasoning
    if content is None:
        content = message.refusal
    if reasoning is None:
        reasoning = message.reasoning_content
    if content is None and not message.tool_calls and reasoning is None:
        needed = "content or tool calls" if message.role == "assistant" else "content"
        raise RequestError(f"`{place}` needs {needed}.", param="messages")
    turn: dict[str, Any] = {"role": message.role, "content": _text(content, place)}
    told = {
        "name": message.name,
        "reasoning": reasoning,
        "reasoning_content": reasoning,
        "tool_call_id": message.tool_call_id,
    }
    turn |= {name: value for name, value in told.items() if value is not None}
    if message.tool_calls:
        turn["tool_calls"] = [
            _call(call, f"{place}.tool_calls.{index}") for index, call in enumerate(message.tool_calls)
        ]
    return turn


def _text(content: Any, place: str) -> str:
    """Text of a message; several parts are joined by line ends (as in vLLM)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"`{place}.content` must be a string or a list of text parts.", param="messages")
    if len(content) > MAX_PARTS:
        raise RequestError(f"`{place}.content` may have at most {MAX_PARTS} parts.", param="messages")
    texts = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise RequestError(f'`{place}.content` must hold {{"type": "text", "text": …}} only.', param="messages")
        kind = part["type"]
        if kind not in TEXT_PARTS:
            raise RequestError(
                f"`{place}.content` has a part that is not text; this model takes text only.",
                param="messages",
                code="unsupported",
            )
        text = part.get(TEXT_PARTS[kind])
        if not isinstance(text, str):
            raise RequestError(
                f"`{place}.content` has a {kind} part without its `{TEXT_PARTS[kind]}`.", param="messages"
            )
        texts.append(text)
    return "\n".join(texts)


def _call(call: dict[str, Any], place: str) -> dict[str, Any]:
    """Convert a tool call of the assistant: OpenAI sends its arguments as JSON text, templates take an object."""
    function = call.get("function")
    if (
        not isinstance(function, dict)
        or not _is_name(function.get("name"))
        or call.get("type") not in ("function", None)
    ):
        raise RequestError(f"`{place}` must be a function call with a name.", param="messages")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments)
        except orjson.JSONDecodeError:
            arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(f"`{place}.function.arguments` must be a JSON object.", param="messages")
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME
