"""Two ranks, each on a device that is not there (tests/runtime/twin.py): float32 over gloo, drafter on.

The collectives are recorded in the graphs with the rest of a pass, and every replay makes them again: ranks that
recorded others, or replayed in another order, would hang or find other tokens.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dspark_kernels import ReferenceKernels

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.device_executor import DeviceExecutor
from dspark_server.engine.ranks import LeadingExecutor

from ..engine.support import greedy, prompts, seeded, shallow_pair, still
from ..engine.test_device_executor import COSTS, SIZES, sampled
from ..models.v4 import DSPARK, save_v4
from ..runtime.twin import TwinDevice, TwinKernels
from .support import Together

STILL: dict[str, Any] = {"twin": {}, "clock": still}
MIXED = [greedy(10), seeded(3, 8), sampled(0.7, 8), seeded(5, 9), greedy(6)]


@pytest.fixture(scope="module")
def two() -> Iterator[Together]:
    with Together.start(2) as ranks:
        yield ranks


def settings(selection: str, **other: Any) -> EngineConfig:
    pair = shallow_pair("vanilla")
    drafter = SpeculativeConfig(method="dspark", model=str(pair / "draft"), selection=selection)
    values = SIZES | {"model": str(pair / "target"), "dtype": "float32", "cuda_graph_sizes": (8, 24)} | other
    return EngineConfig(speculative=drafter, check_invariants=True, **values)


def executor_of(core: EngineCore) -> DeviceExecutor:
    assert isinstance(core.loop.executor, LeadingExecutor)
    assert isinstance(core.loop.executor._executor, DeviceExecutor)
    return core.loop.executor._executor


def one_rank(config: EngineConfig) -> EngineCore:
    """An engine on the CPU, which has no graphs."""
    return EngineCore.load(replace(config, cuda_graph_sizes=()), COSTS, kernels=ReferenceKernels(), clock=still)


def load(two: Together, device: TwinDevice, config: EngineConfig, **others: Any) -> AbstractContextManager[EngineCore]:
    """An engine on both ranks, rank 0 on `device`, whose times teach no costs; `others` as in `Together.load`."""
    device.launch_seconds = 0.0
    return two.core(config, costs=COSTS, device=device, kernels=TwinKernels(), **STILL | others)


@pytest.mark.parametrize(
    ("selection", "eager"), [("causal", False), ("lagged", False), ("lagged", True)], ids=["causal", "lagged", "eager"]
)
def test_the_tokens_of_one_rank(two: Together, selection: str, eager: bool) -> None:
    graphs: dict[str, Any] = {"cuda_graph_sizes": (), "enforce_eager": True} if eager else {}
    plain = one_rank(settings(selection))
    expected = plain.generate(prompts(len(MIXED)), MIXED)
    with TwinDevice() as device, load(two, device, settings(selection, **graphs)) as core:
        assert core.generate(prompts(len(MIXED)), MIXED) == expected
        assert core.loop.stats.accepted_tokens == plain.loop.stats.accepted_tokens > 0
        assert core.batcher.pool.usage == 0.0
        executor = executor_of(core)
        assert (executor.passes.replays > 0) == (executor.drafts.replays > 0) == (not eager)
        assert core.backend.startswith("a device that is not there, ")
        assert core.backend.endswith(f"{0 if eager else 2} graph sizes, 2 ranks")


def test_a_drafted_step_waits_twice(two: Together) -> None:
    """Also under lagged: what is verified must be on the host, which tells the others."""
    params = [greedy(8), sampled(0.9, 8)]
    with TwinDevice() as device, load(two, device, settings("lagged")) as core:
        device.syncs, device.surprises = 0, []
        core.generate(prompts(2), params)
        steps = core.loop.stats.steps
        assert core.loop.stats.drafting["drafted"] > 0
        assert steps < device.syncs <= 2 * steps
        assert device.surprises == []


def test_the_settings_of_rank_0_count(two: Together) -> None:
    """Other blocks or graphs on another rank would be other rows, or a collective that nobody else makes."""
    theirs = settings("fixed", block_size=8, max_num_seqs=2, max_num_batched_tokens=24, cuda_graph_sizes=(4,))
    config = settings("fixed")
    expected = one_rank(config).generate(prompts(3), MIXED[:3])
    with TwinDevice() as device, load(two, device, config, theirs=theirs) as core:
        assert core.generate(prompts(3), MIXED[:3]) == expected


@pytest.mark.parametrize(("mine", "theirs"), [(9000, 4000), (7000, 9000)], ids=["the other's", "rank 0's"])
def test_the_pool_has_what_fits_on_every_rank(two: Together, mine: int, theirs: int) -> None:
    """Rank 0 needs more for a block: the drafter's rows are there alone."""
    config = settings("fixed", num_blocks=None, gpu_memory_utilization=0.8, cuda_graph_sizes=(4,))
    mine_, theirs_ = ({"free": free << 10, "total": 10_000 << 10, "working": 1000 << 10} for free in (mine, theirs))
    with TwinDevice(**mine_) as device, load(two, device, config, twin=theirs_) as core:
        pool = executor_of(core).pool
        whole, target = (
            4 * sum(cache.keys[0].numel() + cache.values[0].numel() for n in range(owners) for cache in pool.layers(n))
            for owners in (2, 1)
        )
        room = [(free - 2000 - 1000) * 1024 for free in (mine, theirs)]
        fitting = [room[0] // whole, room[1] // target]
        assert whole > target
        assert (fitting[0] < fitting[1]) == (mine < theirs), "the least is not whose it should be"
        assert pool.num_blocks == min(fitting)
        assert len(core.generate(prompts(1), [greedy(4)])[0]) == 4


def test_deepseek_v4_with_whole_experts(two: Together, tmp_path: Path) -> None:
    """Its drafter is in its own checkpoint; rows and entries are on both ranks."""
    save_v4(tmp_path, stages=3, **DSPARK)
    config = replace(
        settings("lagged", model=str(tmp_path), block_size=16, max_model_len=384, num_blocks=300),
        speculative=SpeculativeConfig(selection="lagged"),
        enable_expert_parallel=True,
    )
    texts, params = (
        [[2 + token % 250 for token in text] for text in prompts(2, longest=60)],
        [greedy(6), sampled(0.9, 6)],
    )
    expected = one_rank(replace(config, enable_expert_parallel=False)).generate(texts, params)
    with TwinDevice() as device, load(two, device, config) as core:
        assert core.generate(texts, params) == expected
        assert core.loop.stats.accepted_tokens > 0
        assert executor_of(core).passes.replays > 0
