"""What becomes of requests and of the engine when a step fails, hangs or kills its thread."""

import asyncio
import threading
import time
from functools import cache
from typing import Any

import pytest

from dspark_server import failpoints
from dspark_server.engine.engine import AsyncEngine
from dspark_server.engine.request import FinishReason
from dspark_server.engine.watchdog import Heartbeat, watch
from dspark_server.errors import CapacityError, DeadlineError, EngineDeadError

from .support import greedy, prompts, tiny_core
from .test_async_engine import Listener, with_engine


async def until_dead(engine: AsyncEngine, seconds: float) -> float:
    """Seconds it took."""
    began = time.monotonic()
    while engine.health() != "dead":
        assert time.monotonic() < began + seconds, "the engine still passes for alive"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


@pytest.mark.parametrize("point", ["engine.thread", "step.verify", "engine.post"])
def test_when_the_thread_ends_all_are_told_and_readiness_says_so(point: str) -> None:
    async def test(engine: AsyncEngine) -> None:
        running = [Listener(engine, prompt, 400) for prompt in prompts(3)]
        await running[0].changed.wait()
        failpoints.arm({point: "die"})
        took = await until_dead(engine, 1.0)
        for each in running:
            last = await each.end()
            assert last.finish_reason is FinishReason.ERROR
            assert "ThreadDeath" in (last.error or "")
        assert took < 1.0
        with pytest.raises(EngineDeadError, match="ThreadDeath"):
            engine.reserve()
        assert engine.in_flight == 0

    with_engine(test)


def test_a_step_that_hangs_is_noticed() -> None:
    async def test(engine: AsyncEngine) -> None:
        running, waiting = Listener(engine, prompts(1)[0], 400), Listener(engine, prompts(2)[1], 400)
        await running.changed.wait()
        failpoints.arm({"step.verify": "hang"})
        took = await until_dead(engine, 3.0)
        assert 0.4 < took < 2.0
        for each in (running, waiting):
            assert "has not ended for 0.5 s" in ((await each.end()).error or "")
        failpoints.disarm()

    with_engine(test, step_timeout=0.5, max_num_seqs=1)


def test_a_long_prompt_is_life_and_so_is_idleness() -> None:
    async def test(engine: AsyncEngine) -> None:
        failpoints.arm({"step.plan": "sleep:0.15"})
        listener = Listener(engine, [5] * 200, 2)  # ten chunks: over a second and a half
        began = time.monotonic()
        assert (await listener.end()).finish_reason is FinishReason.LENGTH
        assert time.monotonic() > began + 1.5
        failpoints.disarm()
        await asyncio.sleep(1.0)
        assert engine.health() == "ready"

    with_engine(test, step_timeout=0.6, max_num_batched_tokens=20, max_num_seqs=4)


def test_the_watchdog_counts_only_time_in_which_it_ran_itself() -> None:
    async def main() -> None:
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        thread.start()
        heart, deaths = Heartbeat(), list[str]()
        heart.beat()  # busy from now on
        task = asyncio.create_task(watch(thread, heart, 1.0, deaths.append, tick=0.05))
        await asyncio.sleep(0.1)
        time.sleep(1.5)  # the whole process stands still
        await asyncio.sleep(0.3)
        assert deaths == []
        await asyncio.wait_for(task, 20)
        assert deaths == ["a step has not ended for 1 s"]
        stop.set()
        thread.join()
        await watch(thread, heart, 1.0, deaths.append, tick=0.01)
        assert deaths[1:] == ["its thread ended"]

    asyncio.run(main())


def test_a_prompt_that_was_being_tokenized_meanwhile_is_refused() -> None:
    """It has a place, and nobody would ever end it."""

    async def test(engine: AsyncEngine) -> None:
        def submit() -> None:
            engine.submit([5], greedy(4), reservation=reservation, request_id="r", on_tokens=lambda event: None)

        with engine.reserve() as reservation:
            engine.begin_drain()
            submit()  # it may still finish
        with pytest.raises(CapacityError, match="shutting down"), engine.reserve():
            pass
        engine._admission.draining = False
        with engine.reserve() as reservation:
            engine.begin_drain()
            engine.fail_all("The server is shutting down.")
            with pytest.raises(CapacityError, match="shutting down"):
                submit()
            failpoints.arm({"engine.thread": "die"})
            engine.select("none")  # a message: the thread wakes up
            await until_dead(engine, 1.0)
            with pytest.raises(EngineDeadError):
                submit()
        assert engine.in_flight == 0

    with_engine(test)


@cache
def texts(count: int, tokens: int) -> list[list[int]]:
    """Answers of so many tokens to so many prompts, where nothing fails."""
    return tiny_core().generate(prompts(count), greedy(tokens))


STEP_POINTS = ["step.plan", "blocks.allocate", "step.verify", "step.sample", "step.commit", "commit.request"]


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("point", STEP_POINTS)
def test_a_step_may_fail_anywhere(point: str, after: int) -> None:
    """Each request ends once: with its error if it was in the step, else with exactly its tokens; no block is lost."""
    made, expected = prompts(7), texts(7, 16)

    async def test(engine: AsyncEngine) -> None:
        listeners = [Listener(engine, prompt, 16) for prompt in made]
        await listeners[0].changed.wait()
        failpoints.arm({point: f"raise:MemoryError*1@{after}"})
        ends = [await each.end() for each in listeners]
        failed = [last.finish_reason is FinishReason.ERROR for last in ends]
        assert 1 <= sum(failed) <= 3, "those that ran, and only those"
        for last, listener, tokens in zip(ends, listeners, expected, strict=True):
            if last.finish_reason is FinishReason.ERROR:
                assert "MemoryError" in (last.error or "")
            else:
                assert listener.tokens == tokens
        assert (await again(engine, made[0], 16)) == expected[0]
        assert engine.stats.kv_usage == 0.0
        assert engine.in_flight == 0

    with_engine(test, max_num_seqs=3)


