"""The engine on two ranks when one of them cannot go on: no step is tried again, everyone is told once."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dspark_server.config import SpeculativeConfig
from dspark_server.engine.engine import AsyncEngine
from dspark_server.engine.ranks import LeadingExecutor
from dspark_server.engine.request import FinishReason
from dspark_server.errors import EngineDeadError

from ..engine.support import on_cycles, prompts
from ..engine.test_async_engine import TOKENIZER, Listener
from ..engine.test_supervision import until_dead
from ..models.v4 import DSPARK, save_v4
from .support import Together, tiny_config


def kill_the_other(ranks: Together, engine: AsyncEngine) -> None:
    ranks.others[0].kill()


def fail_in_a_pass(ranks: Together, engine: AsyncEngine) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError

    leading = engine.core.loop.executor
    assert isinstance(leading, LeadingExecutor)
    on_cycles(leading._executor, lambda cycle: setattr(cycle, "verify", fail))


@pytest.mark.parametrize(
    ("fault", "reason", "experts"),
    [
        (kill_the_other, "another rank is gone", False),
        (kill_the_other, "another rank is gone", True),
        (fail_in_a_pass, "a pass that other ranks share failed: MemoryError", False),
    ],
)
def test_the_first_failure_is_the_last(
    fault: Callable[[Together, AsyncEngine], None], reason: str, experts: bool, tmp_path: Path
) -> None:
    """One rank cannot fail its requests and go on: the other would still be in the middle of the pass.

    `experts`: DeepSeek-V4 with whole experts on each rank, and DSpark's stages.
    """
    config = tiny_config()
    if experts:
        save_v4(tmp_path, stages=3, **DSPARK)
        config = replace(
            tiny_config(model=str(tmp_path), num_blocks=300, block_size=16, enable_expert_parallel=True),
            speculative=SpeculativeConfig(selection="fixed", copying=False),
        )

    async def test(ranks: Together, engine: AsyncEngine) -> None:
        await engine.start()
        texts = [[2 + token % 250 for token in prompt] for prompt in prompts(3)]
        running = [Listener(engine, text, 400) for text in texts]
        await running[0].changed.wait()
        steps = engine.stats.steps
        began = time.monotonic()
        fault(ranks, engine)
        await until_dead(engine, 5.0)
        for each in running:
            last = await each.end()
            assert last.finish_reason is FinishReason.ERROR
            assert last.error == f"The engine has stopped: {engine.failure}."
            assert reason in last.error
        assert time.monotonic() < began + 5
        assert engine.stats.steps <= steps + 3
        with pytest.raises(EngineDeadError):
            engine.reserve()
        await engine.stop()

    with Together.start(2) as ranks:
        engine = AsyncEngine(ranks.load(config), TOKENIZER)
        asyncio.run(asyncio.wait_for(test(ranks, engine), 60))


def test_a_rank_that_ended_before_the_start_is_not_forgotten() -> None:
    from ..engine.support import tiny_core

    async def test(engine: AsyncEngine) -> None:
        engine.die("rank 1 ended by SIGKILL")
        await engine.start()
        assert engine.health() == "dead"
        with pytest.raises(EngineDeadError, match="rank 1 ended by SIGKILL"):
            engine.reserve()
        await engine.stop()

    asyncio.run(test(AsyncEngine(tiny_core(), TOKENIZER)))
