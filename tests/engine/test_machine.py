"""Batcher, pool and step loop through any sequence of arrivals, steps, aborts, faults, over a model that reads the KV.

The fake target's next token is a hash of the tokens it finds in the KV pool through the block table. A block that is
shared while someone writes it, found under a wrong name, lost, or kept from a rejected draft gives other tokens.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dspark_server import failpoints
from dspark_server.engine.batcher import Batcher
from dspark_server.engine.blocks import BlockPool, chain_root
from dspark_server.engine.executor import with_drafts
from dspark_server.engine.queue import LAST_PRIORITY
from dspark_server.engine.request import FinishReason, Request, SamplingParams
from dspark_server.engine.stats import EngineStats
from dspark_server.engine.step import StepLoop
from dspark_server.errors import RequestError
from dspark_server.runtime.batch import Run
from dspark_server.runtime.paging import BlockTable, CacheGroup
from dspark_server.speculation.acceptance import Accepted, accept
from dspark_server.speculation.draft_block import DraftBlock, DraftRequest
from dspark_server.speculation.noise import CounterStreams
from dspark_server.speculation.selection import build_selection

BLOCKS, GAMMA, VOCABULARY, END = 14, 3, 8, 0
ONE = (CacheGroup(2),)
WINDOWED = CacheGroup(4), CacheGroup(2, reach=3)  # a segment is two blocks of the second group


def hashed(tokens: tuple[int | None, ...], kind: str = "") -> int:
    return hashlib.sha256(f"{kind}{tokens}".encode()).digest()[0]


def next_token(tokens: tuple[int | None, ...]) -> int:
    return hashed(tokens) % VOCABULARY


def reference(prompt: list[int], max_tokens: int) -> list[int]:
    """The model's answer to a prompt, without any engine."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tuple(tokens)))
        if tokens[-1] == END:
            break
    return tokens[len(prompt) :]


