"""Every family of drafters: tokens are the target's, and drafts are the same whatever came between.

Losslessness hides a drafter that has lost its place, so the drafts themselves are compared: after a prefix hit, for a
prompt in chunks, after a preemption, and beside others.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.request import SamplingParams
from dspark_server.engine.trace import StepTrace

from .support import FIXTURES, SMOLLM2_COSTS, greedy, prompts, seeded, still

PAIRS = {
    "dspark": "dspark_qwen3_vanilla",
    "dspark for Gemma4": "dspark_gemma4",
    "eagle3": "eagle3_qwen3",
    "mtp": "mtp_gemma4_assistant",
}
TEXTS = [[token % 380 for token in prompt] for prompt in prompts(6, shortest=20, longest=90)]
PARAMS = [greedy(20) if index % 2 else seeded(index, 20) for index in range(len(TEXTS))]

families = pytest.mark.parametrize("family", PAIRS)


def load(family: str, *, drafter: bool = True, **settings: Any) -> EngineCore:
    pair = FIXTURES / PAIRS[family]
    own = {name: settings.pop(name) for name in ("selection", "copying") if name in settings}
    draft = SpeculativeConfig(model=str(pair / "draft"), **{"selection": "fixed", "copying": False} | own)
    values: dict[str, Any] = {"num_blocks": 400, "block_size": 4, "check_invariants": True} | settings
    speculative = draft if drafter else SpeculativeConfig("none")
    config = EngineConfig(model=str(pair / "target"), dtype="float32", speculative=speculative, **values)
    return EngineCore.load(config, SMOLLM2_COSTS, clock=still)


@cache
def alone(family: str) -> list[list[int]]:
    """Answers to each text, by the target alone."""
    core = load(family, drafter=False, enable_prefix_caching=False)
    return [core.generate([text], [params])[0] for text, params in zip(TEXTS, PARAMS, strict=True)]


Drafts = dict[tuple[str, int], list[int]]  # by request and position of the anchor


def drafts_of(core: EngineCore, run: Callable[[], object]) -> Drafts:
    """The draft tokens of every block that is drawn meanwhile, as far as they can be used."""
    seen: Drafts = {}

    def look(trace: StepTrace) -> None:
        if trace.block is None:
            return
        for asked, tokens in zip(trace.block.requests, trace.block.tokens.tolist(), strict=True):
            request = trace.plan.scheduled[asked.run].request
            seen[str(request.tokens[: request.prompt_length]), asked.position] = tokens[: asked.limit]

    core.loop.watch(look)
    run()
    core.loop.watch(None)
    return seen


def agree(mine: Drafts, its: Drafts) -> None:
    """Blocks with the same anchor are the same; their first token may be the only one that was wanted."""
    common = mine.keys() & its.keys()
    assert len(common) > 20
    for place in common:
        shorter = min(len(mine[place]), len(its[place]))
        assert mine[place][:shorter] == its[place][:shorter], place


@families
@pytest.mark.parametrize("tokens", [10, 256])
def test_tokens_are_those_of_the_target_alone_in_a_busy_batch(family: str, tokens: int) -> None:
    core = load(family, max_num_batched_tokens=tokens, max_num_seqs=8)
    assert core.generate(TEXTS, PARAMS) == alone(family)
    assert core.loop.stats.draft_tokens > 0
    assert core.loop.stats.failed_drafts == 0


@families
def test_drafts_do_not_depend_on_hits_chunks_or_neighbours(family: str) -> None:
    core = load(family, enable_prefix_caching=False)
    answers: list[list[int]] = []
    expected = drafts_of(
        core, lambda: answers.extend(core.generate([t], [p])[0] for t, p in zip(TEXTS, PARAMS, strict=True))
    )
    assert answers == alone(family)
    again = load(family, max_num_batched_tokens=24, max_num_seqs=8)
    agree(drafts_of(again, lambda: again.generate(TEXTS, PARAMS)), expected)
    agree(drafts_of(again, lambda: again.generate(TEXTS, PARAMS)), expected)
    assert again.loop.stats.prefix_hits > 100


@families
def test_drafts_after_preemption(family: str) -> None:
    expected = drafts_of(core := load(family), lambda: core.generate(TEXTS, PARAMS))
    blocks = 70 if "Gemma4" in family else 48
    small = load(family, num_blocks=blocks, max_num_batched_tokens=24, max_num_seqs=6, enable_prefix_caching=False)
    answers: list[list[int]] = []
    agree(drafts_of(small, lambda: answers.extend(small.generate(TEXTS, PARAMS))), expected)
    assert answers == alone(family)
    assert small.loop.stats.preemptions > 0


@families
def test_copies_and_the_adaptive_policy(family: str) -> None:
    core = load(family, copying=True, selection="causal")
    texts = [text[:10] * 4 for text in TEXTS]
    bare = load(family, drafter=False)
    assert core.generate(texts, PARAMS) == bare.generate(texts, PARAMS)
    assert core.loop.stats.draft_tokens > 0


@families
def test_no_pass_is_run_for_tokens_that_cannot_be_verified(family: str) -> None:
    """And the token is the same as with the longer block."""
    core = load(family)
    drafter = core.loop.executor.drafter
    whole = drafts_of(core, lambda: core.generate(TEXTS[:1], greedy(12)))
    passes, real = [], drafter.forward

    def counted(number: int, *arguments: Any) -> Any:
        passes.append(number)
        return real(number, *arguments)

    drafter.forward = counted
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, max_draft_tokens=1)
    short = drafts_of(core, lambda: core.generate(TEXTS[:1], [params]))
    assert set(passes) == {0}
    common = whole.keys() & short.keys()
    assert common
    assert all(whole[place][:1] == short[place][:1] for place in common)


@families
def test_rows_of_the_pool_that_nobody_wrote_are_never_read(family: str) -> None:
    """A pool full of NaN, and a first token whose pair does not exist: no draft, no answer changes."""
    core = load(family, enable_prefix_caching=False)
    for owner in (0, 1):
        for layer in core.loop.executor.pool.layers(owner):
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)
    texts = [*TEXTS, [7], [9, 3]]
    params = [*PARAMS, greedy(20), greedy(20)]
    bare = load(family, drafter=False)
    assert core.generate(texts, params) == bare.generate(texts, params)
    assert core.loop.stats.failed_drafts == 0
    assert core.loop.stats.draft_tokens > 0


def test_an_assistant_reads_what_the_targets_window_would_free() -> None:
    """Its sliding layers see one token more than the target's, before the anchor's row is there: two tokens more."""
    core, bare = load("mtp"), load("mtp", drafter=False)
    window = core.loop.executor.target.layers[0].attention.config.window
    assert [group.reach for group in bare.batcher.pool.groups] == [None, window]
    assert [group.reach for group in core.batcher.pool.groups] == [None, window + 2]
    text = [token % 380 for token in prompts(1, shortest=300, longest=300)[0]]
    whole = load("mtp", block_size=512, num_blocks=40)  # one block holds everything: nothing is freed
    expected = drafts_of(whole, lambda: whole.generate([text], greedy(90)))
    agree(drafts_of(core, lambda: core.generate([text], greedy(90))), expected)
