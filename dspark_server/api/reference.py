"""Makes the API reference from the schema: a server's /docs, which loads nothing from the internet, and docs/api.md."""

import re
import sys
from collections.abc import Iterator
from typing import Any

import orjson
from markdown_it import MarkdownIt

GENERATION = ("/v1/completions", "/v1/chat/completions")
UNBOUNDED = 2**31 - 1
UNITS = {"string": ("Length", "characters"), "array": ("Items", "entries"), "object": ("Properties", "entries")}


def reference(document: dict[str, Any]) -> str:
    """Return the whole page for the content of /openapi.json."""
    paths = document["paths"]
    completion, chat = (_bodies(paths[path]["post"])[0] for path in GENERATION)
    shared = {name: field for name, field in completion["properties"].items() if chat["properties"].get(name) == field}
    parts = [_PREFACE, "## Endpoints", _table(("", "what it does"), list(_endpoints(paths)))]
    for path in GENERATION:
        (body,) = _bodies(paths[path]["post"])
        own = {name: field for name, field in body["properties"].items() if name not in shared}
        parts += [f"## POST {path}", f"Its own fields; those of both endpoints follow below.\n\n{_fields(body, own)}"]
        parts.append(f"Known and refused, unless the value asks for nothing: {_names(body['x-refused'])}.")
    parts += ["## Fields of both", _fields(completion, shared), _ANSWERS]
    for path, methods in paths.items():
        if path not in GENERATION and "requestBody" in methods.get("post", {}):
            parts.append(f"## POST {path}")
            parts.append("\n\nor\n\n".join(_beside(chat, body) for body in _bodies(methods["post"])))
            parts += _NOTES.get(path, [])
    return "\n\n".join([*parts, _ERRORS]) + "\n"


def page(document: dict[str, Any]) -> str:
    """Return the page as HTML that loads nothing from elsewhere. Links to other pages of docs/ become text."""
    text = re.sub(r"\[([^\]]+)\]\(\w[\w-]*\.md\)", r"\1 (docs/)", reference(document))
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(re.sub(r"<!--.*?-->\n*", "", text))
    return _PAGE.format(title=document["info"]["title"], body=body)


def _beside(chat: dict[str, Any], body: dict[str, Any]) -> str:
    """Return the table of a body's fields; of a body with messages, those that are the same in `chat` by name only."""
    fields = body["properties"]
    if "messages" not in fields:
        return _fields(body, fields)
    same = [name for name, field in fields.items() if chat["properties"].get(name) == field]
    others = {name: field for name, field in fields.items() if name not in same}
    return f"{_fields(body, others)}\n\nand, as in a chat, {_names(same)}."


def _bodies(operation: dict[str, Any]) -> list[dict[str, Any]]:
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    return list(schema.get("anyOf", [schema]))


