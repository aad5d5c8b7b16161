"""The waiting queue against a naive model, and the number of operations that arrivals and long prompts cost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dspark_server.engine import batcher as batching
from dspark_server.engine import queue as queueing
from dspark_server.engine.queue import LAST_PRIORITY, WaitingQueue
from dspark_server.engine.request import Request, SamplingParams
from dspark_server.speculation import copy_drafter
from dspark_server.speculation.copying import ContextIndex

from .support import tiny_core
from .test_batcher import batcher, execute, request


class QueueMachine(RuleBasedStateMachine):
    """The model sorts a tenant's requests at every look and walks the ring one place at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = WaitingQueue()
        self.number = 0
        self.rings: dict[bool, list[str]] = {False: [], True: []}  # tenants in turn
        self.front: dict[bool, list[str]] = {False: [], True: []}  # tenants of the places in front
        self.waiting: dict[Request, int] = {}  # and the order among equals
        self.returned: set[Request] = set()
        self.popped: list[Request] = []
        self.aside: list[Request] = []
        self.runner = request(4)

    def own(self, tenant: str, last: bool) -> list[Request]:
        mine = [each for each in self.waiting if each.tenant == tenant and is_last(each) == last]
        return sorted(mine, key=lambda each: (each.params.priority, each.arrival, self.waiting[each]))

    def expected(self) -> Iterator[Request]:
        for last in (False, True):
            ring = list(self.rings[last])
            lines = {tenant: self.own(tenant, last) for tenant in ring}
            for tenant in self.front[last]:
                yield lines[tenant].pop(0)
            while ring:
                tenant = ring.pop(0)
                if lines[tenant]:
                    yield lines[tenant].pop(0)
                    ring.append(tenant)

    def enter(self, made: Request, order: int) -> None:
        self.waiting[made] = order
        if made.tenant not in self.rings[is_last(made)]:
            self.rings[is_last(made)].append(made.tenant)

    def leave(self, gone: Request) -> None:
        del self.waiting[gone]
        self.returned.discard(gone)
        if not self.own(gone.tenant, is_last(gone)):
            self.rings[is_last(gone)].remove(gone.tenant)

    @rule(tenant=st.sampled_from("abc"), priority=st.sampled_from([0, 0, 1, -1, LAST_PRIORITY]), age=st.integers(0, 3))
    def arrive(self, tenant: str, priority: int, age: int) -> None:
        made = request(4, first=age, tenant=tenant, priority=priority)
        self.number += 1
        self.queue.push(made)
        self.enter(made, self.number)

    @precondition(lambda self: self.waiting)
    @rule()
    def admit(self) -> None:
        first = next(self.expected())
        assert self.queue.first() is first
        assert self.queue.pop() is first
        last = is_last(first)
        if self.front[last]:
            self.front[last].pop(0)
        else:
            self.rings[last].remove(first.tenant)
            self.rings[last].append(first.tenant)
        self.leave(first)
        self.popped.append(first)

    @precondition(lambda self: self.popped)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        made = self.popped.pop(data.draw(st.integers(0, len(self.popped) - 1)))
        self.number += 1
        self.queue.push_back(made)
        self.enter(made, -self.number)
        self.front[is_last(made)].insert(0, made.tenant)
        self.returned.add(made)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), aside=st.booleans())
    def abort(self, data: st.DataObject, aside: bool) -> None:
        gone = data.draw(st.sampled_from(list(self.waiting)))
        front = self.front[is_last(gone)]
        if gone in self.returned and gone.tenant in front:
            front.remove(gone.tenant)
        self.leave(gone)
        if aside:
            self.queue.set_aside(gone, self.runner, 3)
            self.aside.append(gone)
        else:
            self.queue.remove(gone)

    @precondition(lambda self: self.aside)
    @rule(how=st.sampled_from(["too early", "far enough", "gone", "aborted"]))
    def call_back(self, how: str) -> None:
        if how == "aborted":
            self.queue.remove(self.aside.pop())
            return
        self.queue.call_back(self.runner, {"too early": 2, "far enough": 3, "gone": None}[how])
        if how != "too early":
            for made in self.aside:
                self.number += 1
                self.enter(made, self.number)
            self.aside = []

    @invariant()
    def same_order(self) -> None:
        assert list(self.queue) == [*self.expected(), *self.aside]
        assert len(self.queue) == len(self.waiting) + len(self.aside)
        assert all(each in self.queue for each in (*self.waiting, *self.aside))


