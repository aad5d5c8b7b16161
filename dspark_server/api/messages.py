"""POST /v1/messages: a chat completion in the form of Anthropic's API, whole or as its named events."""

from typing import Any

import orjson
from fastapi import Request, Response
from starlette.types import Send

from dspark_server.api.chat import Chat
from dspark_server.api.chat_schema import ChatRequest
from dspark_server.api.encoding import json_text
from dspark_server.api.errors import anthropic_error, describe
from dspark_server.api.generation import Choice
from dspark_server.api.intake import Asked, Intake
from dspark_server.api.messages_schema import MessagesRequest
from dspark_server.api.responses import STREAM_HEADERS, GenerationResponse, send_json
from dspark_server.api.schema import parse
from dspark_server.api.shapes import CHAT
from dspark_server.engine.engine import AsyncEngine
from dspark_server.engine.request import FinishReason
from dspark_server.errors import RequestError


class Messages:
    """The messages endpoint of one engine."""

    def __init__(self, intake: Intake, chat: Chat) -> None:
        self._intake = intake
        self._chat = chat

    async def create(self, request: Request) -> Response:
        """Serve one request.

        Raises RequestError, CapacityError or EngineDeadError; the response, once made, reports failures itself.
        """
        asked = await self._intake.receive(request, _parse, "msg_")
        await self._chat.start(asked)
        return MessagesResponse(self._intake.engine, asked)


def _parse(body: bytes) -> ChatRequest:
    asked = parse(body, MessagesRequest)
    if asked.max_tokens is None:
        raise RequestError("`max_tokens` is needed.", param="max_tokens")
    return asked.as_chat()


class MessagesResponse(GenerationResponse):
    """The answer of one choice: a message, or the events that tell it piece by piece."""

    def __init__(self, engine: AsyncEngine, asked: Asked[ChatRequest]) -> None:
        head = {"id": asked.identifier, "type": "message", "role": "assistant", "model": engine.model_name}
        super().__init__(engine, asked.generation, CHAT, head, None)
        self._stream = asked.body.stream

    async def respond(self, send: Send) -> None:
        """Send the whole answer."""
        generation, choice = self.generation, self.generation.choices[0]
        await (generation.wait() if self._stream else generation.wait_over())
        if generation.disconnected:
            return
        if generation.failure is not None:
            await self.send_failure(send)
        elif self._stream:
            await self._send_events(send, choice)
        else:
            text = choice.pending_text
            await send_json(send, 200, self._message(choice, [{"type": "text", "text": text}] if text else []), {})

    async def send_failure(self, send: Send) -> None:
        """See the base class; the error has Anthropic's shape."""
        status, body, headers = describe(self.failure())
        await send_json(send, status, anthropic_error(status, body), headers)

    async def _send_events(self, send: Send, choice: Choice) -> None:
        """Send events as text comes. The first text goes out with the message's beginning: nothing is early."""
        generation = self.generation
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        events = [_event("message_start", {"message": self._message(choice, [], begun=True)})]
        opened = False
        while True:
            over = generation.over  # read before the text: what came until then is sent
            text, choice.pending_text = choice.pending_text, ""
            if text and not opened:
                opened = True
                events.append(
                    _event("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}})
                )
            if text:
                events.append(_DELTA % json_text(text))
            if over:
                events += self._ending(choice, opened=opened)
            if generation.disconnected:
                return
            await send({"type": "http.response.body", "body": b"".join(events), "more_body": not over})
            if over:
                return
            events = []
            await generation.wait()

    def _ending(self, choice: Choice, *, opened: bool) -> list[bytes]:
        if self.generation.failure is not None:
            return [_event("error", anthropic_error(*describe(self.failure())[:2]))]
        ended = [_event("content_block_stop", {"index": 0})] if opened else []
        end = {"delta": _end(choice), "usage": _usage(choice), **self.generation.figures}
        return [*ended, _event("message_delta", end), _event("message_stop", {})]

    def _message(self, choice: Choice, content: list[dict[str, Any]], *, begun: bool = False) -> dict[str, Any]:
        """Return the message; one that has `begun` has no end yet."""
        end = {"stop_reason": None, "stop_sequence": None} if begun else _end(choice)
        figures = {} if begun else self.generation.figures
        return {**self.head, "content": content, **end, "usage": _usage(choice), **figures}


_DELTA = (
    b"event: content_block_delta\n"
    b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":%b}}\n\n'
)


def _event(name: str, fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps({"type": name, **fields}))


def _end(choice: Choice) -> dict[str, Any]:
    """Return why the answer ended."""
    if choice.finish_reason == FinishReason.LENGTH:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(choice.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _usage(choice: Choice) -> dict[str, int]:
    """Token counts; `input_tokens` are those that were not in the cache."""
    return {
        "input_tokens": len(choice.prompt) - choice.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": choice.cached_tokens,
        "output_tokens": choice.completion_tokens,
    }
