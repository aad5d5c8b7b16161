"""Continuous batching: which requests run in the next step, with how many tokens, and which are preempted.

The plan is made between commit and the next draft, the only point where a request may be preempted: once a draft
exists, only selection may drop it (DSPARK, "No value-dependent drop").
"""

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import ceil
from time import monotonic

from dspark_server.engine.blocks import BlockPool, PrefixKey
from dspark_server.engine.prefill import prefill_chunks
from dspark_server.engine.queue import WaitingQueue, is_last, rank
from dspark_server.engine.request import Request, Status
from dspark_server.engine.stats import EngineStats
from dspark_server.errors import RequestError
from dspark_server.runtime.paging import BlockTable, CacheGroup
from dspark_server.speculation.prefix_scheduler import Load
from dspark_server.words import counted


@dataclass(frozen=True)
class Scheduled:
    """A request's part of a step: its next `count` committed tokens.

    `samples`: the run reaches the sequence's end, so that its last row is sampled from.
    """

    request: Request
    count: int
    samples: bool


@dataclass(frozen=True)
class Plan:
    """One step. `decoding` are the requests that could draft, oldest first.

    `draft_room`: number of draft tokens that may be verified beside the scheduled ones.
    """

    scheduled: list[Scheduled]
    decoding: list[Request]
    draft_room: int

    @property
    def load(self) -> Load:
        """Load of the pass before any draft."""
        contexts = [request.computed for request in self.decoding]
        return Load(
            sampling=sum(entry.samples for entry in self.scheduled),
            tokens=sum(entry.count for entry in self.scheduled),
            room=self.draft_room,
            context=sum(entry.request.computed for entry in self.scheduled),
            # A chunk's tokens see the rows before the chunk, and half of the chunk on average.
            pairs=sum(entry.count * (entry.request.computed + entry.count / 2) for entry in self.scheduled),
            per_draft=sum(contexts) / len(contexts) if contexts else 0.0,
        )


DRAFTED_SHARE = 0.1  # weight of one step in the average number of draft tokens
KEYED_TOKENS = 16384  # tokens of prompts hashed in one step while others run: about 3 ms


@dataclass(frozen=True)
class Shortage:
    """The first request of the queue does not fit until `given_back` of the pool reaches the value here.

    Or until a segment with the key `next`, which continues the cached prefix that was found, is published.
    """

    request: Request
    given_back: int
    next: PrefixKey | None


