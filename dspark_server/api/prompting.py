"""Prompts that the server sends itself, for the dashboard: submitted and counted like a client's."""

import asyncio
from collections.abc import Sequence
from time import monotonic

from dspark_server.api.chat_schema import Conversation
from dspark_server.api.chat_template import ChatTemplate
from dspark_server.api.generation import Choice, Generation
from dspark_server.api.intake import Intake
from dspark_server.engine.output import TextStream
from dspark_server.engine.request import SamplingParams


class Prompting:
    """Starts generations of prompts given as text; with a chat template each is a chat's first turn."""

    def __init__(self, intake: Intake, template: ChatTemplate) -> None:
        self._intake = intake
        self._template = template

    async def warm_up(self) -> None:
        """Build the token table if it is not there yet, off the event loop."""
        await asyncio.to_thread(self._intake.warm_up)

    async def start(self, prompt: str, params: SamplingParams, request_id: str) -> Generation:
        """Reserve a place, encode, submit; the caller waits for the end and closes the generation.

        Raises CapacityError, EngineDeadError or RequestError.
        """
        engine = self._intake.engine
        with engine.reserve() as reservation:
            generation = Generation(engine, self._intake.metrics, monotonic())
            text = prompt
            if self._template.exists:
                turns = {"messages": [{"role": "user", "content": prompt}]}
                text = await self._template.render(Conversation.model_validate(turns))
            tokens = await engine.encode(text, add_special_tokens=not self._template.exists)
            stream = self.text_stream(tokens)
            choice = Choice(generation, 0, tokens, stream, stop_token_ids=frozenset(), drop_stop_token=True)
            choice.handle = engine.submit(
                tokens, params, reservation=reservation, request_id=request_id, on_tokens=choice.on_tokens
            )
            generation.add(choice)
        return generation

    def text_stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """Return a decoder for the tokens that follow `prompt`."""
        return self._intake.detokenizer.stream(prompt)

    def piece(self, token: int) -> str:
        """Text of a single token: the name of a special token, U+FFFD for part of a character."""
        return self._intake.detokenizer.text_of(token)
