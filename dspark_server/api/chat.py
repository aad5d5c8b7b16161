"""POST /v1/chat/completions: the chat template turns messages into a prompt; the rest is as for a completion."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from fastapi import Request, Response

from dspark_server.api.chat_schema import ChatRequest
from dspark_server.api.chat_template import ChatTemplate
from dspark_server.api.intake import Asked, Intake, Prompt
from dspark_server.api.logprobs import ChatLogprobs
from dspark_server.api.responses import answer
from dspark_server.api.schema import parse
from dspark_server.api.shapes import CHAT
from dspark_server.errors import RequestError
from dspark_server.words import counted


class Chat:
    """The chat endpoint of one engine."""

    def __init__(self, intake: Intake, template: ChatTemplate) -> None:
        self._intake = intake
        self._template = template

    async def create(self, request: Request) -> Response:
        """Serve one request.

        Raises RequestError, CapacityError or EngineDeadError; the response, once made, reports failures itself.
        """
        intake = self._intake
        asked = await intake.receive(request, partial(parse, kind=ChatRequest), "chatcmpl-")
        body = asked.body
        logprobs = None
        if body.logprobs or body.prompt_logprobs is not None:
            logprobs = ChatLogprobs(intake.detokenizer, body)
        await self.start(asked)
        return answer(intake.engine, asked.generation, body, CHAT, asked.identifier, logprobs)

    async def start(self, asked: Asked[ChatRequest]) -> None:
        """Reserve places, render, tokenize, submit every choice. Raises as `create` does; nothing is left then."""
        with asked.generation.closed_on_failure(), _own_names(asked.body):
            await self._start(asked)

    async def _start(self, asked: Asked[ChatRequest]) -> None:
        intake, engine, body = self._intake, self._intake.engine, asked.body
        with engine.reserve(body.n, min(asked.likely_tokens, engine.max_model_len)) as reservation:
            text = await self._template.render(body)
            tokens = await intake.encode(text, body, add_special_tokens=body.add_special_tokens)
            _, limit = body.limit
            prompt = Prompt(intake.cut(tokens, body, limit or max(1, body.min_tokens)))
            max_tokens = limit or max(1, engine.room(len(prompt.tokens)))  # 1: refused by `submit`, with both lengths
            if body.min_tokens > max_tokens:
                room = counted(max_tokens, "token")
                raise RequestError(f"`min_tokens`: there is room for {room} after this prompt.", param="min_tokens")
            params = await intake.params(body, max_tokens, asked.generation.tenant)
            await intake.submit(asked, params, [prompt], reservation, choices=body.n)


@contextmanager
def _own_names(body: ChatRequest) -> Iterator[None]:
    """Rename the fields in errors to this endpoint's: the engine names those of completions."""
    try:
        yield
    except RequestError as error:
        name, limit = body.limit
        names = {"prompt": "messages", "max_tokens": "messages" if limit is None else name}
        error.param = names.get(error.param or "", error.param)
        raise
