"""Responses of a generation: one JSON answer, or server-sent events.

Streaming is the hot path (32 streams wake at every engine step), so it uses no pydantic model and no task group: the
constant JSON around a text is made once, and all that is new goes out in one `send`.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from time import time
from typing import Any, NamedTuple

import orjson
from fastapi import Response
from starlette.types import Receive, Scope, Send

from dspark_server.api.encoding import json_fields, json_pieces, json_text, writes
from dspark_server.api.errors import GenerationError, describe
from dspark_server.api.generation import Choice, Generation
from dspark_server.api.logprobs import Logprobs, Taken
from dspark_server.api.schema import GenerationRequest
from dspark_server.api.shapes import Shape
from dspark_server.engine.engine import AsyncEngine
from dspark_server.errors import CapacityError, EngineDeadError

DONE = b"data: [DONE]\n\n"
LARGE = 1000  # numbers in what is sent: more are rendered on another thread, as a thousand take a millisecond or two


class Chunk(NamedTuple):
    """An event with more than text, not rendered yet: its beginning, fields of the choice, fields beside the choice."""

    head: bytes
    taken: Taken | None
    fields: dict[str, Any]
    beside: dict[str, Any]


class GenerationResponse(Response):
    """A response that waits for the engine, and aborts the request as soon as its client leaves.

    server.Protocol handles a reader that stalls: it closes the connection, so that the client has left.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        generation: Generation,
        shape: Shape,
        head: dict[str, Any],
        logprobs: Logprobs | None,
    ) -> None:
        super().__init__()
        self.engine = engine
        self.generation = generation
        self.shape = shape
        self.head = head  # id, object, created, model
        self.logprobs = logprobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        watcher = asyncio.create_task(self._watch_disconnect(receive))
        try:
            await self.respond(send)
        finally:
            watcher.cancel()
            self.generation.close()

    async def respond(self, send: Send) -> None:
        """Send the whole answer."""
        raise NotImplementedError

    async def send_failure(self, send: Send) -> None:
        """Send an error response: the request failed before anything was sent."""
        status, body, headers = describe(self.failure())
        await send_json(send, status, body, headers)

    def failure(self) -> Exception:
        """Return the failure of the request as an error for the client."""
        if self.generation.cause is not None:
            return self.generation.cause
        message = self.generation.failure or "The request was aborted."
        health = self.engine.health()
        if health == "dead":
            return EngineDeadError(message)
        return CapacityError(message, retry_after=5) if health == "draining" else GenerationError(message)

    async def _watch_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.generation.disconnect()


