"""The front door: streaming, abort, capacity, failures of a step."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dspark_server.engine import step
from dspark_server.engine.engine import AsyncEngine, Handle
from dspark_server.engine.request import FinishReason, Request
from dspark_server.engine.thread import TokenEvent
from dspark_server.engine.trace import StepOutput
from dspark_server.errors import CapacityError, EngineDeadError, RequestError
from tests.api.fake_engine import build_tokenizer

from .support import greedy, prompts, tiny_core

TOKENIZER: PreTrainedTokenizerFast = build_tokenizer()


def with_engine(test: Callable[[AsyncEngine], Awaitable[None]], **settings: Any) -> None:
    """Run a coroutine against a started engine on the vanilla fixture."""

    async def main() -> None:
        engine = AsyncEngine(tiny_core(**settings), TOKENIZER)
        await engine.start()
        try:
            await asyncio.wait_for(test(engine), 60)
        finally:
            await engine.stop()

    asyncio.run(main())


class Listener:
    """Collects the events of one choice."""

    def __init__(self, engine: AsyncEngine, prompt: list[int], max_tokens: int) -> None:
        self.events: list[TokenEvent] = []
        self.changed = asyncio.Event()
        with engine.reserve() as reservation:
            self.handle: Handle = engine.submit(
                prompt, greedy(max_tokens), reservation=reservation, request_id="r", on_tokens=self.on_tokens
            )

    def on_tokens(self, event: TokenEvent) -> None:
        self.events.append(event)
        self.changed.set()

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events for token in event.tokens]

    async def end(self) -> TokenEvent:
        while not self.events or self.events[-1].finish_reason is None:
            self.changed.clear()
            await self.changed.wait()
        assert sum(event.finish_reason is not None for event in self.events) == 1
        return self.events[-1]


def test_streams_what_the_offline_engine_gives() -> None:
    expected = tiny_core().generate(prompts(5), greedy(20))

    async def test(engine: AsyncEngine) -> None:
        listeners = [Listener(engine, prompt, 20) for prompt in prompts(5)]
        assert [(await each.end()).finish_reason for each in listeners] == [FinishReason.LENGTH] * 5
        assert [each.tokens for each in listeners] == expected
        assert await engine.wait_idle(1)

    with_engine(test)


def test_abort_frees_blocks_and_ends_once() -> None:
    async def test(engine: AsyncEngine) -> None:
        victim, survivor = Listener(engine, prompts(1)[0], 500), Listener(engine, prompts(2)[1], 30)
        await victim.changed.wait()
        engine.abort(victim.handle)
        engine.abort(victim.handle)
        assert (await victim.end()).finish_reason is FinishReason.ABORT
        assert (await survivor.end()).finish_reason is FinishReason.LENGTH
        for _ in range(100):
            if engine.stats.kv_usage == 0.0 and not engine.core.batcher.running:
                break
            await asyncio.sleep(0.01)
        assert engine.stats.kv_usage == 0.0

    with_engine(test)


def test_a_full_queue_refuses_and_a_place_comes_back() -> None:
    async def test(engine: AsyncEngine) -> None:
        with pytest.raises(RequestError, match="4 choices over all its prompts, and this server holds 3"):
            engine.reserve(4)  # to come again would not help
        running = [Listener(engine, prompt, 200) for prompt in prompts(3)]
        with pytest.raises(CapacityError, match="queue is full"):
            engine.reserve()
        engine.abort(running[0].handle)
        engine.reserve().__exit__()
        engine.begin_drain()
        with pytest.raises(CapacityError, match="shutting down"):
            engine.reserve()

    with_engine(test, max_num_seqs=2, max_num_queued_reqs=1)


def test_requests_that_can_never_be_served_are_refused_at_once() -> None:
    async def test(engine: AsyncEngine) -> None:
        for prompt, tokens, match in (
            ([], 1, "empty"),
            ([512], 1, "outside the vocabulary"),
            ([-1], 1, "outside the vocabulary"),
            ([5] * 1000, 25, "1024 tokens, but the prompt has 1000"),
            ([5] * 500, 60, "KV cache"),
        ):
            with pytest.raises(RequestError, match=match):
                Listener(engine, prompt, tokens)
        assert engine.health() == "ready"
        assert (await Listener(engine, [5], 4).end()).finish_reason is FinishReason.LENGTH

    with_engine(test, num_blocks=128)


@pytest.mark.parametrize("num_blocks", [128, 512])
def test_an_answer_may_take_all_the_room_and_no_more(num_blocks: int) -> None:
    async def test(engine: AsyncEngine) -> None:
        assert engine.room(0) < 600 if num_blocks == 128 else engine.room(0) == engine.max_model_len
        prompt = [5] * engine.room(3)
        assert engine.room(len(prompt)) == 3
        with pytest.raises(RequestError, match="KV cache" if num_blocks == 128 else "context length"):
            Listener(engine, prompt, 4)
        assert (await Listener(engine, prompt, 3).end()).finish_reason is FinishReason.LENGTH

    with_engine(test, num_blocks=num_blocks)


def test_a_failed_step_fails_its_requests_and_the_next_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: AsyncEngine) -> None:
        victim = Listener(engine, prompts(1)[0], 500)
        await victim.changed.wait()
        begin = engine.core.loop.executor.cycle

        def fail(*arguments: Any) -> Any:
            monkeypatch.setattr(engine.core.loop.executor, "cycle", begin)
            raise MemoryError

        monkeypatch.setattr(engine.core.loop.executor, "cycle", fail)
        last = await victim.end()
        assert last.finish_reason is FinishReason.ERROR
        assert "MemoryError" in (last.error or "")
        assert (await Listener(engine, prompts(1)[0], 8).end()).finish_reason is FinishReason.LENGTH

    with_engine(test)


def test_an_engine_that_keeps_failing_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: AsyncEngine) -> None:
        def fail(*arguments: Any) -> Any:
            raise RuntimeError("broken")

        monkeypatch.setattr(engine.core.loop.executor, "cycle", fail)
        for _ in range(3):
            assert (await Listener(engine, prompts(1)[0], 8).end()).finish_reason is FinishReason.ERROR
        for _ in range(100):
            if engine.health() == "dead":
                break
            await asyncio.sleep(0.01)
        with pytest.raises(EngineDeadError):
            engine.reserve()

    with_engine(test)


def test_blocks_of_an_aborted_request_are_free_before_the_next_step() -> None:
    async def test(engine: AsyncEngine) -> None:
        victim, survivor = Listener(engine, prompts(1)[0], 500), Listener(engine, prompts(2)[1], 60)
        await victim.changed.wait()
        steps = engine.stats.steps
        engine.abort(victim.handle)
        request = victim.handle.request
        while request.tables:
            await asyncio.sleep(0)
        # The step under way when the message was sent may end first.
        assert engine.stats.steps <= steps + 2
        await survivor.end()

    with_engine(test)


def test_a_callback_may_abort_another_choice_while_all_are_failed() -> None:
    async def test(engine: AsyncEngine) -> None:
        first, second = Listener(engine, prompts(1)[0], 500), Listener(engine, prompts(2)[1], 500)
        take = first.on_tokens

        def take_and_abort(event: TokenEvent) -> None:
            take(event)
            engine.abort(second.handle)

        first.handle.on_tokens = take_and_abort
        await first.changed.wait()
        engine.fail_all("over")
        assert (await first.end()).finish_reason is not None
        assert (await second.end()).finish_reason is FinishReason.ABORT
        assert await engine.wait_idle(1)

    with_engine(test)


def test_a_step_that_fails_while_it_commits_leaves_nobody_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the request that has just been found to be finished."""
    real = step.output_of

    def failing(request: Request, *rest: Any) -> StepOutput:
        if request.params.max_tokens == 500 and len(request.output) == 8:
            raise RuntimeError("planted")
        return real(request, *rest)

    async def test(engine: AsyncEngine) -> None:
        monkeypatch.setattr(step, "output_of", failing)
        first, second = Listener(engine, prompts(1)[0], 8), Listener(engine, prompts(2)[1], 500)
        assert (await first.end()).finish_reason in (FinishReason.ERROR, FinishReason.LENGTH)
        assert (await second.end()).finish_reason is FinishReason.ERROR
        assert await engine.wait_idle(1)

    with_engine(test, drafter=False)
