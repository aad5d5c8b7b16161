"""The thread that owns an EngineCore: it takes messages, runs steps, and posts their outputs to the event loop."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from dspark_server import failpoints
from dspark_server.engine.core import EngineCore
from dspark_server.engine.logprobs import TokenLogprob
from dspark_server.engine.request import FinishReason, Request, Status
from dspark_server.engine.trace import StepOutput, StepTrace
from dspark_server.engine.watchdog import Heartbeat
from dspark_server.errors import DSparkServerError, EngineDeadError, RequestError
from dspark_server.logcontext import concerned

logger = logging.getLogger(__name__)

# A failed step ends its requests; after this many in a row the engine is dead.
MAX_FAILED_STEPS = 3


@dataclass(frozen=True)
class TokenEvent:
    """Tokens one step committed to one choice. The last event, and only it, has a finish reason.

    `admitted`: time at which the choice first left the queue, in monotonic seconds. In this step the target verified
    `drafted` draft tokens and accepted the first `accepted` of them. The `cause` of an `error`, if any, determines its
    HTTP status.
    """

    tokens: list[int]
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: str | None = None
    cached_tokens: int = 0
    logprobs: list[TokenLogprob] | None = None  # of `tokens`, if requested
    prompt_logprobs: list[TokenLogprob | None] | None = None  # with the first tokens, if requested
    admitted: float = 0.0
    drafted: int = 0
    accepted: int = 0
    cause: DSparkServerError | None = None


@dataclass(frozen=True)
class Abort:
    """Message to the step thread: remove this request."""

    request: Request


@dataclass(frozen=True)
class Select:
    """Message to the step thread: use this policy."""

    policy: str


@dataclass(frozen=True)
class Watch:
    """Message to the step thread: call this observer with every step that samples; None: no more calls."""

    trace: Callable[[StepTrace], None] | None


Message = Request | Abort | Select | Watch


class StepThread:
    """Runs the steps of `core`; once started, no other thread may touch it.

    `dispatch` gets the outputs of each step, `mourn` the reason if there will be no more; both on the event loop.
    """

    def __init__(
        self,
        core: EngineCore,
        dispatch: Callable[[list[tuple[Request, TokenEvent]]], None],
        mourn: Callable[[str], None],
    ) -> None:
        self.heart = Heartbeat()
        self._core = core
        self._dispatch = dispatch
        self._mourn = mourn
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run steps from now on, and post to this event loop."""
        self._loop = loop
        self.thread.start()

    def put(self, message: Message | None) -> None:
        """Send a message, from any thread; None: end after the messages before it."""
        self._inbox.put(message)

    def _run(self) -> None:
        concerned.set(lambda: [request.id for request in self._core.batcher.running])
        try:
            self._steps()
        except BaseException as error:
            logger.critical("the engine's thread ended", exc_info=error)
            self.die(f"its thread ended with {type(error).__name__}")

    def _steps(self) -> None:
        failures = 0
        while self._receive():
            failpoints.hit("engine.thread")
            if not self._core.loop.has_work:
                continue
            try:
                outputs = self._core.loop.step()
                self._core.follow_processors()
                failures = 0
            except EngineDeadError as error:  # later steps would fail too
                logger.exception("a step failed")
                self.die(str(error))
                return
            except Exception as error:
                logger.exception("a step failed")
                failures += 1
                outputs = self._core.fail_step(
                    f"The engine failed while running this request ({type(error).__name__})."
                )
                if failures == MAX_FAILED_STEPS:
                    self._post(outputs)
                    self.die(f"{failures} steps in a row failed, the last with {type(error).__name__}")
                    return
            self._post(outputs)

    def _receive(self) -> bool:
        """Handle the messages in the inbox, waiting for one if there is no work; False if one of them is None."""
        block = not self._core.loop.has_work
        while True:
            if block:
                self.heart.wait()
            try:
                message = self._inbox.get(block=block)
            except queue.Empty:
                return True
            finally:
                self.heart.beat()
            block = False
            if message is None:
                return False
            if isinstance(message, Abort):
                if message.request.status is not Status.FINISHED:
                    self._core.batcher.remove(message.request)
                    self._core.batcher.update_gauges()
            elif isinstance(message, Select):
                self._core.select(message.policy)
            elif isinstance(message, Watch):
                self._core.loop.watch(message.trace)
            else:
                self._core.batcher.add(message)

    def _post(self, outputs: list[StepOutput]) -> None:
        failpoints.hit("engine.post")
        if outputs:
            self._on_loop(self._dispatch, [(output.request, event_of(output)) for output in outputs])

    def die(self, reason: str) -> None:
        """Report that there will be no more steps, on the event loop once started. Any thread may call this."""
        if self._loop is None:
            self._mourn(reason)
        else:
            self._on_loop(self._mourn, reason)

    def _on_loop(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def event_of(output: StepOutput) -> TokenEvent:
    request = output.request
    stopped = request.finish_reason is FinishReason.STOP
    return TokenEvent(
        tokens=output.tokens,
        finish_reason=request.finish_reason,
        stop_token=output.tokens[-1] if stopped and output.tokens[-1] in request.stop_ids else None,
        error=request.error,
        cached_tokens=request.cached_tokens or 0,
        logprobs=output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
        admitted=request.admitted,
        drafted=output.drafted,
        accepted=output.accepted,
        cause=RequestError(request.error) if request.impossible and request.error else None,
    )
