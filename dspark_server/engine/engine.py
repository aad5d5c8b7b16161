"""The engine's asynchronous interface: submit, stream, abort, drain, health.

The event loop and the step thread (thread.py) share no mutable state. Requests and aborts go through one inbox; the
outputs of a step come back in one message, with one wake-up of the event loop per step, not per token.
"""

import asyncio
import copy
import logging
import random
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import monotonic

from transformers import PreTrainedTokenizerBase

from dspark_server import failpoints
from dspark_server.engine.admission import Admission, Reservation
from dspark_server.engine.core import EngineCore
from dspark_server.engine.request import FinishReason, Request, SamplingParams
from dspark_server.engine.stats import EngineStats
from dspark_server.engine.thread import Abort, Select, StepThread, TokenEvent, Watch
from dspark_server.engine.trace import StepTrace
from dspark_server.engine.watchdog import watch
from dspark_server.errors import CapacityError, DeadlineError, DSparkServerError, EngineDeadError, RequestError

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Handle:
    """One submitted choice, as the event loop sees it."""

    request: Request
    on_tokens: Callable[[TokenEvent], None]
    finished: bool = False
    queued_tokens: int = 0  # of the prompt, until the first event
    timers: list[asyncio.TimerHandle] = field(default_factory=list)


class AsyncEngine:
    """Runs an EngineCore on its own thread and streams its tokens to the event loop."""

    def __init__(self, core: EngineCore, tokenizer: PreTrainedTokenizerBase) -> None:
        self.core = core
        self.tokenizer = tokenizer
        self.model_name = core.model_name
        self.max_model_len = core.max_model_len
        self.vocab_size = core.vocab_size
        self.sampling_defaults = core.sampling_defaults
        self.backend = core.backend
        self.speculation = core.speculation
        self.max_num_seqs = core.config.max_num_seqs
        self.drafter = core.drafter
        self.gamma = core.loop.executor.gamma
        self.policies = core.policies
        self.selection = core.loop.selection  # the policy asked for last
        self.costs = core.loop.cost_model  # its tables are replaced whole: safe to read
        self._steps = StepThread(core, self._dispatch, self._mourn)
        self._handles: dict[Request, Handle] = {}
        places = core.config.max_num_seqs + core.config.max_num_queued_reqs
        self._admission = Admission(places, core.config.max_num_queued_tokens)
        self._config = core.config
        self._watchdog: asyncio.Task[None] | None = None
        self._random = random.Random(core.config.seed) if core.config.seed is not None else None
        self._dead: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._encoder_tokenizer = copy.deepcopy(tokenizer)  # a tokenizer serves one thread

    @property
    def stats(self) -> EngineStats:
        """Counters kept by the step thread."""
        return self.core.loop.stats

    @property
    def in_flight(self) -> int:
        """Choices waiting or running, and places reserved for more."""
        return self._admission.in_flight

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that have no answer yet, and those reserved for more."""
        return self._admission.queued_tokens

    @property
    def cache_info(self) -> dict[str, str]:
        """Facts about the KV cache, under vLLM's names."""
        return self.core.cache_info

    # -- controls and observation for the dashboard ------------------------------------------------------------------

    def select(self, policy: str) -> None:
        """Use `policy` (one of `core.policies`) from the next step on; outputs stay lossless."""
        self.selection = policy
        self._steps.put(Select(policy))

    def watch(self, trace: Callable[[StepTrace], None] | None) -> None:
        """Call `trace` with every step that samples, on the step thread; None ends the calls and their cost.

        `trace` must not raise, and must not keep tensors.
        """
        self._steps.put(Watch(trace))

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the step thread; must be called on the event loop that will use the engine."""
        self._loop = asyncio.get_running_loop()
        self._steps.start(self._loop)
        timeout = self._config.step_timeout
        self._watchdog = asyncio.create_task(watch(self._steps.thread, self._steps.heart, timeout, self._mourn))

    async def stop(self) -> None:
        """End the step thread. Requests still in flight get their terminal event first."""
        self.fail_all("The server is shutting down.")
        self._steps.put(None)
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self._steps.thread.is_alive() and self._dead is None:  # a dead one may hang
            await asyncio.get_running_loop().run_in_executor(None, self._steps.thread.join, 5.0)
        self._encoder.shutdown(wait=False, cancel_futures=True)

    def die(self, reason: str) -> None:
        """Declare the engine dead, as something that it runs on is gone. Any thread may call this."""
        self._steps.die(reason)

    @property
    def failure(self) -> str | None:
        """Reason why the engine is dead; None while it is not."""
        return self._dead

    def health(self) -> str:
        """ "ready", "draining" or "dead"."""
        if self._dead is not None:
            return "dead"
        return "draining" if self._admission.draining else "ready"

    def begin_drain(self) -> None:
        """Refuse new requests from now on; those in flight continue."""
        self._admission.draining = True

    async def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing is in flight, at most `timeout` seconds; False if something still is."""
        return await self._admission.wait_idle(timeout)

    def fail_all(self, message: str) -> None:
        """End every request in flight with one error event; in a drain, refuse those that are still being tokenized."""
        self._admission.closed = self._admission.draining
        for handle in list(self._handles.values()):
            self._finish(handle, TokenEvent([], FinishReason.ERROR, error=message))
            self._steps.put(Abort(handle.request))

    # -- requests ----------------------------------------------------------------------------------------------------

    def reserve(self, choices: int = 1, tokens: int = 0) -> Reservation:
        """Take places before any work is done for a request. `tokens`: estimate, as prompts are not tokenized yet.

        Raises CapacityError when the queue is full or the server is draining, EngineDeadError when it is dead,
        RequestError for more choices than there are places.
        """
        if self._dead is not None:
            raise EngineDeadError(f"The engine has stopped: {self._dead}")
        return self._admission.reserve(choices, tokens)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenize off the event loop."""
        assert self._loop is not None
        return await self._loop.run_in_executor(self._encoder, self._encode, text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        failpoints.hit("tokenizer.encode")
        ids: list[int] = self._encoder_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def room(self, prompt_length: int) -> int:
        """Maximum length of an answer to a prompt of this length, in tokens; below 1: there is no room for one."""
        return min(self.max_model_len, self.core.batcher.longest_request) - prompt_length

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        reservation: Reservation,
        request_id: str,
        on_tokens: Callable[[TokenEvent], None],
        choice: int = 0,
        cache_salt: str = "",
        leader: Handle | None = None,
        tenant: str = "",
    ) -> Handle:
        """Queue one choice. `on_tokens` is called on the event loop, once per step that has tokens for it.

        `leader` is an earlier choice of the same request with the same prompt (the same list), rules, tenant and salt:
        the prompt is checked and prepared once for both. The list is kept and must not change. Tenants take turns in
        the queue, and find only their own prefixes in the cache.

        Raises RequestError for a request that can never be served, EngineDeadError or CapacityError if the engine died
        or a drain ended after the place was reserved.
        """
        if self._dead is not None:
            raise EngineDeadError(f"The engine has stopped: {self._dead}.")
        if leader is None:
            self._check(prompt, params)
        nonce = self._random.getrandbits(63) if self._random else secrets.randbits(63)
        request = self.core.new_request(
            prompt,
            params,
            id=request_id,
            nonce=nonce,
            choice=choice,
            salt=cache_salt,
            leader=None if leader is None else leader.request,
            tenant=tenant,
        )
        queued = len(prompt) if leader is None else 0
        self._admission.enter(reservation, queued)  # nothing may fail between here and the handle
        request.arrival = monotonic()
        handle = Handle(request, on_tokens, queued_tokens=queued)
        self._set_deadlines(handle)
        self._handles[request] = handle
        self._steps.put(request)
        return handle

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        if not prompt:
            raise RequestError("The prompt is empty: at least one token is needed.", param="prompt")
        bad = next((token for token in (min(prompt), max(prompt)) if not 0 <= token < self.vocab_size), None)
        if bad is not None:
            raise RequestError(
                f"Token id {bad} in the prompt is outside the vocabulary (0 to {self.vocab_size - 1}).", param="prompt"
            )
        if len(prompt) + params.max_tokens > self.max_model_len:
            raise RequestError(
                f"This model's maximum context length is {self.max_model_len} tokens, but the prompt has "
                f"{len(prompt)} and {params.max_tokens} more were asked for.",
                param="max_tokens" if len(prompt) < self.max_model_len else "prompt",
                code="context_length_exceeded",
            )
        self.core.batcher.check_fits(len(prompt), params.max_tokens)

    def _set_deadlines(self, handle: Handle) -> None:
        assert self._loop is not None
        for seconds, expire in (
            (self._config.queue_timeout, self._expire_queued),
            (self._config.request_timeout, self._expire),
        ):
            if seconds is not None:
                handle.timers.append(self._loop.call_later(seconds, expire, handle))

    def _expire_queued(self, handle: Handle) -> None:
        if handle.request.admitted == 0.0:
            message = f"The request waited {self._config.queue_timeout:g} s and got no place. Try again later."
            self._end(handle, CapacityError(message, retry_after=5))

    def _expire(self, handle: Handle) -> None:
        message = f"The request did not end within {self._config.request_timeout:g} s, the most this server gives one."
        self._end(handle, DeadlineError(message))

    def _end(self, handle: Handle, cause: DSparkServerError) -> None:
        if not handle.finished:
            self._finish(handle, TokenEvent([], FinishReason.ERROR, error=str(cause), cause=cause))
            self._steps.put(Abort(handle.request))

    def abort(self, handle: Handle) -> None:
        """Stop a choice; its blocks are free again within a step. Does nothing if it has ended."""
        if not handle.finished:
            self._finish(handle, TokenEvent([], FinishReason.ABORT))
            self._steps.put(Abort(handle.request))

    # -- event-loop side of the step thread --------------------------------------------------------------------------

    def _mourn(self, reason: str) -> None:
        """The engine is dead: fail all requests. Only the first reason counts."""
        if self._dead is None:
            self._dead = reason
            logger.critical("the engine has stopped: %s", reason)
            self.fail_all(f"The engine has stopped: {reason}.")

    def _dispatch(self, outputs: list[tuple[Request, TokenEvent]]) -> None:
        for request, event in outputs:
            handle = self._handles.get(request)
            if handle is None:
                continue  # aborted while the step ran
            self._dequeue(handle)
            if event.finish_reason is None:
                handle.on_tokens(event)
            else:
                self._finish(handle, event)

    def _finish(self, handle: Handle, event: TokenEvent) -> None:
        if handle.finished:  # ended by another choice's callback
            return
        handle.finished = True
        for timer in handle.timers:
            timer.cancel()
        self._dequeue(handle)
        del self._handles[handle.request]
        self._admission.release(1, 0)
        handle.on_tokens(event)

    def _dequeue(self, handle: Handle) -> None:
        self._admission.release(0, handle.queued_tokens)
        handle.queued_tokens = 0
