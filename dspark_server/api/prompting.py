"""Prompts the server sends itself, for the dashboard: through the same door as a client's, and counted the same."""

import asyncio
from collections.abc import Sequence
from time import monotonic
from typing import Any

from dspark_server.api.generation import Choice, Generation
from dspark_server.api.metrics import Metrics
from dspark_server.engine.engine import AsyncEngine
from dspark_server.engine.output import Detokenizer, TextStream
from dspark_server.engine.request import SamplingParams


class Prompting:
    """Starts generations of prompts given as text, in the model's chat template where it has one."""

    def __init__(self, engine: AsyncEngine, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._detokenizer: Detokenizer | None = None

    async def start(self, prompt: str, params: SamplingParams, request_id: str) -> Generation:
        """Reserve a place, encode, submit; the caller waits for the end and closes it.

        Raises CapacityError, EngineDeadError or RequestError.
        """
        engine = self._engine
        with engine.reserve() as reservation:
            await self.warm_up()
            generation = Generation(engine, self._metrics, monotonic())
            text, special = self._rendered(prompt)
            tokens = await engine.encode(text, add_special_tokens=special)
            stream = self.text_stream(tokens)
            choice = Choice(generation, 0, tokens, stream, stop_token_ids=frozenset(), drop_stop_token=True)
            choice.handle = engine.submit(
                tokens, params, reservation=reservation, request_id=request_id, on_tokens=choice.on_tokens
            )
            generation.add(choice)
        return generation

    async def warm_up(self) -> None:
        """Build the token table, once and off the event loop."""
        if self._detokenizer is None:
            self._detokenizer = await asyncio.to_thread(Detokenizer, self._engine.tokenizer)

    def text_stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """Turns the tokens that follow `prompt` into text."""
        assert self._detokenizer is not None
        return self._detokenizer.stream(prompt)

    def piece(self, token: int) -> str:
        """One token as it can be shown alone: a special one by its name, part of a character as U+FFFD."""
        assert self._detokenizer is not None
        return self._detokenizer.decode([token], skip_special_tokens=False)

    def _rendered(self, prompt: str) -> tuple[str, bool]:
        """The text to encode, and whether the tokenizer adds its special tokens: a template has them in it."""
        tokenizer: Any = self._engine.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            return prompt, True
        turns = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)), False