class Batcher:
    """Schedules each step. `WaitingQueue` orders admission, `prefill_chunks` divides a step among prompts.

    The oldest running request is never preempted, so the batch always makes progress; see `_last_in_line`.
    """

    def __init__(
        self,
        pool: BlockPool,
        stats: EngineStats,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        gamma: int,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.pool = pool
        self.stats = stats
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.gamma = gamma
        self.waiting = WaitingQueue()
        self.running: list[Request] = []
        self._touched: dict[Request, None] = {}  # by the current step, or the last one
        self._shortage: Shortage | None = None
        self._clock = clock
        self._drafted = float(gamma)  # recent average of draft tokens verified per decoding request and step

    # -- arrival and departure ---------------------------------------------------------------------------------------

    @cached_property
    def longest_request(self) -> int:
        """Tokens, prompt and answer together, of the longest request that an empty pool can hold."""

        def fits(length: int) -> bool:
            return self._most_blocks(length) <= self.pool.num_blocks

        longest = self.pool.num_blocks * max(group.block_size for group in self.pool.groups)
        if fits(longest + 1):  # no layer keeps more than its window
            return sys.maxsize
        return max(0, bisect_right(range(1, longest + 1), False, key=lambda length: not fits(length)))

    def _most_blocks(self, length: int) -> int:
        """Most blocks that a request of `length` tokens holds at a time."""
        run = self.max_num_batched_tokens

        def most(group: CacheGroup) -> int:
            rows = length if group.reach is None else min(length, group.most_kept(length) + run)
            return group.blocks_between(0, rows + self.gamma)

        return sum(map(most, self.pool.groups))

    def check_fits(self, prompt_length: int, max_tokens: int) -> None:
        """Raise RequestError for a request that could not finish even alone on an empty pool."""
        if prompt_length + max_tokens > self.longest_request:
            raise RequestError(
                f"The prompt has {counted(prompt_length, 'token')} and asks for {max_tokens} more, "
                f"but the KV cache holds {self.longest_request} tokens in all. Shorten the prompt or lower max_tokens.",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def add(self, request: Request) -> None:
        """Queue a request that passed `check_fits`."""
        self.waiting.push(request)

    def remove(self, request: Request) -> None:
        """Take a request out for good: finished, failed or aborted. Its blocks are released."""
        if request.status is Status.RUNNING:
            self._stop(request)
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        request.status = Status.FINISHED

    def preempt(self, request: Request) -> None:
        """Put a running request back in front of the queue. Its rows will be recomputed."""
        self._stop(request)
        request.status = Status.WAITING
        self.waiting.push_back(request)
        self.stats.preemptions += 1

    def _stop(self, request: Request) -> None:
        self.running.remove(request)
        self.waiting.call_back(request)
        self.pool.release(request.tables)
        request.tables = []
        request.computed = request.finite = request.published = 0

    def begin(self) -> None:
        """Begin a step: the requests that it touches are lost if it fails."""
        self._touched = dict.fromkeys(self.running)

    def recover(self) -> list[Request]:
        """Remove, and return, the requests that a failed step touched, except those that wait again.

        No row that the step may have written is trusted: the pool is emptied and the prefix cache forgotten.
        """
        lost = [request for request in self._touched if request not in self.waiting]
        self.running.clear()
        self.pool.reset()
        for request in self._touched:
            request.tables = []
            request.computed = request.finite = request.published = 0
        for request in lost:
            request.status = Status.FINISHED
            self.waiting.call_back(request)
        return lost

    # -- the plan ----------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Schedule the next step: anchors of all decoding requests, then chunks of prompts, new admissions included."""
        self._reserve_running()
        decoding: list[Request] = []
        prompts: list[Request] = []
        for request in self.running:
            (decoding if request.is_decoding else prompts).append(request)
        room = self.max_num_batched_tokens - len(decoding)
        # Drafts get their recent average, but prefill must not starve behind them: it gets at least half of the room.
        prefill_room = max(room - ceil(self._drafted * len(decoding)), room // 2)
        prompts += self._admit_newcomers(prefill_room, under_way=sum(request.pending for request in prompts))
        chunks = prefill_chunks(prompts, prefill_room)
        scheduled = [Scheduled(request, 1, samples=True) for request in decoding]
        scheduled += [
            Scheduled(request, count, samples=count == request.pending)
            for request in prompts
            if (count := chunks.get(request, 0))
        ]
        drafting = [entry.request for entry in scheduled if entry.request.is_decoding]
        return Plan(scheduled, drafting, draft_room=room - sum(chunks.values()))

    def drafted(self, plan: Plan, tokens: int) -> None:
        """Average the `tokens` draft tokens of a step with this plan. If they fill the room, the average only rises."""
        if requests := len(plan.decoding):
            each = tokens / requests
            if tokens < plan.draft_room or each > self._drafted:
                self._drafted += DRAFTED_SHARE * (each - self._drafted)

    def _reserve_running(self) -> None:
        """Reserve slots for all running anchors and gamma draft tokens each; if needed, preempt the last in line."""
        for request in self.running:  # of all of them first: nobody gives way for blocks that nobody reads
            self.pool.release_behind(request.tables, request.computed)
        for request in list(self.running):
            while request.status is Status.RUNNING and not self._reserve(request):
                self.preempt(self._last_in_line())

    def _last_in_line(self) -> Request:
        """The running request to preempt first: the last by rank of the tenant that has the youngest request.

        Requests of the last priority are preempted before all others.
        """
        running = self.running[::-1]  # of equals, the one admitted last
        youngest = max(running, key=lambda each: (is_last(each), each.arrival))
        own = [each for each in running if each.tenant == youngest.tenant and is_last(each) == is_last(youngest)]
        return max(own, key=rank)

    def _reserve(self, request: Request) -> bool:
        missing = self._missing(request)
        if sum(missing) > self.pool.available:
            return False
        if any(missing):
            blocks = iter(self.pool.allocate(sum(missing)))
            for table, count in zip(request.tables, missing, strict=True):
                table.blocks += islice(blocks, count)
        return True

    def _missing(self, request: Request) -> list[int]:
        """Blocks in each group that the request lacks for its tokens and a draft block.

        In a group that keeps a window, for the tokens of the next step: blocks behind the window will be free then.
        """
        length = len(request.tokens)
        near = min(length, request.computed + self.max_num_batched_tokens)

        def lacking(group: CacheGroup, table: BlockTable) -> int:
            end = (length if group.reach is None else near) + self.gamma
            return max(0, group.blocks_between(table.first, end) - len(table.blocks))

        return list(map(lacking, self.pool.groups, request.tables))

    def _admit_newcomers(self, room: int, under_way: int) -> list[Request]:
        """Admit from the queue as long as prompts leave some of `room`, but always until newcomers fill half of it.

        `under_way`: pending tokens of prompts admitted before. A request that does not fit stays at the head of the
        queue, and no other is admitted. A request whose prefix another request is running now is set aside.
        """
        admitted: list[Request] = []
        brought, left = 0, max(1, KEYED_TOKENS // self.pool.segment_size)
        while len(self.running) < self.max_num_seqs and (under_way + brought < room or brought < room // 2):
            request = self.waiting.first()
            if request is None or self._is_short(request):
                break
            known = len(request.keys)
            keys = request.prefix_keys(self.pool.segment_size, left if self.running else None)
            left -= len(keys) - known
            if left <= 0 and self.running:
                break  # the rest of its keys is computed in the next step
            prefix = self._reusable(request)
            found, tables = self.pool.lookup(prefix)
            if found < len(prefix) and (runner := self._runner_of(request, found)):
                self.waiting.set_aside(request, runner, _common(request.keys, runner.keys))
            elif self._admit(request, found, tables):
                admitted.append(request)
                brought += request.pending
            else:
                break
        return admitted

    def _is_short(self, request: Request) -> bool:
        """Whether nothing has changed since the request did not fit."""
        short = self._shortage
        return (
            short is not None
            and short.request is request
            and self.pool.given_back < short.given_back
            and (short.next is None or not self.pool.names(short.next))
        )

    def _reusable(self, request: Request) -> list[PrefixKey]:
        """Keys of the segments that may be taken from the cache."""
        # The last token always runs: its row gives the next token's logits.
        usable = (len(request.tokens) - 1) // self.pool.segment_size
        if request.scores_prompt:
            # Cached rows have no logits; the row before the first token not scored yet must run again.
            usable = min(usable, max(0, len(request.prompt_logprobs) - 1) // self.pool.segment_size)
        return request.keys[:usable]

    def _runner_of(self, request: Request, segment: int) -> Request | None:
        """A request not behind this one in rank whose prefill will publish the prefix that ends with `segment`."""
        if not self.pool.prefix_caching:
            return None
        key = request.keys[segment]
        for each in self.running:
            ahead = each.published <= segment < len(each.keys) and not each.is_decoding and rank(each) <= rank(request)
            publishes = each.finite == each.computed
            if ahead and publishes and each.keys[segment].digest == key.digest:
                return each
        return None

    def _admit(self, request: Request, found: int, tables: list[BlockTable]) -> bool:
        """Start a waiting request, its first `found` segments in `tables`, if all its tokens and a draft block fit."""
        self._touched[request] = None
        self.pool.hold(tables)
        request.tables, request.computed = tables, found * self.pool.segment_size
        # In a group that keeps a window the steps after the first hold more. A request that could not stay would be
        # preempted, and admitted again.
        most = self._most_blocks(len(request.tokens)) - sum(len(table.blocks) for table in tables)
        missing = max(most, sum(self._missing(request))) - self.pool.available
        if missing > 0 or not self._reserve(request):
            self.pool.release(tables)
            request.tables, request.computed = [], 0
            prefix = self._reusable(request)
            following = prefix[found] if found < len(prefix) else None
            if following is not None and self.pool.names(following):
                following = None  # some group has it, but not all: only more blocks can help
            self._shortage = Shortage(request, self.pool.given_back + missing, following)
            return False
        self.waiting.pop()
        request.finite = request.computed
        request.published = found
        request.status = Status.RUNNING
        self.running.append(request)
        self.stats.prefix_queries += len(request.tokens)
        self.stats.prefix_hits += request.computed
        if request.cached_tokens is None:  # not a return after preemption
            request.cached_tokens = request.computed
            self.stats.prompt_tokens += request.prompt_length
            request.admitted = self._clock()
            self.stats.queue_times.append(request.admitted - request.arrival)
        return True

    # -- after the pass ----------------------------------------------------------------------------------------------

    def advance(self, request: Request, rows: int, finite: int | None = None) -> None:
        """Count KV rows of `rows` more committed tokens; the first `finite` (None: all) are known to hold no NaN.

        Segments full of such rows are published. Those behind one that may hold a NaN are not, as they attend to it.
        """
        if request.finite == request.computed:
            request.finite += rows if finite is None else min(rows, finite)
        request.computed += rows
        assert request.computed <= len(request.tokens)
        full = request.finite // self.pool.segment_size
        if full > request.published:
            keys = request.prefix_keys(self.pool.segment_size)
            while request.published < full and self.pool.publish(
                request.tables, request.published, keys[request.published]
            ):
                request.published += 1
            self.waiting.call_back(request, request.published)
        if request.pending <= 1 or request.finite < request.computed:  # nothing more will be published
            self.waiting.call_back(request)

    def update_gauges(self) -> None:
        """Write the numbers of running and waiting requests, and the KV usage, into the stats."""
        self.stats.running = len(self.running)
        self.stats.waiting = len(self.waiting)
        self.stats.kv_usage = self.pool.usage

    def check(self) -> None:
        """Check block conservation and request status, for tests and the debug flag."""
        self.pool.check([request.tables for request in self.running])
        assert all(request.status is Status.RUNNING for request in self.running)
        assert all(request.status is Status.WAITING and not request.tables for request in self.waiting)


def _common(mine: Sequence[PrefixKey], other: Sequence[PrefixKey]) -> int:
    """Number of segments that two chains have in common: equal digests mean equal prefixes."""
    return bisect_left(
        range(min(len(mine), len(other))), True, key=lambda segment: mine[segment].digest != other[segment].digest
    )