class HashingExecutor:
    """Rows of the KV pool are the tokens written there, by group; nothing else is known to it."""

    gamma = block = GAMMA

    def __init__(self, groups: Sequence[CacheGroup]) -> None:
        self.groups = groups
        self.rows: dict[tuple[int, int], tuple[int, int]] = {}  # by block and offset: the group that wrote, the token

    def _slot(self, group: int, table: BlockTable, position: int) -> tuple[int, int]:
        size = self.groups[group].block_size
        assert position >= table.first, "a row behind the window is used"
        return table.blocks[(position - table.first) // size], (position - table.first) % size

    def write(self, run: Run) -> None:
        for group, table in enumerate(run.tables):
            for index, token in enumerate(run.tokens):
                self.rows[self._slot(group, table, run.context_len + index)] = group, token

    def read(self, tables: Sequence[BlockTable], length: int, viewer: int) -> tuple[int | None, ...]:
        """The tokens as one at position `viewer` sees them; None where a group within reach has another one."""

        def seen(position: int) -> int | None:
            rows = [
                self.rows.get(self._slot(number, table, position))
                for number, (group, table) in enumerate(zip(self.groups, tables, strict=True))
                if group.reach is None or position > viewer - group.reach
            ]
            found = {token for _, token in (row or (-1, -1) for row in rows)}
            right = all(row is not None and row[0] == number for number, row in enumerate(rows))
            return found.pop() if right and len(found) == 1 else None

        return tuple(map(seen, range(length)))

    def cycle(self, runs: list[Run], streams: Any, clock: Any) -> "HashingCycle":
        return HashingCycle(self, runs)


class HashingCycle:
    seconds = 0.0, 0.0

    def __init__(self, executor: HashingExecutor, runs: list[Run]) -> None:
        self.executor = executor
        self.runs = runs

    def draft(self, requests: Sequence[DraftRequest], sampling: Any, budget: Any = None) -> DraftBlock:
        """Right for a while, then wrong; both, and how much of it is usable, by the context's hash."""
        blocks, usable = [], []
        for request in requests:
            known = (*self.executor.read(request.tables, request.position, request.position), request.anchor)
            right, block = hashed(known, "right") % (GAMMA + 1), list[int]()
            for index in range(GAMMA):
                token = next_token((*known, *block))
                block.append(token if index < right else (token + 1) % VOCABULARY)
            blocks.append(block)
            usable.append(hashed(known, "usable") % (GAMMA + 1))
        return DraftBlock(torch.tensor(blocks), torch.tensor(usable), requests=requests)

    def verify(self, block: DraftBlock | None) -> tuple[torch.Tensor, list[int]]:
        self.runs = with_drafts(self.runs, block)
        for run in self.runs:  # all are written before any is read: two that share a writable block see each other
            self.executor.write(run)
        tokens, row_start = [], [0]
        for run in self.runs:
            end = run.context_len + len(run.tokens)
            for length in range(end - run.logits_rows + 1, end + 1):
                tokens.append(next_token(self.executor.read(run.tables, length, length - 1)))
            row_start.append(len(tokens))
        return torch.nn.functional.one_hot(torch.tensor(tokens, dtype=torch.int64), VOCABULARY).float(), row_start

    def accept(self, logits: Any, row_start: Any, block: Any, rows: Any, sampling: Any) -> Accepted:
        return accept(logits, row_start, block, rows, sampling, CounterStreams())

    def finite_rows(self) -> list[int]:
        return [len(run.tokens) for run in self.runs]


class WatchedBatcher(Batcher):
    """Who gives way is the worst of its tenant's, and everybody's before who must never be in the way."""

    def preempt(self, request: Request) -> None:
        for other in self.running:
            if request.params.priority != LAST_PRIORITY:
                assert other.params.priority != LAST_PRIORITY
            if other.tenant == request.tenant:
                assert rank(other) <= rank(request)
        super().preempt(request)


def rank(request: Request) -> tuple[int, float]:
    return request.params.priority, request.arrival


class EngineMachine(RuleBasedStateMachine):
    """Prompts over two tokens, so that prefixes coincide; a pool that holds two or three requests."""

    groups: Sequence[CacheGroup] = ONE

    def __init__(self) -> None:
        super().__init__()
        self.stats = EngineStats()
        pool = BlockPool(BLOCKS, self.groups)
        self.batcher = WatchedBatcher(pool, self.stats, max_num_seqs=4, max_num_batched_tokens=12, gamma=GAMMA)
        selection = build_selection("fixed", None, threshold=0.5, floor=None)
        self.loop = StepLoop(self.batcher, HashingExecutor(self.groups), selection, check_invariants=True)
        self.live: dict[Request, list[int]] = {}  # and what each must say
        self.arrivals = 0

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=14),
        max_tokens=st.integers(0, 10),
        tenant=st.sampled_from(["a", "b"]),
        priority=st.sampled_from([0, 0, 1, LAST_PRIORITY]),
    )
    def arrive(self, prompt: list[int], max_tokens: int, tenant: str, priority: int) -> None:
        try:
            self.batcher.check_fits(len(prompt), max_tokens)
        except RequestError:
            return
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, priority=priority)
        root = chain_root("machine", tenant)
        made = Request("", len(prompt), list(prompt), params, frozenset({END}), root, nonce=0, tenant=tenant)
        self.arrivals += 1
        made.arrival = float(self.arrivals)
        self.batcher.add(made)
        self.live[made] = reference(prompt, max_tokens)

    @precondition(lambda self: self.loop.has_work)
    @rule()
    def step(self) -> None:
        for output in self.loop.step():
            if output.request.finish_reason is not None:
                expected = self.live.pop(output.request)  # a second end would not find it
                if output.request.finish_reason is not FinishReason.ERROR:
                    assert output.request.output == expected

    @precondition(lambda self: self.loop.has_work)
    @rule(
        point=st.sampled_from(
            ["step.plan", "blocks.allocate", "step.verify", "step.sample", "step.commit", "commit.request"]
        ),
        after=st.integers(0, 3),
    )
    def fail(self, point: str, after: int) -> None:
        """A step that fails somewhere, and what the engine makes of it."""
        failpoints.arm({point: f"raise:MemoryError*1@{after}"})
        try:
            self.step()
        except MemoryError:
            for request in self.batcher.recover():
                del self.live[request]
        finally:
            failpoints.disarm()

    @precondition(lambda self: self.loop.has_work)
    @rule()
    def broken_row(self) -> None:
        """The first row of the pass is NaN: its request fails, the others do not."""
        failpoints.arm({"target.logits": "nan:0*1"})
        try:
            self.step()
        finally:
            failpoints.disarm()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(list(self.live)))
        self.batcher.remove(request)
        del self.live[request]

    @rule()
    def forget_prefixes(self) -> None:
        self.batcher.pool.reset_cache()

    @invariant()
    def said_so_far(self) -> None:
        self.batcher.check()
        held = {*self.batcher.running, *self.batcher.waiting}
        assert held == set(self.live), "a request was lost, or kept after its end"
        for request, expected in self.live.items():
            assert request.output == expected[: len(request.output)]

    @invariant()
    def in_order(self) -> None:
        waiting = list(self.batcher.waiting)
        for tenant in "ab":
            own = [rank(each) for each in waiting if each.tenant == tenant]
            assert own == sorted(own)
        last = [each.params.priority == LAST_PRIORITY for each in waiting]
        assert last == sorted(last)

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.loop.has_work:
                break
            self.step()
        assert not self.live, "somebody starves"
        assert self.batcher.pool.usage == 0.0


class WindowedMachine(EngineMachine):
    """Layers that see all tokens beside layers that see three: each request has two block tables."""

    groups = WINDOWED


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestWindowed = WindowedMachine.TestCase
TestWindowed.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
