"""Admission, fairness and refusal."""

import pytest

from dspark_server.engine.batcher import Batcher
from dspark_server.engine.blocks import BlockPool
from dspark_server.engine.request import Request, SamplingParams
from dspark_server.engine.stats import EngineStats
from dspark_server.errors import RequestError


def batcher(blocks: int = 16, *, seqs: int = 4, tokens: int = 32, gamma: int = 3) -> Batcher:
    return Batcher(BlockPool(blocks, 4), EngineStats(), max_num_seqs=seqs, max_num_batched_tokens=tokens, gamma=gamma)


def request(length: int, *, first: int = 0, max_tokens: int = 8) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(f"{first}", length, list(range(first, first + length)), params, frozenset(), b"root", nonce=0)


def run(batch: Batcher) -> list[Request]:
    """Execute the plan as the step loop would, one token each, nothing drafted; those that ended."""
    ended = []
    for entry in batch.plan().scheduled:
        samples = entry.samples
        if samples:
            entry.request.commit([99])
        batch.advance(entry.request, entry.count)
        if entry.request.finish_reason is not None:
            batch.remove(entry.request)
            ended.append(entry.request)
    batch.check()
    return ended


def test_a_request_that_can_never_fit_is_refused() -> None:
    with pytest.raises(RequestError, match="KV cache holds 61 tokens"):
        batcher().check_fits(50, 12)
    batcher().check_fits(50, 11)


def test_prefill_is_chunked_and_shares_the_step_with_decoding() -> None:
    batch = batcher(tokens=12)
    batch.add(request(4))
    run(batch)
    batch.add(request(20, first=100))
    plan = batch.plan()
    assert [(entry.count, entry.samples) for entry in plan.scheduled] == [(1, True), (8, False)]
    assert plan.draft_room == 3


def test_everyone_ends_in_spite_of_preemption() -> None:
    batch = batcher(blocks=9, seqs=4)
    requests = [request(9, first=100 * i, max_tokens=16) for i in range(6)]
    for each in requests:
        batch.check_fits(each.prompt_length, each.params.max_tokens)
        batch.add(each)
    ended: list[Request] = []
    for _ in range(500):
        ended += run(batch)
    assert len(ended) == 6
    assert batch.stats.preemptions > 0
    assert batch.pool.usage == 0.0
    assert ended[0] is requests[0], "the oldest is never preempted"


def test_a_step_that_cannot_admit_the_head_admits_nobody_behind_it() -> None:
    batch = batcher(blocks=8)
    for each in (request(16, first=0), request(16, first=100), request(2, first=200)):
        batch.add(each)
    run(batch)
    assert len(batch.running) == 1
    assert [each.prompt_length for each in batch.waiting] == [16, 2]


def test_priority_goes_first_and_equals_keep_their_order() -> None:
    batch = batcher(blocks=64, seqs=2)
    for name, priority in enumerate([0, 5, -1, 0, -1]):
        made = request(4, first=100 * name)
        made.params = SamplingParams(max_tokens=8, priority=priority)
        batch.add(made)
    assert [waiting.id for waiting in batch.waiting] == ["200", "400", "0", "300", "100"]


def test_choices_for_one_prompt_share_its_blocks() -> None:
    """The first runs the prompt, the others find its full blocks; nothing waits for a leader that has gone."""
    batch = batcher(blocks=64, tokens=12)
    leader = request(18)
    followers = [request(18) for _ in range(2)]
    for made in followers:
        made.leader = leader
    for made in (leader, *followers):
        batch.add(made)
    run(batch)
    assert batch.running == [leader]
    run(batch)
    assert leader.is_decoding
    run(batch)
    assert batch.running == [leader, *followers]
    assert {made.cached_tokens for made in followers} == {16}
    assert leader.blocks[:4] == followers[0].blocks[:4] == followers[1].blocks[:4]

    orphan, gone = request(18, first=500), request(18, first=500)
    orphan.leader = gone
    batch.add(gone)
    batch.add(orphan)
    batch.remove(gone)
    run(batch)
    assert orphan in batch.running
