"""Greedy and seeded tokens do not depend on the drafter, the batch, chunking, preemption or the prefix cache."""

from dataclasses import replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import pytest
import torch

from dspark_server.engine.observer import StepObserver
from dspark_server.engine.request import SamplingParams
from dspark_server.engine.trace import StepOutput, StepTrace, Verification
from dspark_server.speculation.acceptance import Accepted, accept
from dspark_server.speculation.draft_block import DraftBlock, DraftRequest
from dspark_server.speculation.noise import CounterStreams
from dspark_server.speculation.sampling import SamplingBatch

from .support import HEADS, REPETITIVE, greedy, on_cycles, prompts, seeded, tiny_core


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    """Each prompt alone, without a drafter: what every other way of running must give."""
    core = tiny_core(drafter=False, enable_prefix_caching=False)
    return [core.generate([prompt], own)[0] for prompt, own in zip(prompts(9), mixed(9), strict=True)]


def mixed(count: int) -> list[SamplingParams]:
    """Greedy and seeded in turn; two of the seeded ones share a seed."""
    return [greedy(20 + i) if i % 2 == 0 else seeded(7 if i in (1, 3) else i, 20 + i) for i in range(count)]


@pytest.mark.parametrize("head", HEADS)
def test_a_drafter_changes_no_token(head: str) -> None:
    own = mixed(6)
    without = tiny_core(head, drafter=False).generate(prompts(6), own)
    core = tiny_core(head)
    assert core.generate(prompts(6), own) == without
    assert core.loop.stats.drafts > 0
    assert core.loop.stats.draft_tokens > core.loop.stats.accepted_tokens


@pytest.mark.parametrize("selection", ["fixed", "causal"])
def test_copies_alone_change_no_token(selection: str) -> None:
    """Without a drafter greedy requests copy from their own text; the others draft nothing."""
    own = [greedy(60) if index % 2 == 0 else seeded(index, 20) for index in range(6)]
    without = tiny_core(drafter=False, shallow=True).generate(REPETITIVE, own)
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 64}
    core = tiny_core(drafter=False, method="ngram", selection=selection, shallow=True, **small)
    assert core.generate(REPETITIVE, own) == without
    assert core.drafter == "ngram"
    assert core.loop.stats.drafting["copied"] > 0
    assert core.loop.stats.drafting["drafted"] == 0
    assert core.loop.stats.accepted_tokens > 0


@pytest.mark.parametrize("drafter", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 24, "max_num_seqs": 3},
        {"num_blocks": 28},
        {"enable_prefix_caching": False, "num_blocks": 24, "max_num_batched_tokens": 40, "max_num_seqs": 9},
    ],
    ids=["busy", "chunked", "preempted", "preempted-chunked-uncached"],
)
def test_a_busy_batch_gives_the_solo_tokens(plain: list[list[int]], drafter: bool, settings: dict[str, int]) -> None:
    core = tiny_core(drafter=drafter, **settings)
    assert core.generate(prompts(9), mixed(9)) == plain
    if "num_blocks" in settings:
        assert core.loop.stats.preemptions > 0
    assert core.batcher.pool.usage == 0.0


@pytest.mark.parametrize("drafting", [True, False])
def test_a_prefix_hit_carries_the_draft_rows(drafting: bool) -> None:
    """After a hit the drafter proposes exactly what it does without one, whether or not it was asked before the hit."""
    prompt = prompts(1, shortest=40, longest=40)[0]
    warm, cold = tiny_core(), tiny_core()
    first = warm.generate([prompt], greedy(24) if drafting else replace(greedy(24), max_draft_tokens=0))[0]
    assert (warm.loop.stats.drafts > 0) == drafting
    proposed = []
    for core in (warm, cold):
        steps: list[StepTrace] = []
        core.loop.watch(steps.append)
        output = core.generate([prompt + first], greedy(40))
        proposed.append((output, [step.block.tokens.tolist() for step in steps if step.block]))
    assert warm.loop.stats.prefix_hits > 0
    assert len(proposed[1][1]) > 10
    assert proposed[0] == proposed[1]


def test_no_draft_reuses_the_noise_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """(key, position, draft number) never repeats, though blocks are discarded whole and requests preempted."""
    core = tiny_core(num_blocks=28)
    drawn: list[tuple[int, int, int]] = []

    def look(cycle: Any) -> None:
        draft = cycle.draft

        def drafting(requests: list[DraftRequest], sampling: SamplingBatch, budget: object) -> DraftBlock:
            drawn.extend(
                zip(sampling.key.tolist(), sampling.position.tolist(), sampling.draft_number.tolist(), strict=True)
            )
            return draft(requests, sampling)

        cycle.draft = drafting

    on_cycles(core.loop.executor, look)
    monkeypatch.setattr(core.loop._selection, "lengths", lambda survival, limits, *_, **__: [0] * len(limits))
    core.generate(prompts(9), SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True))
    assert core.loop.stats.preemptions > 0
    assert len(drawn) > 100
    assert len(set(drawn)) == len(drawn)
    numbers = [[number for key, _, number in drawn if key == own] for own in {key for key, _, _ in drawn}]
    assert all(own == list(range(1, len(own) + 1)) for own in numbers)


