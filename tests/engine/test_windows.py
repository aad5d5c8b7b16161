"""Layers with a window beside layers without: blocks behind the window are freed, and tokens never depend on it."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.batcher import Batcher
from dspark_server.engine.blocks import BlockPool, chain_root
from dspark_server.engine.core import EngineCore
from dspark_server.engine.executor import TorchExecutor
from dspark_server.engine.request import Request, SamplingParams, Status
from dspark_server.engine.stats import EngineStats
from dspark_server.errors import ConfigError
from dspark_server.runtime.paging import CacheGroup

from ..models.support import save_tiny
from ..models.test_gemma4 import save_gemma
from .support import FIXTURES, greedy, prompts, seeded

PAIR = FIXTURES / "dspark_gemma4"
WINDOW = 12


def gemma(*, drafter: bool = True, model: Path = PAIR / "target", **settings: Any) -> EngineCore:
    draft = SpeculativeConfig("dspark", str(PAIR / "draft"), selection="fixed")
    values: dict[str, Any] = {"num_blocks": 400, "block_size": 4, "check_invariants": True} | settings
    speculative = draft if drafter else SpeculativeConfig("none")
    return EngineCore.load(EngineConfig(model=str(model), dtype="float32", speculative=speculative, **values))


def mixed(count: int) -> list[SamplingParams]:
    return [greedy(20) if index % 2 else seeded(index, 20) for index in range(count)]


# Tables begin at multiples of a tile: the longest of these leave two behind.
TEXTS = [[token % 380 for token in prompt] for prompt in prompts(6, shortest=40, longest=180)]


@cache
def alone() -> list[list[int]]:
    """Answers to each text, by the target alone, in a pool of its own."""
    core = gemma(drafter=False, enable_prefix_caching=False)
    return [core.generate([text], [params])[0] for text, params in zip(TEXTS, mixed(len(TEXTS)), strict=True)]


@pytest.mark.parametrize("tokens", [10, 16, 256])
@pytest.mark.parametrize("drafter", [True, False])
def test_tokens_are_those_of_the_target_alone_in_a_busy_batch(drafter: bool, tokens: int) -> None:
    core = gemma(drafter=drafter, max_num_batched_tokens=tokens, max_num_seqs=8)
    assert core.generate(TEXTS, mixed(len(TEXTS))) == alone()
    assert (core.loop.stats.draft_tokens > 0) == drafter


def test_tokens_after_a_prefix_hit() -> None:
    """A hit needs the rows of a window's tail only, and every row of the layers without one."""
    core = gemma()
    for _ in range(2):
        for text, params, answer in zip(TEXTS, mixed(len(TEXTS)), alone(), strict=True):
            assert core.generate([text], [params])[0] == answer
    segment = core.batcher.pool.segment_size
    again = sum((len(text) - 1) // segment * segment for text in TEXTS)
    assert core.loop.stats.prefix_hits >= again, "the second time, whole prompts are found"


def test_tokens_after_preemption() -> None:
    core = gemma(num_blocks=100, max_num_batched_tokens=24, max_num_seqs=6)
    assert core.generate(TEXTS, mixed(len(TEXTS))) == alone()
    assert core.loop.stats.preemptions > 0


def test_blocks_behind_the_window_are_freed_while_a_request_runs(tmp_path: Path) -> None:
    """8k of context: the window's layers never hold more than window and run, the others hold everything."""
    window, run, length = 256, 512, 8192
    save_gemma(tmp_path, max_position_embeddings=16_384, sliding_window=window)
    text = [(7 * place * place + place // 5) % 190 for place in range(length)]
    answers = []
    for caching in (True, False):
        core = gemma(
            drafter=False, model=tmp_path, num_blocks=4000, max_num_batched_tokens=run, enable_prefix_caching=caching
        )
        assert [group.reach for group in core.batcher.pool.groups] == [None, window]
        full, near = core.batcher.pool.groups
        most, plan = [0, 0], core.batcher.plan

        def watched(core: EngineCore = core, most: list[int] = most, plan: Any = plan) -> Any:
            made = plan()
            for request in core.batcher.running:
                most[:] = [max(pair) for pair in zip(most, held(request), strict=True)]
            return made

        core.batcher.plan = watched  # type: ignore[method-assign]
        answers.append(core.generate([text], greedy(40))[0])
        assert most[1] * near.block_size <= 1.1 * (window + run)
        assert most[0] * full.block_size >= length
        if caching:
            assert core.generate([text], greedy(40))[0] == answers[0]
            assert core.loop.stats.prefix_hits >= length - core.batcher.pool.segment_size
        assert core.batcher.pool.usage == 0.0
    assert answers[0] == answers[1]


def test_a_prefix_that_no_hit_can_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--block-size 64: .* 64 and 32 tokens, .* more than --max-model-len 40"):
        gemma(drafter=False, block_size=64, max_model_len=40)
    assert gemma(drafter=False, block_size=64, max_model_len=40, enable_prefix_caching=False).generate([[5]], greedy(3))


def held(request: Request) -> list[int]:
    return [len(table.blocks) for table in request.tables]


def test_a_pool_for_windows_alone_takes_any_length(tmp_path: Path) -> None:
    """No request is too long for the pool if every layer has a window."""
    save_tiny(tmp_path, "mistral", sliding_window=16)
    core = gemma(drafter=False, model=tmp_path, num_blocks=24, max_num_batched_tokens=16, max_num_seqs=2)
    text = [place % 190 for place in range(150)]
    unlimited = gemma(drafter=False, model=tmp_path, max_num_batched_tokens=256)
    assert core.generate([text], greedy(60)) == unlimited.generate([text], greedy(60))


def test_rows_are_computed_the_same_way_wherever_their_table_begins(tmp_path: Path) -> None:
    """In bfloat16, bit for bit: chunks of any size leave tables that begin elsewhere."""
    save_tiny(tmp_path, "mistral", sliding_window=100)
    texts = [[(7 * place * place + place // 5 + start) % 190 for place in range(190)] for start in range(8)]
    rows: list[Tensor] = []
    for tokens in (256, 50, 9):
        seen: list[Tensor] = []
        core = EngineCore.load(
            EngineConfig(
                model=str(tmp_path), dtype="bfloat16", speculative=SpeculativeConfig("none"), num_blocks=200,
                block_size=4, max_num_batched_tokens=tokens, max_num_seqs=4, enable_prefix_caching=False,
            ),
            trace=lambda trace, seen=seen: seen.append(trace.verified.logits[-1].clone()),  # type: ignore[misc]
        )  # fmt: skip
        for text in texts:
            core.generate([text], greedy(4))
        rows.append(torch.stack(seen))
    assert torch.equal(rows[1], rows[0])
    assert torch.equal(rows[2], rows[0])


def test_a_poisoned_block_behind_the_window_is_forgotten() -> None:
    """It fails the request that finds it, and no other, though it has left that request's table."""
    core = gemma(drafter=False, max_num_batched_tokens=16, max_num_seqs=8)
    pool, executor = core.batcher.pool, core.loop.executor
    assert isinstance(executor, TorchExecutor)
    prefix = [(7 * place * place + place // 5) % 380 for place in range(96)]
    core.generate([prefix], greedy(1))
    for part, block in pool._block_of.items():
        for keys, values, group in executor.pool.layers(0):
            if group == part.group and pool.groups[group].reach is not None:
                keys[block] = values[block] = torch.nan
    texts = [prefix + [(other * place + 1) % 380 for place in range(100)] for other in (3, 5, 7, 11)]
    assert [bool(core.generate([text], greedy(2))[0]) for text in texts] == [False, True, True, True]


def batcher_of(blocks: int, group: CacheGroup, tokens: int, caching: bool = True) -> Batcher:
    pool = BlockPool(blocks, [group], prefix_caching=caching)
    return Batcher(pool, EngineStats(), max_num_seqs=4, max_num_batched_tokens=tokens, gamma=0)


def made(number: int, length: int, params: SamplingParams) -> Request:
    tokens = [(number * 31 + place) % 97 for place in range(length)]
    return Request(str(number), length, tokens, params, frozenset(), chain_root("x"), number, arrival=float(number))


def test_nobody_gives_way_for_blocks_that_nobody_reads() -> None:
    """The first lacks a block; the second has several behind its window."""
    batcher = batcher_of(40, CacheGroup(4, 8), 64)
    first, second = made(0, 8, greedy(50)), made(1, 70, greedy(50))
    batcher.add(first)
    batcher.add(second)
    for entry in batcher.plan().scheduled:
        batcher.advance(entry.request, entry.count)
    first.tokens = [*first.tokens, 5]
    batcher.pool.allocate(batcher.pool.available)  # as others would
    batcher.plan()
    assert second.status is Status.RUNNING


@pytest.mark.parametrize("caching", [False, True])
def test_who_could_not_stay_is_not_admitted(caching: bool) -> None:
    """After its first step a request holds its window besides."""
    batcher = batcher_of(37, CacheGroup(4, 65), 32, caching)
    first, second = made(0, 100, greedy(400)), made(1, 300, greedy(50))
    batcher.add(first)
    for step in range(200):
        if step == 8:
            batcher.add(second)
        batcher.begin()
        for entry in batcher.plan().scheduled:
            batcher.advance(entry.request, entry.count)
            if entry.samples:
                entry.request.tokens = [*entry.request.tokens, step % 97]
        batcher.check()
    assert batcher.stats.preemptions == 0