def is_last(made: Request) -> bool:
    return made.params.priority == LAST_PRIORITY


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@dataclass(eq=False)
class Counted:
    """A rank that counts how often ranks are compared."""

    value: tuple[int, float]
    compared = 0

    def __lt__(self, other: "Counted") -> bool:
        Counted.compared += 1
        return self.value < other.value

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return isinstance(other, Counted) and self.value == other.value


@pytest.mark.parametrize("tenants", [1, 3])
def test_an_arrival_an_admission_and_an_abort_cost_a_logarithm(monkeypatch: pytest.MonkeyPatch, tenants: int) -> None:
    plain = queueing.rank
    monkeypatch.setattr(queueing, "rank", lambda made: Counted(plain(made)))
    waiting, count = WaitingQueue(), 4096
    made = [request(1, first=(n * 2741) % count, tenant=f"{n % tenants}") for n in range(count)]
    Counted.compared = 0
    for each in made:
        waiting.push(each)
    for each in made[::2]:
        waiting.remove(each)
    while waiting.first() is not None:
        waiting.pop()
    assert len(waiting) == 0
    assert Counted.compared < 6 * count * count.bit_length()


def test_a_short_prompt_is_run_beside_long_ones_and_the_oldest_goes_on() -> None:
    batch = batcher(512, seqs=8, tokens=32, gamma=3)
    long = [request(300, first=1000 * n) for n in (1, 2, 3)]
    for each in long:
        batch.add(each)
    execute(batch)
    short = request(8, first=9000)
    batch.add(short)
    steps = 0
    while not short.output:
        before = long[0].computed
        execute(batch)
        assert long[0].computed - before >= 16, "the oldest gets half of the room"
        steps += 1
    assert steps <= 4, "one step for each long prompt before it"