def test_what_a_block_says_does_not_move_how_much_of_it_is_verified() -> None:
    """Tokens that end the request, or may not come yet: only the coin may throw them out."""
    stop = 7
    own = SamplingParams(max_tokens=12, min_tokens=12, temperature=1.0, stop_token_ids=frozenset({stop}))
    first = []
    for written in (None, stop):
        core, steps = tiny_core(), list[StepTrace]()
        core.loop.watch(steps.append)

        def write(cycle: Any, written: int | None = written) -> None:
            draft = cycle.draft

            def drafted(*arguments: Any) -> DraftBlock:
                block = draft(*arguments)
                return block if written is None else replace(block, tokens=torch.full_like(block.tokens, written))

            cycle.draft = drafted

        on_cycles(core.loop.executor, write)
        core.generate(prompts(3), own)
        first.append(next(step.block.lengths for step in steps if step.block))
    assert sum(first[0]) > 0
    assert first[0] == first[1]


def test_unseeded_requests_with_one_prompt_differ() -> None:
    own = SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True)
    outputs = tiny_core().generate([prompts(1)[0]] * 4, own)
    assert len({tuple(output) for output in outputs}) == 4


def test_min_tokens_holds_inside_a_draft_block() -> None:
    """Every token is made an end token: nothing may end before min_tokens, everything right after."""
    stop = frozenset(range(400))
    own = SamplingParams(max_tokens=30, min_tokens=11, temperature=1.0, stop_token_ids=stop)
    for output in tiny_core().generate(prompts(4), own):
        assert not stop & set(output[:11])
        assert len(output) >= 12
        assert all(token not in stop for token in output[:-1])


@pytest.mark.parametrize("selection", ["fixed", "threshold"])
def test_what_drafts_came_to_is_counted(selection: str) -> None:
    """Greedy circles of the tiny model: some blocks are copies. Every count is a part of another."""
    core = tiny_core(selection=selection, shallow=True, clock=perf_counter)
    core.generate(REPETITIVE, [greedy(60), SamplingParams(max_tokens=30, temperature=1.0, ignore_eos=True)] * 3)
    stats = core.loop.stats
    assert stats.drafting["copied"] > 5
    assert stats.drafting["drafted"] > 20
    assert sum(stats.budgets.values()) == sum(stats.drafting.values())
    assert sum((tokens - 1) * count for tokens, count in stats.budgets.items()) == stats.draft_tokens
    assert sum(kind.judged for kind in stats.survival) == stats.draft_tokens
    assert sum(kind.survived for kind in stats.survival) == stats.accepted_tokens == sum(stats.accepted_per_position)
    for index, kind in enumerate(stats.survival):
        assert index / 10 * kind.judged <= kind.predicted + 1e-6
        assert kind.predicted <= (index + 1) / 10 * kind.judged + 1e-6
    assert all(seconds > 0 for seconds in stats.seconds.values())


def test_draft_tokens_past_an_end_count_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft token is accepted, and answers end inside of blocks: what is not committed was not accepted."""
    core, seen, pictures = tiny_core(), list[StepOutput](), list[int]()
    ticks = iter(range(1_000_000))
    watch, step = StepObserver(None, clock=lambda: float(next(ticks))), core.loop.step

    def accept_all(verified: Verification, block: DraftBlock | None, sampling: SamplingBatch) -> Accepted:
        lengths = [end - start - 1 for start, end in pairwise(verified.row_start)]
        lossless = accept(verified.logits, verified.row_start, block, verified.rows, sampling, CounterStreams())
        return replace(lossless, count=torch.tensor(lengths))

    def looked() -> list[StepOutput]:
        outputs = step()
        if outputs and watch.picture:
            pictures.append(watch.picture.committed)
        seen.extend(outputs)
        return outputs

    monkeypatch.setattr(core.loop, "_acceptance", accept_all)
    monkeypatch.setattr(core.loop, "step", looked)
    core.loop.watch(watch)
    own = SamplingParams(max_tokens=40, temperature=1.0, stop_token_ids=frozenset(range(3, 130)))
    core.generate(prompts(12), own)
    stats = core.loop.stats
    assert any(len(output.tokens) == output.accepted < output.drafted for output in seen)
    assert all(output.accepted == min(output.drafted, len(output.tokens)) for output in seen)
    assert stats.draft_tokens == sum(output.drafted for output in seen)
    assert stats.accepted_tokens == sum(output.accepted for output in seen) == sum(stats.accepted_per_position)
    assert stats.accepted_tokens == sum(kind.survived for kind in stats.survival)
    assert stats.accepted_tokens == sum(kind.judged for kind in stats.survival)  # none was rejected
    assert stats.generation_tokens == sum(len(output.tokens) for output in seen) == sum(pictures)


def test_copies_of_the_context_change_no_token() -> None:
    """The model runs in circles, which are then copied."""
    core, plain = tiny_core(shallow=True), tiny_core(drafter=False, shallow=True)
    outputs = core.generate(REPETITIVE, greedy(60))
    assert outputs == plain.generate(REPETITIVE, greedy(60))
    assert core.loop.stats.drafting["copied"] > 10
    assert core.loop.stats.steps < plain.loop.stats.steps


def test_room_is_kept_for_what_the_drafter_drafts_not_for_the_longest_copy() -> None:
    """Eight sampled requests and room for exactly eight blocks of seven: all of them draft in every step."""
    drafting: list[int] = []

    def look(step: StepTrace) -> None:
        decoding = [request for request in step.verified.requests if request.remaining > 7 and request.is_decoding]
        if len(decoding) == 8:
            drafting.append(len(step.block.requests) if step.block else 0)

    core = tiny_core(max_num_batched_tokens=8 + 8 * 7, max_num_seqs=8, num_blocks=600)
    core.loop._trace = look
    core.generate(prompts(8), SamplingParams(max_tokens=60, temperature=1.0, ignore_eos=True))
    assert len(drafting) > 5
    assert set(drafting) == {8}
