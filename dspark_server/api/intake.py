"""Steps that completions and chat share before the answer: read, check, tokenize, submit."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Generic, TypeVar

from fastapi import Request

from dspark_server.api.edge import REQUEST_ID
from dspark_server.api.generation import Choice, Generation
from dspark_server.api.metrics import Metrics
from dspark_server.api.schema import GenerationRequest
from dspark_server.api.settings import ServerSettings
from dspark_server.api.structured import StructuredForms
from dspark_server.engine.admission import Reservation
from dspark_server.engine.engine import AsyncEngine
from dspark_server.engine.output import Detokenizer, StopMatcher
from dspark_server.engine.request import SamplingParams
from dspark_server.errors import RequestError

BYTES_PER_TOKEN = 4  # of text, on average; of token ids in JSON too

B = TypeVar("B", bound=GenerationRequest)


@dataclass(frozen=True)
class Asked(Generic[B]):
    """A request that was read and checked. `likely_tokens`: estimated number of its prompt tokens."""

    body: B
    generation: Generation
    identifier: str
    likely_tokens: int


@dataclass(frozen=True)
class Prompt:
    """The prompt's tokens, and the text that the answer begins with (the prompt's own, if it is echoed)."""

    tokens: list[int]
    echo: str = ""


class Intake:
    """Takes requests for one engine."""

    def __init__(self, engine: AsyncEngine, metrics: Metrics, settings: ServerSettings) -> None:
        self.engine = engine
        self.metrics = metrics
        self.settings = settings
        self._forms = StructuredForms(engine, settings.structured_outputs)
        self._detokenizer: Detokenizer | None = None

    @property
    def detokenizer(self) -> Detokenizer:
        """The detokenizer, built on first use; `warm_up` builds it before the first request."""
        if self._detokenizer is None:
            self._detokenizer = Detokenizer(self.engine.tokenizer)
        return self._detokenizer

    def warm_up(self) -> None:
        """Build the token table and the grammar compiler, so that no request has to wait for them."""
        assert self.detokenizer
        self._forms.warm_up()

    async def read(self, request: Request) -> bytes:
        """Read the body. Raises RequestError (408) if it does not arrive in time."""
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                return await request.body()
        except TimeoutError:
            raise RequestError("The body took too long to arrive.", status=408) from None

    def generation(self, request: Request, arrival: float, *, wants_tokens: bool) -> Generation:
        """Return an empty generation for a tenant's request that arrived at `arrival` (monotonic seconds)."""
        tenant = request.state.tenant
        return Generation(self.engine, self.metrics, arrival, wants_tokens=wants_tokens, tenant=tenant)

    async def receive(self, request: Request, parse: Callable[[bytes], B], prefix: str) -> Asked[B]:
        """Read a body, `parse` and check it; the answer's id begins with `prefix`. Raises RequestError."""
        arrival = monotonic()
        content = await self.read(request)
        body = parse(content)
        self.check(body)
        generation = self.generation(request, arrival, wants_tokens=body.return_token_ids)
        # An estimate: a place is reserved before `submit` counts the tokens.
        likely = len(content) // BYTES_PER_TOKEN
        return Asked(body, generation, f"{prefix}{body.request_id or request.scope[REQUEST_ID]}", likely)

    def check_model(self, name: str | None) -> None:
        """Raise RequestError (404) for a model that is not served; None stands for the served one."""
        if name is not None and name != self.engine.model_name:
            raise RequestError(
                f"This server does not have that model; it serves {self.engine.model_name!r}.",
                param="model",
                status=404,
                code="model_not_found",
            )

    def check(self, body: GenerationRequest) -> None:
        """Check the rules that need no tokenizer. Raises RequestError."""
        engine = self.engine
        self.check_model(body.model)
        for name in ("stop_token_ids", "allowed_token_ids"):
            if any(token >= engine.vocab_size for token in getattr(body, name) or ()):
                raise RequestError(
                    f"A token id in `{name}` is outside the vocabulary (0 to {engine.vocab_size - 1}).", param=name
                )
        if body.truncate_prompt_tokens is not None and body.truncate_prompt_tokens > engine.max_model_len:
            raise RequestError(
                f"`truncate_prompt_tokens` exceeds the model's context length of {engine.max_model_len}.",
                param="truncate_prompt_tokens",
            )

    async def encode(self, text: str, body: GenerationRequest, *, add_special_tokens: bool) -> list[int]:
        """Tokenize a prompt. If it cannot fit, only the part that may be kept is tokenized: 30 MB take a minute.

        Raises RequestError if it cannot fit and must not be cut.
        """
        engine, longest = self.engine, self.detokenizer.longest_token
        most = engine.max_model_len * longest
        if len(text) > most and body.truncate_prompt_tokens is None:
            raise RequestError(
                f"This model's maximum context length is {engine.max_model_len} tokens, but the prompt has {len(text)} "
                f"characters, and no token has more than {longest}.",
                param="prompt",
                code="context_length_exceeded",
            )
        return await engine.encode(text[-most:], add_special_tokens=add_special_tokens)

    def cut(self, tokens: list[int], body: GenerationRequest, answer: int) -> list[int]:
        """Return the last `truncate_prompt_tokens` of a prompt; -1: as many as leave room for `answer` tokens."""
        keep = body.truncate_prompt_tokens
        if keep is None:
            return tokens
        if keep == 0:
            raise RequestError("`truncate_prompt_tokens` must be -1 or at least 1.", param="truncate_prompt_tokens")
        return tokens[-(max(1, self.engine.room(answer)) if keep == -1 else keep) :]

    async def params(self, body: GenerationRequest, max_tokens: int, tenant: str) -> SamplingParams:
        """Return the engine's sampling parameters. Raises RequestError."""
        params = body.sampling(max_tokens, self.engine.sampling_defaults)
        if any(not 0 <= token < self.engine.vocab_size for token, _ in params.logit_bias):
            raise RequestError(
                f"A token id in `logit_bias` is outside the vocabulary (0 to {self.engine.vocab_size - 1}).",
                param="logit_bias",
            )
        if body.bad_words:
            params = replace(params, bad_words=await self._bad_words(body.bad_words))
        grammar = await self._forms.of(body, tenant)
        return params if grammar is None else replace(params, grammar=grammar)

    async def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Tokenize each word as written and after a space: tokenizers encode these differently (as in vLLM)."""
        spellings: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word, " " + word.lstrip()):
                tokens = tuple(await self.engine.encode(text, add_special_tokens=False))
                if tokens:
                    spellings[tokens] = None
        return tuple(spellings)

    async def submit(
        self,
        asked: Asked[B],
        params: SamplingParams,
        prompts: Sequence[Prompt],
        reservation: Reservation,
        *,
        choices: int,
    ) -> None:
        """Submit `choices` choices for each prompt. Raises RequestError for requests that can never be served.

        The first choice for a prompt has the prompt scored, for its siblings too. The event loop runs between two
        prompts, not between the choices for one: all of them must exist when its scores arrive.
        """
        body, generation = asked.body, asked.generation
        generation.draft_figures = self.settings.per_request_spec_decode_metrics
        matcher = StopMatcher(body.stops) if body.stops else None
        for number, prompt in enumerate(prompts):
            if number:
                await asyncio.sleep(0)
            first: Choice | None = None
            for sibling in range(choices):
                index = number * choices + sibling
                choice = Choice(
                    generation,
                    index,
                    prompt.tokens,
                    self.detokenizer.stream(
                        prompt.tokens,
                        matcher,
                        min_tokens=params.min_tokens,
                        include_stop=body.include_stop_str_in_output,
                        skip_special_tokens=body.skip_special_tokens,
                    ),
                    stop_token_ids=params.stop_token_ids,
                    drop_stop_token=not body.include_stop_str_in_output,
                    echo=prompt.echo,
                    scores_prompt=params.prompt_logprobs is not None,
                )
                generation.add(choice)
                choice.handle = self.engine.submit(
                    prompt.tokens,
                    params if first is None else replace(params, prompt_logprobs=None),
                    reservation=reservation,
                    choice=sibling,
                    request_id=f"{asked.identifier}-{index}",
                    on_tokens=choice.on_tokens,
                    cache_salt=body.cache_salt,
                    leader=None if first is None else first.handle,
                    tenant=generation.tenant,
                )
                if first is None:
                    first = choice
                else:
                    first.siblings.append(choice)
