"""A request being generated: its choices, between the engine's callbacks and the response that reads them.

The engine calls `Choice.on_tokens` on the event loop, once per step. Text is decoded there at once, so that a stop
string ends the choice in the engine even if its reader stalls; text that a slow reader has not taken is merged. One
wake-up of the response serves all choices that got text in the same step.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from dspark_server import failpoints
from dspark_server.api.drafts import DraftRecord
from dspark_server.api.metrics import Metrics
from dspark_server.engine.engine import AsyncEngine, Handle
from dspark_server.engine.logprobs import TokenLogprob
from dspark_server.engine.output import TextStream, TokenDecoder
from dspark_server.engine.request import FinishReason
from dspark_server.engine.thread import TokenEvent
from dspark_server.errors import DSparkServerError
from dspark_server.logcontext import concerned

logger = logging.getLogger(__name__)

_FAILED = (FinishReason.ABORT, FinishReason.ERROR)


class Choice:
    """One choice: its text not sent yet, its counts, and its finish reason."""

    __slots__ = (
        "_arrival",
        "_drop_stop_token",
        "_first",
        "_generation",
        "_last",
        "_metrics",
        "_scores_prompt",
        "_stop_token_ids",
        "_text",
        "cached_tokens",
        "completion_tokens",
        "cumulative_logprob",
        "decoder",
        "drafts",
        "finish_reason",
        "finish_sent",
        "first",
        "handle",
        "index",
        "pending_logprobs",
        "pending_text",
        "pending_tokens",
        "prompt",
        "prompt_logprobs",
        "siblings",
        "stop_reason",
        "text_offset",
    )

    def __init__(
        self,
        generation: "Generation",
        index: int,
        prompt: list[int],
        text: TextStream,
        *,
        stop_token_ids: frozenset[int],
        drop_stop_token: bool,
        echo: str = "",
        scores_prompt: bool = False,
    ) -> None:
        self._generation = generation
        self._metrics = generation.metrics
        self._arrival = generation.arrival
        self._first = 0.0  # monotonic seconds of the first tokens
        self._last = 0.0  # and of the newest
        self._text = text
        self._stop_token_ids = stop_token_ids
        self._drop_stop_token = drop_stop_token
        self._scores_prompt = scores_prompt  # else it uses the scores of the first choice for the prompt
        self.index = index
        self.prompt = prompt
        self.handle: Handle | None = None
        self.first = True  # nothing has been sent yet
        self.finish_sent = False
        self.pending_text = echo
        self.pending_tokens: list[int] = []
        self.pending_logprobs: list[TokenLogprob] = []  # of tokens not sent yet
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.siblings: list[Choice] = []  # in the first choice for a prompt: the other choices for it
        self.cumulative_logprob = 0.0
        self.decoder: TokenDecoder | None = None  # of the tokens whose log-probabilities have been sent
        self.text_offset = 0  # number of characters of these tokens
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.drafts = generation.draft_record()
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    @property
    def has_news(self) -> bool:
        """Whether there is something to send: text or the end. An echo waits for the first generated token."""
        if self.finish_reason in _FAILED:
            return False  # the request ends with an error instead
        if self._scores_prompt and self.prompt_logprobs is None:
            return False  # the prompt's scores are sent first
        if self.finish_reason is not None:
            return not self.finish_sent
        return self.pending_text != "" and self.completion_tokens > 0

    def on_tokens(self, event: TokenEvent) -> None:
        """Take the tokens of one engine step. Never raises: a failure here ends this request only."""
        if self.finish_reason is not None:
            return  # ended here by a stop string, or already failed
        try:
            self._take(event)
        except Exception:
            concerned.set(self._generation.concerned)  # the engine calls in its own context
            logger.exception("turning tokens into text failed")
            self._generation.fail("The output could not be turned into text.")

    def _take(self, event: TokenEvent) -> None:
        if event.prompt_logprobs is not None:
            for each in (self, *self.siblings):
                each.prompt_logprobs = event.prompt_logprobs
        tokens, logprobs = event.tokens, event.logprobs
        if self._last == 0.0:
            self.cached_tokens = event.cached_tokens
        text = ""
        if tokens:
            self._observe(event)
            if self.drafts is not None and event.drafted:
                self.drafts.add(event.drafted, event.accepted)
            hide = event.stop_token is not None and self._drop_stop_token
            failpoints.hit("text.push")
            text = self._text.push(tokens[:-1] if hide else tokens)
            self.completion_tokens += len(tokens)
        if self._text.stopped is None and event.finish_reason is not None:
            if event.finish_reason in _FAILED:
                self._end(event.finish_reason)
                self._generation.fail(event.error or "The request was aborted.", event.cause)
                return
            text += self._text.finish()
        kept = tokens
        if self._text.stopped is not None:
            kept = tokens[: len(tokens) - max(0, self.completion_tokens - self._text.consumed)]
            self.completion_tokens = self._text.consumed
            self.stop_reason = self._text.stopped
            self._end(FinishReason.STOP)
            if event.finish_reason is None:
                self._generation.abort(self)
        elif event.finish_reason is not None:
            if event.stop_token in self._stop_token_ids:
                self.stop_reason = event.stop_token
            self._end(event.finish_reason)
        if self._generation.wants_tokens:
            self.pending_tokens += kept
        if logprobs is not None:
            self.pending_logprobs += logprobs[: len(kept)]
            self.cumulative_logprob += sum(each.logprob for each in logprobs[: len(kept)])
        if text or self.finish_reason is not None:
            self.pending_text += text
            self._generation.wake()

    def _observe(self, event: TokenEvent) -> None:
        now = monotonic()
        if self._last == 0.0:
            self._first = now
            self._metrics.time_to_first_token.observe(now - self._arrival)
            self._metrics.prefill_time.observe(now - event.admitted)
        else:
            self._metrics.inter_token_latency.observe(now - self._last)
        self._last = now

    def _end(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self._generation.open -= 1
        self._metrics.finished(
            reason.value,
            monotonic() - self._arrival,
            prompt=len(self.prompt),
            generated=self.completion_tokens,
            decode=self._last - self._first if self._first else None,
        )

    def abandon(self) -> None:
        """End this choice because its request is over (the client left, or another choice failed)."""
        if self.finish_reason is None and self.handle is not None:  # a choice that was never admitted is not counted
            self._end(FinishReason.ABORT)
            self._generation.abort(self)


class Generation:
    """The choices of one HTTP request and the one task that waits for their news."""

    def __init__(
        self, engine: AsyncEngine, metrics: Metrics, arrival: float, *, wants_tokens: bool = False, tenant: str = ""
    ) -> None:
        self._engine = engine
        self._waiter: asyncio.Future[None] | None = None
        self._news = False
        self.metrics = metrics
        self.arrival = arrival  # monotonic seconds
        self.tenant = tenant  # the API key's
        self.concerned = concerned.get()  # request ids for its log lines
        self.wants_tokens = wants_tokens
        self.draft_figures = "none"  # "none", "summary" or "detailed": draft statistics in the answer
        self.choices: list[Choice] = []
        self.open = 0  # choices not yet ended
        self.failure: str | None = None  # why the whole request failed
        self.cause: DSparkServerError | None = None  # the same with its status, where the engine knows it
        self.disconnected = False

    def add(self, choice: Choice) -> None:
        """Register a choice before it is submitted."""
        self.choices.append(choice)
        self.open += 1

    def draft_record(self) -> DraftRecord | None:
        """Return a record for a new choice; None if the request asked for none, or nothing is ever drafted."""
        longest = len(self._engine.stats.accepted_per_position)
        if self.draft_figures == "none" or longest == 0:
            return None
        return DraftRecord(longest, detailed=self.draft_figures == "detailed")

    @property
    def figures(self) -> dict[str, Any]:
        """Fields of the answer besides choices and usage: {} or {"metrics": ...}.

        As in vLLM the figures describe one sequence, and are null for an answer with several choices.
        """
        if self.draft_figures == "none":
            return {}
        drafts = self.choices[0].drafts if len(self.choices) == 1 else None
        return {"metrics": {"speculative_decoding": None if drafts is None else drafts.figures()}}

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.open == 0 or self.failure is not None or self.disconnected

    def wake(self) -> None:
        """Report that there is something to send."""
        self._news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Wait for news; all news since the last call count as one."""
        if not self._news:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._news = False

    async def wait_over(self) -> None:
        """Wait until nothing more will come."""
        while not self.over:
            await self.wait()

    def fail(self, message: str, cause: DSparkServerError | None = None) -> None:
        """Mark the request as failed. Other choices end in `close`: this may run inside an engine callback."""
        if self.failure is None:
            self.failure, self.cause = message, cause
        self.wake()

    def disconnect(self) -> None:
        """Release everything at once: the client has left."""
        self.disconnected = True
        self.close()
        self.wake()

    def abort(self, choice: Choice) -> None:
        """Free a choice's place in the engine."""
        if choice.handle is not None:
            self._engine.abort(choice.handle)

    @contextmanager
    def closed_on_failure(self) -> Iterator[None]:
        """Close the request if the block, which submits its choices, raises: no choice is left behind."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all choices that still run; idempotent."""
        for choice in self.choices:
            choice.abandon()