async def again(engine: AsyncEngine, prompt: list[int], tokens: int = 30) -> list[int]:
    listener = Listener(engine, prompt, tokens)
    await listener.end()
    await asyncio.sleep(0.05)
    return listener.tokens


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_broken_row_of_the_target_fails_its_request_and_is_not_cached(value: str) -> None:
    prompt = prompts(1, shortest=40, longest=40)[0]
    expected = tiny_core().generate([prompt], greedy(30))[0]

    async def test(engine: AsyncEngine) -> None:
        failpoints.arm({"target.logits": f"{value}:0*1@0"})
        victim = Listener(engine, prompt, 30)
        last = await victim.end()
        assert last.finish_reason is FinishReason.ERROR and victim.tokens == []
        hits = engine.stats.prefix_hits
        assert (await again(engine, prompt)) == expected
        assert engine.stats.prefix_hits == hits, "rows of a pass with NaN were found by another request"
        await again(engine, prompt)
        assert engine.stats.prefix_hits > hits

    with_engine(test, max_num_batched_tokens=16, max_num_seqs=4)


@pytest.mark.drafting_fails
@pytest.mark.parametrize("fault", [{"step.draft": "raise:RuntimeError"}, {"draft.survival": "nan"}])
def test_without_a_usable_draft_tokens_are_the_same(fault: dict[str, str]) -> None:
    made, expected = prompts(4), texts(4, 30)
    failpoints.arm(fault)
    core = tiny_core()
    assert core.generate(made, greedy(30)) == expected
    assert (core.loop.stats.failed_drafts > 0) == ("step.draft" in fault)


def test_a_request_that_waits_too_long_is_told_to_come_again() -> None:
    async def test(engine: AsyncEngine) -> None:
        running = Listener(engine, prompts(1)[0], 800)
        await running.changed.wait()
        waiting = Listener(engine, prompts(2)[1], 8)
        failpoints.arm({"step.plan": "sleep:0.02"})
        last = await waiting.end()
        assert isinstance(last.cause, CapacityError) and "waited 0.3 s" in str(last.cause)
        assert len(running.events) > 1 and not running.handle.finished, "the one that runs goes on"
        engine.abort(running.handle)

    with_engine(test, max_num_seqs=1, queue_timeout=0.3)


def test_a_request_that_takes_too_long_in_all_is_ended() -> None:
    async def test(engine: AsyncEngine) -> None:
        failpoints.arm({"step.plan": "sleep:0.05"})
        last = await Listener(engine, prompts(1)[0], 800).end()
        assert isinstance(last.cause, DeadlineError)
        await asyncio.sleep(0.2)
        assert engine.stats.kv_usage == 0.0

    with_engine(test, request_timeout=0.4)


def test_the_queue_is_bounded_by_prompt_tokens() -> None:
    async def test(engine: AsyncEngine) -> None:
        with engine.reserve(1, 500), pytest.raises(CapacityError, match="500 prompt tokens waiting, 100 allowed"):
            engine.reserve(1, 1)  # the first was longer than the bound, and got in because nobody waited
        running = Listener(engine, [5] * 60, 200)
        with pytest.raises(CapacityError, match="60 prompt tokens waiting"):
            engine.reserve(1, 41)
        await running.changed.wait()
        engine.reserve(1, 41).__exit__()  # a prompt with a first token waits no more
        engine.abort(running.handle)
        engine.reserve(1, 500).__exit__()

    with_engine(test, max_num_queued_tokens=100)


def test_a_failpoint_that_is_off_costs_next_to_nothing() -> None:
    calls = 100_000
    began = time.perf_counter()
    for _ in range(calls):
        failpoints.hit("step.verify")
    assert (time.perf_counter() - began) / calls < 2e-6


def test_every_failpoint_stands_somewhere_and_only_known_ones_do() -> None:
    import re
    from pathlib import Path

    sources = "".join(path.read_text() for path in Path(failpoints.__file__).parent.rglob("*.py"))
    found = set(re.findall(r'failpoints\.(?:hit|passed)\(\s*"([\w.]+)"', sources)) - {"step.verify", "target.logits"}
    assert found | {"step.verify", "target.logits"} == set(failpoints.POINTS)
    for name in ("step.verify", "target.logits"):
        assert sources.count(f'"{name}"') >= 3  # the table, the docstring, and the place itself


@pytest.mark.parametrize(
    "wrong",
    ["nothing=raise:ValueError", "step.plan=explode", "step.plan=raise:Nothing", "step.plan=sleep:x",
     "step.plan=raise:ValueError*x", "step.plan=raise:len", "step.plan"],
)  # fmt: skip
def test_a_fault_that_cannot_be_read_is_an_error(wrong: str) -> None:
    from dspark_server.errors import ConfigError

    with pytest.raises(ConfigError):
        failpoints.arm_from_environment({"DSPARK_FAILPOINTS": wrong})
    assert failpoints.arm_from_environment({}) == ()


def test_faults_of_the_environment_count_their_hits() -> None:
    armed = failpoints.arm_from_environment({"DSPARK_FAILPOINTS": " step.plan = raise:ValueError*2@1 ; "})
    assert armed == ("step.plan",)
    outcomes: list[Any] = []
    for _ in range(5):
        try:
            outcomes.append(failpoints.hit("step.plan"))
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes == [None, "failpoint step.plan", "failpoint step.plan", None, None]
