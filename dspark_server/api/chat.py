"""POST /v1/chat/completions: messages become a prompt by the chat template; from there on it is a completion."""

from time import monotonic

from fastapi import Request, Response

from dspark_server.api.chat_schema import ChatRequest
from dspark_server.api.chat_template import ChatTemplate
from dspark_server.api.edge import REQUEST_ID
from dspark_server.api.generation import Generation
from dspark_server.api.intake import Intake, Prompt
from dspark_server.api.logprobs import ChatLogprobs
from dspark_server.api.responses import answer
from dspark_server.api.schema import parse
from dspark_server.api.shapes import CHAT
from dspark_server.errors import RequestError


class Chat:
    """The chat endpoint of one engine."""

    def __init__(self, intake: Intake, template: ChatTemplate) -> None:
        self._intake = intake
        self._template = template

    async def create(self, request: Request) -> Response:
        """Serve one request.

        Raises RequestError, CapacityError or EngineDeadError; once the response is made it reports failures itself.
        """
        intake, arrival = self._intake, monotonic()
        content = await intake.read(request)
        body = parse(content, ChatRequest)
        intake.check(body)
        logprobs = None
        if body.logprobs or body.prompt_logprobs is not None:
            logprobs = ChatLogprobs(intake.detokenizer, body)
        generation = intake.generation(request, arrival, wants_tokens=body.return_token_ids)
        identifier = f"chatcmpl-{body.request_id or request.scope[REQUEST_ID]}"
        try:
            await self._start(generation, body, identifier, intake.likely_tokens(content))
        except BaseException as error:
            generation.close()
            if isinstance(error, RequestError):
                _name_fields(error, body)
            raise
        return answer(intake.engine, generation, body, CHAT, identifier, logprobs)

    async def _start(self, generation: Generation, body: ChatRequest, identifier: str, likely: int) -> None:
        """Reserve places, render, tokenize, submit every choice."""
        intake, engine = self._intake, self._intake.engine
        with engine.reserve(body.n, likely) as reservation:
            text = await self._template.render(body)
            tokens = await intake.encode(text, body, add_special_tokens=body.add_special_tokens)
            _, limit = body.limit
            prompt = Prompt(intake.cut(tokens, body, limit or max(1, body.min_tokens)))
            max_tokens = limit or max(1, engine.room(len(prompt.tokens)))  # 1: refused by `submit`, with both lengths
            if body.min_tokens > max_tokens:
                raise RequestError(f"`min_tokens`: only {max_tokens} tokens fit after this prompt.", param="min_tokens")
            params = await intake.params(body, max_tokens, generation.tenant)
            intake.submit(generation, body, params, [prompt], reservation, choices=body.n, identifier=identifier)


def _name_fields(error: RequestError, body: ChatRequest) -> None:
    """Blame the fields of this endpoint: the engine knows a completion's."""
    name, limit = body.limit
    names = {"prompt": "messages", "max_tokens": "messages" if limit is None else name}
    error.param = names.get(error.param or "", error.param)