def _endpoints(paths: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for path, methods in paths.items():
        for method, operation in methods.items():
            yield f"`{method.upper()} {path}`", _cell(operation["description"].partition("\n\n")[0])


def _fields(body: dict[str, Any], fields: dict[str, Any]) -> str:
    rows = [row for name, field in fields.items() for row in _rows(name, field, name in body.get("required", ()))]
    return _table(("field", "type", "default", "meaning"), rows)


def _rows(name: str, field: dict[str, Any], required: bool) -> Iterator[tuple[str, ...]]:
    default = field.get("default")
    shown = "required" if required else "" if default is None else f"`{orjson.dumps(default).decode()}`"
    yield f"`{name}`", _cell(_type(field)), shown, _cell(field.get("description", ""))
    for choice in field.get("anyOf", [field]):
        prefix, inner = (f"{name}[]", choice["items"]) if choice.get("type") == "array" else (name, choice)
        if "description" not in field:
            continue  # a part of a type, not a field
        for below, each in inner.get("properties", {}).items():
            yield from _rows(f"{prefix}.{below}", each, below in inner.get("required", ()))


def _type(schema: dict[str, Any]) -> str:
    """The type in words, with its range."""
    if "anyOf" in schema:
        kinds = [_type(choice) for choice in schema["anyOf"] if choice != {"type": "null"}]
        return "; or ".join(dict.fromkeys(kinds)) or "any"
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{orjson.dumps(value).decode()}`" for value in values if value is not None)
    kind: str = schema.get("type", "any")
    if kind in ("integer", "number"):
        return kind + _span(schema.get("minimum"), schema.get("maximum"), schema.get("exclusiveMinimum"))
    if kind == "array":
        of = _type(schema["items"])
        return f"list of ({of})" + _size(schema) if " " in of else f"list of {of}" + _size(schema)
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of ({_type(schema['additionalProperties'])})" + _size(schema)
    return kind + _size(schema)


def _size(schema: dict[str, Any]) -> str:
    suffix, unit = UNITS.get(schema.get("type", ""), ("", ""))
    least, most = schema.get(f"min{suffix}"), schema.get(f"max{suffix}")
    span = _span(least, most, None)
    return f"{span} {unit}" if span else ""


def _span(least: float | None, most: float | None, above: float | None) -> str:
    low = f"more than {_number(above)}" if above is not None else "" if least is None else _number(least)
    if least is not None and least <= -UNBOUNDED:
        return ""
    if most is None or most == UNBOUNDED:
        return f", {low} or more" if least is not None else f", {low}" if low else ""
    return f", {low} to {_number(most)}" if low else f", up to {_number(most)}"


def _number(value: float) -> str:
    return "2^64 - 1" if value >= 2**64 - 1 else f"{value:.15g}"  # JSON schemas hold it as a rounded float


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}: HTTP API</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
body {{ overflow-wrap: anywhere }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; overflow-wrap: normal }}
th, td {{ border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: .3rem .6rem }}
th, td {{ text-align: start; vertical-align: top }}
code {{ font-family: ui-monospace, monospace; font-size: .9em }}
</style>
<main>
{body}</main>
</html>
"""

_PREFACE = """\
# HTTP API

<!-- Made from /openapi.json by `python -m dspark_server.api.reference`; a test says when it is out of date. -->

OpenAI's completions and chat completions with vLLM's further fields. The schema is at `/openapi.json`, and
this page is at `/docs`. Bodies are JSON, whatever their content type. `null` is the same as omitting a field. Types are
strict: `"16"` and `true` are not numbers. An unknown field is ignored, with a warning in the server's log. A known
field that cannot be served is refused, so that no answer silently differs from the request.

[From vLLM](from-vllm.md) lists the differences to vLLM, [structured output](structured-output.md) the ways to ask for a
form."""

_ANSWERS = """\
## Answers

| field | meaning |
| --- | --- |
| `id` | `cmpl-` or `chatcmpl-` and the body's `request_id`, else the `X-Request-Id` |
| `object` | `text_completion`, `chat.completion`, in streams of chats `chat.completion.chunk` |
| `created`, `model` | Unix time in seconds, name of the model |
| `choices[].index` | prompts times `n`: all answers to the first prompt, then those to the second |
| `choices[].text` | of completions |
| `choices[].message` | of chats: `role` and `content`; in streams `delta`, the role in the first chunk |
| `choices[].finish_reason` | `stop`, or `length` at the limit of tokens; `null` until a choice's last chunk |
| `choices[].stop_reason` | the stop string or stop token that ended the answer; `null` for end of sequence |
| `choices[].logprobs` | of completions `tokens`, `token_logprobs`, `top_logprobs`, `text_offset`; of chats `content` |
| `choices[].token_ids` | with `return_token_ids`; so has `prompt_token_ids`, which in chats stands beside `choices` |
| `choices[].prompt_logprobs` | when asked for; in chats beside `choices` |
| `usage` | `prompt_tokens` (a prompt counts once, whatever `n`), `completion_tokens`, `total_tokens`, `prompt_tokens_details.cached_tokens` |
| `metrics` | with `--per-request-spec-decode-metrics`: [statistics of its drafts](monitoring.md) |

Log-probabilities are the target's own, before temperature, penalties and masks; drafting does not change them. The
`bytes` of a chat's tokens, one after the other, are the text in UTF-8 (the end token has its own besides); `token` is
the same as text, with U+FFFD for part of a character. `text_offset` is the place of a token in `text`, in characters.

A stream has one event, `data: {...}`, for each step that gave a choice text, and a last event for each choice with its
`finish_reason`. No empty event precedes the first text. With `include_usage` one more event follows with `"choices": []`.
The stream ends with `data: [DONE]`. A failure in mid-stream gives `data: {"error": ...}` and then `[DONE]`."""  # noqa: E501

_NOTES = {
    "/v1/messages": [
        """\
The answer is a `message` with at most one block, of type `text`. `stop_reason` is `end_turn`, `max_tokens` or
`stop_sequence`. In `usage`, `cache_read_input_tokens` were in the prefix cache, and `input_tokens` are the others. A
stream has the events `message_start`, `content_block_start`, `content_block_delta`, `content_block_stop`,
`message_delta` and `message_stop`; a failure in mid-stream is an `error` event, which ends it.

Blocks `tool_use`, `tool_result` and `thinking` of earlier turns are handed to the chat template; a result needs an
earlier call. Tool calls and thinking in the answer are not parsed: they come as text. The key may be in `x-api-key`.
Errors here, and below this path, are `{"type": "error", "error": {"type", "message"}}`."""
    ]
}

_ERRORS = """\
## Errors

`{"error": {"message", "type", "param", "code"}}`. Messages are bounded and have no content of the request,
except for the part of a form (a schema, an expression) that cannot be compiled.

| status | `type` | when |
| --- | --- | --- |
| 400 | `invalid_request_error` | a field is wrong (`param` names it), not served (`code` is `unsupported`), or prompt and answer do not fit into the context (`context_length_exceeded`) |
| 401 | `invalid_request_error` | no API key, or a wrong one (`invalid_api_key`) |
| 404 | `not_found_error` | no such path (the message names routes of other servers, and what to use instead), or no such model (`model_not_found`) |
| 405 | `invalid_request_error` | the path does not take this method; `Allow` has those it takes |
| 408 | `invalid_request_error` | the body did not arrive in time |
| 413, 431 | `invalid_request_error` | body or headers are too large |
| 429 | `rate_limit_error` | the API key has too many requests running, or sent too many in a minute: with `Retry-After` (`rate_limit_exceeded`) |
| 500 | `server_error` | the server's fault |
| 503 | `service_unavailable_error` | loading, full, not started within `--queue-timeout`, or shutting down: with `Retry-After` (`no_capacity`); the engine has stopped (`engine_dead`) |
| 504 | `timeout_error` | the request did not end within `--request-timeout` (`deadline_exceeded`) |

Every answer has an `X-Request-Id`: the request's own, if that is one printable word of at most 128 characters."""  # noqa: E501


if __name__ == "__main__":
    sys.stdout.write(reference(orjson.loads(sys.stdin.buffer.read())))