def test_tenants_share_the_room_and_the_last_priority_gets_what_is_left() -> None:
    batch = batcher(512, seqs=8, tokens=32, gamma=3)
    given = [request(300, first=1000 * n, tenant=t) for n, t in enumerate("ab", 1)]
    last = request(300, first=9000, tenant="c", priority=LAST_PRIORITY)
    for each in (*given, last):
        batch.add(each)
    for _ in range(5):
        execute(batch)
    before = [each.computed for each in (*given, last)]
    execute(batch)
    after = [each.computed for each in (*given, last)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [16, 16, 0]


def test_a_prompt_that_others_begin_with_too_is_run_once() -> None:
    """Requests that arrive together with one long beginning wait for the first to run it, and hold up no other."""
    batch = batcher(512, seqs=8, tokens=32, gamma=3)
    same = [request(200, first=0) for _ in range(4)]
    for number, each in enumerate(same):
        each.tokens, each.arrival = [*each.tokens, 7, 8, number], float(number)
        each.prompt_length = len(each.tokens)
        batch.add(each)
    other = request(8, first=5000)
    batch.add(other)
    ran = 0
    while not all(each.output for each in same):
        plan = batch.plan()
        ran += sum(entry.count for entry in plan.scheduled if not entry.request.output)
        for entry in plan.scheduled:
            if entry.samples:
                entry.request.commit([99])
            batch.advance(entry.request, entry.count)
            if entry.request.finish_reason is not None:
                batch.remove(entry.request)
        assert other.output or batch.running[0].computed <= 64, "the other prompt is not held up"
    assert ran <= 203 + 3 * 4 + 8 + 4
    batch.check()


def test_a_prompt_that_waits_for_blocks_is_not_looked_up_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batcher(64, seqs=4, tokens=512, gamma=3)
    first = request(160, first=0, max_tokens=1)
    batch.add(first)
    execute(batch)
    other = request(60, first=1000, max_tokens=60)
    batch.add(other)
    execute(batch)
    looked: list[int] = []
    lookup = batch.pool.lookup
    monkeypatch.setattr(batch.pool, "lookup", lambda keys: looked.append(len(keys)) or lookup(keys))
    waits = request(220, first=0)
    batch.add(waits)
    for _ in range(30):
        execute(batch)
        assert waits not in batch.running
    assert len(looked) == 1
    while waits not in batch.running:
        execute(batch)
    assert waits.cached_tokens is not None


class CountedPrompt(list[int]):
    """A prompt that counts how often it is gone through, or copied."""

    read = 0

    def __iter__(self) -> Iterator[int]:
        self.read += 1
        return super().__iter__()


@pytest.mark.parametrize("rules", [{}, {"repetition_penalty": 1.2, "frequency_penalty": 0.5}])
def test_the_choices_of_a_prompt_share_what_it_costs(rules: dict[str, float]) -> None:
    """128 choices read their prompt no more often than one does, and what one commits is no other's."""
    core, params = tiny_core(drafter=False), SamplingParams(max_tokens=4, **rules)
    prompt = CountedPrompt(range(5, 100))
    leader = core.new_request(prompt, params, nonce=0)
    once = prompt.read
    others = [core.new_request(prompt, params, nonce=n, leader=leader) for n in range(1, 128)]
    assert prompt.read == once
    assert all(each.tokens is prompt for each in others)
    logits = torch.randn(core.vocab_size, generator=torch.Generator().manual_seed(1))
    leader.commit([7])
    alone = core.new_request(list(prompt), params, nonce=9)
    late = core.new_request(prompt, params, nonce=1, leader=leader)
    seen = []
    for each in (alone, others[0], late):
        row = logits.clone()
        if each.controls is not None:
            each.controls.apply(row, [8], 95, None)
        seen.append(row)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert list(prompt) == list(range(5, 100))
    assert others[0].prefix_keys(4) == alone.prefix_keys(4)


@pytest.mark.parametrize(("most", "indexed"), [(None, True), (0, False)])
def test_copies_are_indexed_a_part_a_step_and_only_where_they_may_be_used(
    monkeypatch: pytest.MonkeyPatch, most: int | None, indexed: bool
) -> None:
    monkeypatch.setattr(copy_drafter, "INDEXED_TOKENS", 16)
    core = tiny_core(drafter=False, method="ngram")
    spent: list[int] = []
    total = 0
    enter = ContextIndex.enter

    def counted(index: ContextIndex, tokens: Sequence[int], room: int) -> int:
        spent.append(enter(index, tokens, room))
        return spent[-1]

    monkeypatch.setattr(ContextIndex, "enter", counted)
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, max_draft_tokens=most)
    for number in range(3):
        core.batcher.add(core.new_request([5, 6, 7, 8] * 20, params, nonce=number))
    while core.loop.has_work:
        spent.clear()
        core.loop.step()
        assert sum(spent) <= 16
        total += sum(spent)
    assert (core.loop.stats.drafting["copied"] > 0) == indexed
    assert (total > 0) == indexed


def test_the_keys_of_a_long_prompt_are_computed_over_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "KEYED_TOKENS", 64)
    batch = batcher(256, seqs=4, tokens=32, gamma=3)
    batch.add(request(4, max_tokens=90))
    execute(batch)
    long = request(400, first=1000)
    batch.add(long)
    before = steps = 0
    while long not in batch.running:
        execute(batch)
        assert len(long.keys) - before <= 64 // 4
        before, steps = len(long.keys), steps + 1
    assert steps >= 400 // 64