class WholeResponse(GenerationResponse):
    """One JSON object when all choices have ended. `best`: (n, best_of); the n likeliest of each prompt's are shown."""

    def __init__(
        self,
        engine: AsyncEngine,
        generation: Generation,
        shape: Shape,
        head: dict[str, Any],
        logprobs: Logprobs | None,
        *,
        best: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(engine, generation, shape, head, logprobs)
        self._best = best

    async def respond(self, send: Send) -> None:
        """Send the whole answer."""
        generation = self.generation
        await generation.wait_over()
        if generation.disconnected:
            return
        if generation.failure is not None:
            await self.send_failure(send)
            return
        shown = generation.choices if self._best is None else best_of(generation.choices, *self._best)
        size = sum(map(self._size, shown))
        await send_answer(send, 200, await _rendered(self._pieces(shown), size), {})

    def _size(self, choice: Choice) -> int:
        """Numbers in what is shown of a choice, and its text as far as it takes time."""
        width = self.generation.wants_tokens if self.logprobs is None else self.logprobs.width
        return width * (len(choice.prompt) + choice.completion_tokens) + len(choice.pending_text) // 1000

    def _pieces(self, shown: Sequence[Choice]) -> Iterator[bytes]:
        """Yield the JSON of the answer, one choice after the other."""
        yield orjson.dumps(self.head)[:-1] + b',"choices":['
        for index, choice in enumerate(shown):
            if index:
                yield b","
            yield from json_pieces(self._choice(index, choice))
        choices = self.generation.choices
        prompt = self._prompt(choices[0]) if self.shape.one_prompt else {}
        yield b"]"
        yield from json_fields({"usage": usage_of(choices), **self.generation.figures, **prompt})
        yield b"}"

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        taken = None if self.logprobs is None else self.logprobs.take(choice)
        fields = {
            "index": index,
            **self.shape.whole(choice.pending_text),
            "logprobs": None if self.logprobs is None or taken is None else self.logprobs.render(taken),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.generation.wants_tokens:
            fields["token_ids"] = choice.pending_tokens
        return fields if self.shape.one_prompt else fields | self._prompt(choice)

    def _prompt(self, choice: Choice) -> dict[str, Any]:
        """Fields about the prompt of a choice, as requested."""
        fields: dict[str, Any] = {}
        if self.logprobs is not None:
            fields["prompt_logprobs"] = self.logprobs.of_prompt(choice)
        if self.generation.wants_tokens:
            fields["prompt_token_ids"] = choice.prompt
        return fields


class StreamResponse(GenerationResponse):
    """Server-sent events: one chunk per choice and engine step that gave it text.

    All that changes while the engine runs is read on the event loop; what is left of a chunk then is its rendering.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        generation: Generation,
        shape: Shape,
        head: dict[str, Any],
        logprobs: Logprobs | None,
        *,
        include_usage: bool,
        continuous_usage: bool,
    ) -> None:
        super().__init__(engine, generation, shape, head, logprobs)
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._head = b"data: " + orjson.dumps(self.head)[:-1] + b',"choices":['
        usage = b',"usage":null' if include_usage else b""
        self._plain = logprobs is None and not continuous_usage and not generation.wants_tokens
        self._plain_tail = (
            shape.after + b',"logprobs":null,"finish_reason":null,"stop_reason":null}]' + usage + b"}\n\n"
        )

    async def respond(self, send: Send) -> None:
        """Send the whole answer."""
        generation = self.generation
        await generation.wait()  # before the status is sent: an early failure becomes a 5xx
        if generation.disconnected:
            return
        if generation.failure is not None:
            await self.send_failure(send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        while not generation.over:
            await self._send_news(send)
            await generation.wait()
        if not generation.disconnected:
            await self._send_news(send, last=True)

    async def _send_news(self, send: Send, *, last: bool = False) -> None:
        """Send everything that is new, one event per choice; after the `last` the end of the stream."""
        news = [self._chunk(choice) for choice in self.generation.choices if choice.has_news]
        if last:
            news.append(self._ending())
        size = sum(_numbers(chunk) for chunk in news if isinstance(chunk, Chunk))
        await _send_body(send, await _rendered(self._pieces(news), size), more=not last)

    def _pieces(self, news: list[bytes | Chunk]) -> Iterator[bytes]:
        for chunk in news:
            if isinstance(chunk, bytes):
                yield chunk
                continue
            scores = None
            if self.logprobs is not None and chunk.taken is not None:
                scores = self.logprobs.render(chunk.taken)
            yield chunk.head
            yield from json_fields({"logprobs": scores, **chunk.fields})
            yield b"}]"
            yield from json_fields(chunk.beside)
            yield b"}\n\n"

    def _chunk(self, choice: Choice) -> bytes | Chunk:
        """Take what is new of a choice."""
        shape = self.shape
        text, choice.pending_text = choice.pending_text, ""
        before = shape.first if choice.first else shape.later
        if self._plain and choice.finish_reason is None:
            choice.first = False
            return b'%b{"index":%d,%b%b%b' % (self._head, choice.index, before, json_text(text), self._plain_tail)
        said = before + json_text(text) if text or choice.first else shape.nothing
        taken = None if self.logprobs is None else self.logprobs.take(choice)
        fields: dict[str, Any] = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        beside: dict[str, Any] = {}
        if self.generation.wants_tokens:
            fields["token_ids"], choice.pending_tokens = choice.pending_tokens, []
            (beside if shape.one_prompt else fields)["prompt_token_ids"] = choice.prompt if choice.first else None
        choice.first = False
        choice.finish_sent = choice.finish_reason is not None
        if self._continuous_usage:
            beside["usage"] = usage_of([choice])
        elif self._include_usage:
            beside["usage"] = None
        head = b'%b{"index":%d,%b%b' % (self._head, choice.index, said, shape.after)
        return Chunk(head, taken, fields, beside)

    def _ending(self) -> bytes:
        if self.generation.failure is not None:
            return b"data: " + orjson.dumps(describe(self.failure())[1]) + b"\n\n" + DONE
        if not self._include_usage:
            return DONE
        figures = {"usage": usage_of(self.generation.choices), **self.generation.figures}
        return self._head + b"]," + orjson.dumps(figures)[1:] + b"\n\n" + DONE


def answer(
    engine: AsyncEngine,
    generation: Generation,
    body: GenerationRequest,
    shape: Shape,
    identifier: str,
    logprobs: Logprobs | None,
    *,
    best: tuple[int, int] | None = None,
) -> GenerationResponse:
    """Return the response to `body`, whole or streamed, for choices that were submitted."""
    name = shape.chunk_name if body.stream else shape.name
    head = {"id": identifier, "object": name, "created": int(time()), "model": engine.model_name}
    if not body.stream:
        return WholeResponse(engine, generation, shape, head, logprobs, best=best)
    usage = {"include_usage": body.include_usage, "continuous_usage": body.continuous_usage}
    return StreamResponse(engine, generation, shape, head, logprobs, **usage)


STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def usage_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """Token counts; a prompt shared by several choices counts once."""
    prompts = {id(choice.prompt): choice for choice in reversed(choices)}.values()
    prompt_tokens = sum(len(choice.prompt) for choice in prompts)
    completion_tokens = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in prompts)},
    }


async def send_json(send: Send, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
    """Send a whole JSON answer."""
    await send_answer(send, status, [orjson.dumps(body)], headers)


async def send_answer(send: Send, status: int, parts: Sequence[bytes], headers: dict[str, str]) -> None:
    """Send a whole answer, its JSON given in parts."""
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    raw += [(b"content-type", b"application/json"), (b"content-length", str(sum(map(len, parts))).encode())]
    with suppress(OSError):  # the client left between the check and the send
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await _send_body(send, parts, more=False)


def _numbers(chunk: Chunk) -> int:
    """Approximate number of numbers in a chunk."""
    lists = (*chunk.fields.values(), *chunk.beside.values())
    return (chunk.taken.size if chunk.taken else 0) + sum(len(each) for each in lists if isinstance(each, list))


async def _rendered(pieces: Iterable[bytes], size: int) -> list[bytes]:
    """Render `pieces` to the parts of a body, on another thread if `size` is large."""
    return await asyncio.to_thread(writes, pieces) if size > LARGE else writes(pieces)


async def _send_body(send: Send, parts: Sequence[bytes], *, more: bool) -> None:
    """Send parts of a body, with the event loop's other work between them."""
    for number, part in enumerate(parts, 1):
        if number > 1:
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": part, "more_body": more or number < len(parts)})


def best_of(choices: Sequence[Choice], n: int, candidates: int) -> list[Choice]:
    """The `n` of every `candidates` choices for a prompt with the highest log-probability per token, best first."""
    if n == candidates:
        return list(choices)
    shown = []
    for start in range(0, len(choices), candidates):
        group = choices[start : start + candidates]
        ranked = sorted(group, key=lambda each: each.cumulative_logprob / max(each.completion_tokens, 1), reverse=True)
        shown += ranked[:n]
    return shown
