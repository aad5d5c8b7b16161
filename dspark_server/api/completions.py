"""POST /v1/completions: from a body to choices in the engine, to the response that reads them."""

import asyncio
from time import monotonic

from fastapi import Request, Response

from dspark_server.api.edge import REQUEST_ID
from dspark_server.api.generation import Generation
from dspark_server.api.intake import Intake, Prompt
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

        Raises RequestError, CapacityError or EngineDeadError; once the response is made it reports failures itself.
        """
        intake, arrival = self._intake, monotonic()
        content = await intake.read(request)
        body = parse(content, CompletionRequest)
        intake.check(body)
        logprobs = None
        if body.logprobs is not None or body.prompt_logprobs is not None:
            logprobs = CompletionLogprobs(intake.detokenizer, body)
        generation = intake.generation(request, arrival, wants_tokens=body.return_token_ids)
        identifier = f"cmpl-{body.request_id or request.scope[REQUEST_ID]}"
        try:
            await self._start(generation, body, identifier, content)
        except BaseException:
            generation.close()
            raise
        best = (body.n, body.candidates)
        return answer(intake.engine, generation, body, COMPLETION, identifier, logprobs, best=best)

    async def _start(self, generation: Generation, body: CompletionRequest, identifier: str, content: bytes) -> None:
        """Reserve places, tokenize, submit every choice."""
        intake, engine = self._intake, self._intake.engine
        given = prompts_of(body, vocab_size=engine.vocab_size, max_model_len=engine.max_model_len)
        likely = intake.likely_tokens(content, len(given))
        with engine.reserve(len(given) * body.candidates, likely) as reservation:
            params = await intake.params(body, body.max_tokens, generation.tenant)
            prompts = [await self._prompt(each, body) for each in given]
            intake.submit(
                generation, body, params, prompts, reservation, choices=body.candidates, identifier=identifier
            )

    async def _prompt(self, given: str | list[int], body: CompletionRequest) -> Prompt:
        """Its tokens, and the text a choice begins with: the prompt as given, or its ids as text."""
        tokens = given
        if isinstance(tokens, str):
            tokens = await self._intake.encode(tokens, body, add_special_tokens=body.add_special_tokens)
        kept = self._intake.cut(tokens, body, max(1, body.max_tokens))  # the engine adds one to a prompt it only scores
        if not body.echo:
            return Prompt(kept)
        if isinstance(given, str) and len(kept) == len(tokens):
            return Prompt(kept, given)
        decode = self._intake.detokenizer.decode
        return Prompt(kept, await asyncio.to_thread(decode, kept, skip_special_tokens=body.skip_special_tokens))
