"""Layers with a window beside layers without: blocks behind the window are freed, and tokens never depend on it."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.request import Request, SamplingParams
from dspark_server.errors import ConfigError

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


TEXTS = [[token % 380 for token in prompt] for prompt in prompts(6, shortest=20, longest=60)]


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
    core = gemma(num_blocks=40, max_num_batched_tokens=24, max_num_seqs=6)
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
    """Where every layer has a window, no request is too long for the pool."""
    save_tiny(tmp_path, "mistral", sliding_window=16)
    core = gemma(drafter=False, model=tmp_path, num_blocks=24, max_num_batched_tokens=16, max_num_seqs=2)
    text = [place % 190 for place in range(150)]
    unlimited = gemma(drafter=False, model=tmp_path, max_num_batched_tokens=256)
    assert core.generate([text], greedy(60)) == unlimited.generate([text], greedy(60))
