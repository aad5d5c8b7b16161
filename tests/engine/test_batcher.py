"""Admission, fairness and refusal."""

import pytest

from dspark_server.engine.batcher import Batcher
from dspark_server.engine.blocks import BlockPool
from dspark_server.engine.queue import LAST_PRIORITY
from dspark_server.engine.request import Request, SamplingParams
from dspark_server.engine.stats import EngineStats
from dspark_server.errors import RequestError
from dspark_server.runtime.paging import BlockTable, CacheGroup


def batcher(blocks: int = 16, *, seqs: int = 4, tokens: int = 32, gamma: int = 3) -> Batcher:
    return Batcher(
        BlockPool(blocks, [CacheGroup(4)]), EngineStats(), max_num_seqs=seqs, max_num_batched_tokens=tokens, gamma=gamma
    )


def request(length: int, *, first: int = 0, max_tokens: int = 8, priority: int = 0, tenant: str = "") -> Request:
    """`first` is its first token, its name, and when it arrived."""
    params = SamplingParams(max_tokens=max_tokens, priority=priority)
    tokens = list(range(first, first + length))
    return Request(
        f"{first}", length, tokens, params, frozenset(), b"root", nonce=0, tenant=tenant, arrival=float(first)
    )


def run(batch: Batcher) -> list[Request]:
    """Execute the plan as the step loop would, one token each, nothing drafted; those that ended."""
    ended = execute(batch)
    batch.check()
    return ended


def execute(batch: Batcher) -> list[Request]:
    ended = []
    for entry in batch.plan().scheduled:
        samples = entry.samples
        if samples:
            entry.request.commit([99])
        batch.advance(entry.request, entry.count)
        if entry.request.finish_reason is not None:
            batch.remove(entry.request)
            ended.append(entry.request)
    return ended


def starve(batch: Batcher) -> list[Request]:
    """Run with no block to spare until one is left, and nobody comes back; those that gave way, in order."""
    held, gone = batch.pool.allocate(batch.pool.available), list[Request]()
    while len(batch.running) > 1:
        before = list(batch.running)
        execute(batch)
        gone += [each for each in before if each not in batch.running]
        held += batch.pool.allocate(batch.pool.available)
    batch.pool.release([BlockTable(0, held)])
    batch.check()
    return gone


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


def test_prefill_gets_what_drafts_do_not_take_and_at_least_half() -> None:
    batch = batcher(64, tokens=26, gamma=8)
    for first in (1, 2):
        batch.add(request(4, first=first, max_tokens=90))
    run(batch)
    batch.add(request(100, first=3))

    def chunk(drafted: int) -> int:
        """Tokens of the long prompt in a step that verifies so many draft tokens, if there is room."""
        plan = batch.plan()
        batch.drafted(plan, min(drafted, plan.draft_room))
        return sum(entry.count for entry in plan.scheduled) - len(plan.decoding)

    assert chunk(0) == 12, "at first, whole blocks are taken to be wanted: half of 26 less two anchors"
    assert [chunk(0) for _ in range(60)][-1] == 23
    assert [chunk(8) for _ in range(60)][-1] == 23, "as much as there is room for may be less than is wanted"
    batch.remove(batch.running[-1])
    assert [chunk(16) for _ in range(60)][-1] == 0
    batch.add(request(100, first=4))
    assert chunk(16) == 12


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
        batch.add(request(4, first=100 * name, priority=priority))
    assert [waiting.id for waiting in batch.waiting] == ["200", "400", "0", "300", "100"]


def running(batch: Batcher, *given: Request) -> None:
    for each in given:
        batch.add(each)
    run(batch)
    assert set(batch.running) == set(given)


def test_the_lowest_priority_gives_way_then_the_youngest() -> None:
    batch = batcher(blocks=64, seqs=4)
    a, b, c, d = (request(6, first=100 * n, priority=p, max_tokens=40) for n, p in enumerate([1, 0, 1, 0]))
    running(batch, a, b, c, d)
    assert starve(batch) == [c, a, d]
    assert list(batch.waiting) == [d, a, c], "they wait by priority, then arrival"
    newcomers = [request(4, first=900 + n, priority=p) for n, p in enumerate([0, 1, -1])]
    for each in newcomers:
        batch.add(each)
    assert list(batch.waiting) == [newcomers[2], d, newcomers[0], a, c, newcomers[1]]


def test_a_preempted_request_comes_before_its_equals_that_have_not_run() -> None:
    batch = batcher(seqs=1)
    first, second = request(6), request(6, first=100)
    batch.add(first)
    run(batch)
    batch.add(second)
    batch.preempt(first)
    assert list(batch.waiting) == [first, second]
    run(batch)
    assert batch.running == [first]


def test_priority_is_within_a_tenant_when_blocks_run_out_too() -> None:
    """The other key's requests neither give way to a better priority nor wait behind it."""
    batch = batcher(blocks=64, seqs=4)
    calm = request(6, first=0, priority=5, tenant="calm", max_tokens=40)
    pushy = [request(6, first=100 * n, priority=-n, tenant="pushy", max_tokens=40) for n in (1, 2)]
    running(batch, calm, *pushy)
    queued = request(6, first=300, tenant="calm")
    batch.add(queued)
    assert starve(batch) == pushy
    assert list(batch.waiting) == [pushy[1], pushy[0], queued]
    eager = request(6, first=400, priority=-9, tenant="pushy")
    batch.add(eager)
    assert list(batch.waiting) == [eager, pushy[1], queued, pushy[0]], "its places, in its own order"


def test_the_last_priority_waits_behind_everybody_after_preemption_too() -> None:
    batch = batcher(blocks=64)
    background = request(6, first=0, priority=LAST_PRIORITY)
    client = request(6, first=100, tenant="a")
    running(batch, background, client)
    queued = request(6, first=200, tenant="b")
    batch.add(queued)
    batch.preempt(background)
    assert list(batch.waiting) == [queued, background]


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
    assert leader.tables[0].blocks[:4] == followers[0].tables[0].blocks[:4] == followers[1].tables[0].blocks[:4]

    orphan, gone = request(18, first=500), request(18, first=500)
    orphan.leader = gone
    batch.add(gone)
    batch.add(orphan)
    batch.remove(gone)
    run(batch)
    assert orphan in batch.running
