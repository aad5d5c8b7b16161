"""POST /v1/completions: reads a body, submits choices to the engine, and returns the response that reads them."""

import asyncio
from functools import partial

from fastapi import Request, Response

from dspark_server.api.intake import Asked, Intake, Prompt
from dspark_server.api.logprobs import CompletionLogprobs
from dspark_server.api.prompts import prompts_of
from dspark_server.api.responses import answer
from dspark_server.api.schema import CompletionRequest, parse
from dspark_server.api.shapes import COMPLETION


class Completions:
    """The completions endpoint of one engine."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def create(self, request: Request) -> Response:
        """Serve one request.

        Raises RequestError, CapacityError or EngineDeadError; the response, once made, reports failures itself.
        """
        intake = self._intake
        asked = await intake.receive(request, partial(parse, kind=CompletionRequest), "cmpl-")
        body = asked.body
        logprobs = None
        if body.logprobs is not None or body.prompt_logprobs is not None:
            logprobs = CompletionLogprobs(intake.detokenizer, body)
        with asked.generation.closed_on_failure():
            await self._start(asked)
        best = (body.n, body.candidates)
        return answer(intake.engine, asked.generation, body, COMPLETION, asked.identifier, logprobs, best=best)

    async def _start(self, asked: Asked[CompletionRequest]) -> None:
        """Reserve places, tokenize, submit every choice."""
        intake, engine, body = self._intake, self._intake.engine, asked.body
        given = prompts_of(body, vocab_size=engine.vocab_size, max_model_len=engine.max_model_len)
        likely = min(asked.likely_tokens, len(given) * engine.max_model_len)
        with engine.reserve(len(given) * body.candidates, likely) as reservation:
            params = await intake.params(body, body.max_tokens, asked.generation.tenant)
            prompts = [await self._prompt(each, body) for each in given]
            await intake.submit(asked, params, prompts, reservation, choices=body.candidates)

    async def _prompt(self, given: str | list[int], body: CompletionRequest) -> Prompt:
        """Return a prompt's tokens and the text that a choice begins with: the prompt as given, or its ids as text."""
        tokens = given
        if isinstance(tokens, str):
            tokens = await self._intake.encode(tokens, body, add_special_tokens=body.add_special_tokens)
        kept = self._intake.cut(tokens, body, body.max_tokens)
        if not body.echo:
            return Prompt(kept)
        if isinstance(given, str) and len(kept) == len(tokens):
            return Prompt(kept, given)
        decode = self._intake.detokenizer.decode
        return Prompt(kept, await asyncio.to_thread(decode, kept, skip_special_tokens=body.skip_special_tokens))
