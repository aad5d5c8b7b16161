"""POST /v1/completions: from a body to choices in the engine, to the response that reads them."""

import asyncio
import uuid
from time import monotonic, time

from fastapi import Request, Response

from dspark_server.api.generation import Choice, Generation
from dspark_server.api.metrics import Metrics
from dspark_server.api.responses import StreamResponse, WholeResponse
from dspark_server.api.schema import CompletionRequest, parse, prompts_of
from dspark_server.api.settings import ServerSettings
from dspark_server.engine.engine import AsyncEngine, Reservation, TokenEvent
from dspark_server.engine.output import Detokenizer, StopMatcher
from dspark_server.engine.request import FinishReason
from dspark_server.errors import CapacityError, RequestError


class Completions:
    """The completions endpoint of one engine."""

    def __init__(self, engine: AsyncEngine, metrics: Metrics, settings: ServerSettings) -> None:
        self._engine = engine
        self._metrics = metrics
        self._settings = settings
        self._detokenizer: Detokenizer | None = None

    def warm_up(self) -> None:
        """Build the token table, so that the first request does not pay for it."""
        if self._detokenizer is None:
            self._detokenizer = Detokenizer(self._engine.tokenizer)

    async def create(self, request: Request) -> Response:
        """Serve one request.

        Raises RequestError, CapacityError or EngineDeadError; once the response is made it reports failures itself.
        """
        arrival = monotonic()
        body = parse(await self._read(request))
        if body.model is not None and body.model != self._engine.model_name:
            raise RequestError(
                f"This server does not have that model; it serves {self._engine.model_name!r}.",
                param="model",
                status=404,
                code="model_not_found",
            )
        generation = Generation(self._engine, self._metrics, arrival, wants_tokens=body.return_token_ids)
        identifier = f"cmpl-{uuid.uuid4().hex}"
        try:
            await self._start(generation, body, identifier)
        except BaseException:
            generation.close()
            raise
        head = {"id": identifier, "object": "text_completion", "created": int(time()), "model": self._engine.model_name}
        if not body.stream:
            return WholeResponse(self._engine, generation, head)
        usage = {"include_usage": body.include_usage, "continuous_usage": body.continuous_usage}
        return StreamResponse(self._engine, generation, head, **usage)

    async def _read(self, request: Request) -> bytes:
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                return await request.body()
        except TimeoutError:
            raise RequestError("The body took too long to arrive.", status=408) from None

    async def _start(self, generation: Generation, body: CompletionRequest, identifier: str) -> None:
        """Reserve places, tokenize, submit every choice."""
        engine = self._engine
        if engine.health() == "loading":
            raise CapacityError("The model is still loading.", retry_after=5)
        prompts = prompts_of(body, vocab_size=engine.vocab_size, max_model_len=engine.max_model_len)
        if any(token >= engine.vocab_size for token in body.stop_token_ids):
            message = f"A stop token id is outside the vocabulary (0 to {engine.vocab_size - 1})."
            raise RequestError(message, param="stop_token_ids")
        matcher = StopMatcher(body.stops) if body.stops else None
        with engine.reserve(len(prompts) * body.n) as reservation:
            self.warm_up()
            encoded = [await self._encode(prompt, body.add_special_tokens) for prompt in prompts]
            for number, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True)):
                echo = await self._echo(prompt, tokens, body)
                for choice in range(body.n):
                    index = number * body.n + choice
                    self._submit(generation, body, reservation, tokens, matcher, echo, index, f"{identifier}-{index}")

    async def _encode(self, prompt: str | list[int], add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        return await self._engine.encode(prompt, add_special_tokens=add_special_tokens)

    async def _echo(self, prompt: str | list[int], tokens: list[int], body: CompletionRequest) -> str:
        """The text a choice begins with: the prompt as given, or its ids as text."""
        if not body.echo:
            return ""
        if isinstance(prompt, str):
            return prompt
        assert self._detokenizer is not None
        decode = self._detokenizer.decode
        return await asyncio.to_thread(decode, tokens, skip_special_tokens=body.skip_special_tokens)

    def _submit(
        self,
        generation: Generation,
        body: CompletionRequest,
        reservation: Reservation,
        prompt: list[int],
        matcher: StopMatcher | None,
        echo: str,
        index: int,
        request_id: str,
    ) -> None:
        assert self._detokenizer is not None
        params = body.sampling()
        choice = Choice(
            generation,
            index,
            prompt,
            self._detokenizer.stream(
                prompt,
                matcher,
                min_tokens=body.min_tokens,
                include_stop=body.include_stop_str_in_output,
                skip_special_tokens=body.skip_special_tokens,
            ),
            stop_token_ids=params.stop_token_ids,
            drop_stop_token=not body.include_stop_str_in_output,
            echo=echo,
        )
        generation.add(choice)
        if params.max_tokens == 0:  # echo only
            choice.on_tokens(TokenEvent([], FinishReason.LENGTH))
            return
        choice.handle = self._engine.submit(
            prompt,
            params,
            reservation=reservation,
            choice=index % body.n,
            request_id=request_id,
            on_tokens=choice.on_tokens,
            cache_salt=body.cache_salt,
        )
