"""Continuous batching: who runs in the next step, with how many tokens, and who must give way.

The plan is made between commit and the next draft, the only point where a request may be preempted: once a draft
exists, only selection may drop it (DSPARK, "No value-dependent drop").
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from time import monotonic

from dspark_server.engine.blocks import BlockPool
from dspark_server.engine.request import Request, Status
from dspark_server.engine.stats import EngineStats
from dspark_server.errors import RequestError
from dspark_server.speculation.admission import Load

LAST_PRIORITY = 2**31 - 1  # of what must never be in anybody's way


@dataclass(frozen=True)
class Scheduled:
    """A request's part of a step: its next `count` committed tokens."""

    request: Request
    count: int

    @property
    def samples(self) -> bool:
        """The run reaches the sequence's end, so its last row is wanted."""
        return self.count == self.request.pending


@dataclass(frozen=True)
class Plan:
    """One step. `draft_room` is how many draft tokens may be verified beside the scheduled ones."""

    scheduled: list[Scheduled] = field(default_factory=list)
    draft_room: int = 0

    @property
    def decoding(self) -> list[Request]:
        """Requests that could draft, oldest first."""
        return [entry.request for entry in self.scheduled if entry.request.is_decoding]

    @property
    def load(self) -> Load:
        """What the pass holds before any draft."""
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


DRAFTED_SHARE = 0.1  # of a step in what drafts are taken to want
RETURNED = -1  # turn of a place in front, for a request that was preempted


class Batcher:
    """First come, first served, as `in_line` orders them. The first that runs is never preempted: one always ends."""

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
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._clock = clock
        self._drafted = float(gamma)  # draft tokens verified in a step for each decoding request, lately

    # -- arrival and departure ---------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Tokens, prompt and answer together, of the longest request that an empty pool can hold."""
        return self.pool.num_blocks * self.pool.block_size - self.gamma

    def check_fits(self, prompt_length: int, max_tokens: int) -> None:
        """Raise RequestError for a request that could not finish even alone on an empty pool."""
        if prompt_length + max_tokens > self.capacity:
            raise RequestError(
                f"The prompt has {prompt_length} tokens and asks for {max_tokens} more, "
                f"but the KV cache holds {self.capacity} tokens in all. Shorten the prompt or lower max_tokens.",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def add(self, request: Request) -> None:
        """Queue a request that `check_fits` let through. Tenants take turns; see `in_line` for the order of one's own.

        Only the last priority of all counts between tenants: it is behind everybody.
        """
        peers = [each for each in self.waiting if _is_last(each) == _is_last(request) and each.turn != RETURNED]
        own = [each.turn for each in peers if each.tenant == request.tenant]
        request.turn = max(own) + 1 if own else min((each.turn for each in peers), default=0)
        self._line_up(sorted([*self.waiting, request], key=lambda each: (_is_last(each), each.turn)))

    def _line_up(self, places: list[Request]) -> None:
        """Make these places the queue; turns belong to places, not to who stands there."""
        turns = [each.turn for each in places]
        self.waiting = deque(in_line(places))
        for each, turn in zip(self.waiting, turns, strict=True):
            each.turn = turn

    def remove(self, request: Request) -> None:
        """Take a request out for good: finished, failed or aborted. Its blocks are released."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        self._release(request)
        request.status = Status.FINISHED

    def preempt(self, request: Request) -> None:
        """Put a running request back in front of the queue, its own tenant's better ones before it; see `in_line`.

        Its rows will be recomputed.
        """
        self.running.remove(request)
        self._release(request)
        request.status = Status.WAITING
        request.turn = RETURNED
        self._line_up(sorted([request, *self.waiting], key=_is_last))
        self.stats.preemptions += 1

    def recover(self, held: Sequence[Request]) -> list[Request]:
        """After a step that failed, wherever it stopped: those of `held`, the requests it began with, that it touched.

        They are let go. No row that the step may have written is trusted: the pool is empty and the cache forgotten.
        """
        untouched = [request for request in self.waiting if request.status is Status.WAITING]
        self.running.clear()
        self.waiting = deque(untouched)
        kept = set(untouched)
        touched = [request for request in held if request not in kept]
        self.pool.reset()
        for request in held:
            request.blocks = []
            request.computed = request.finite = request.published = 0
        for request in touched:
            request.status = Status.FINISHED
        return touched

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks = []
        request.computed = request.finite = request.published = 0

    # -- the plan ----------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Schedule the next step: anchors of all decoding requests, then prefill chunks, then new admissions."""
        self._reserve_running()
        decoding = [request for request in self.running if request.is_decoding]
        room = self.max_num_batched_tokens - len(decoding)
        # Drafts get what they lately took, but prefill must not starve behind them: it gets at least half of the rest.
        prefill_room = max(room - ceil(self._drafted * len(decoding)), room // 2)
        scheduled = [Scheduled(request, 1) for request in decoding]
        spent = 0
        for request in self.running:
            if not request.is_decoding and spent < prefill_room:
                chunk = min(request.pending, prefill_room - spent)
                scheduled.append(Scheduled(request, chunk))
                spent += chunk
        while self.waiting and spent < prefill_room and len(self.running) < self.max_num_seqs:
            if self._shares_soon(self.waiting[0]) or not self._admit(self.waiting[0]):
                break
            request = self.waiting.popleft()
            chunk = min(request.pending, prefill_room - spent)
            scheduled.append(Scheduled(request, chunk))
            spent += chunk
        return Plan(scheduled, draft_room=room - spent)

    def drafted(self, plan: Plan, tokens: int) -> None:
        """A step planned like this verifies `tokens` draft tokens. Where that is all the room, more may be wanted."""
        if requests := len(plan.decoding):
            each = tokens / requests
            if tokens < plan.draft_room or each > self._drafted:
                self._drafted += DRAFTED_SHARE * (each - self._drafted)

    def _reserve_running(self) -> None:
        """Slots for every running request's anchor and gamma draft tokens, preempting the last in line if need be."""
        for request in list(self.running):
            while request.status is Status.RUNNING and not self._reserve(request):
                by_arrival = sorted(self.running, key=lambda each: (_is_last(each), each.arrival))
                self.preempt(in_line(by_arrival)[-1])

    def _reserve(self, request: Request) -> bool:
        missing = self.pool.blocks_for(len(request.tokens) + self.gamma) - len(request.blocks)
        if missing > self.pool.available:
            return False
        if missing > 0:
            request.blocks += self.pool.allocate(missing)
        return True

    def _shares_soon(self, request: Request) -> bool:
        """Another choice is just running this request's prompt: its blocks are worth a step's wait."""
        worth = self.pool.prefix_caching and request.prompt_length > self.pool.block_size
        return worth and not request.scores_prompt and request.waits_for_leader

    def _admit(self, request: Request) -> bool:
        """Start a waiting request if all its tokens and a draft block fit, reusing the cached prefix."""
        # The last token always runs: its row gives the next token's logits.
        usable = (len(request.tokens) - 1) // self.pool.block_size
        if request.scores_prompt:
            # Cached rows have no logits; the row before the first token not scored yet must run again.
            usable = min(usable, max(0, len(request.prompt_logprobs) - 1) // self.pool.block_size)
        found = self.pool.lookup(request.full_block_keys(self.pool.block_size)[:usable])
        self.pool.hold(found)
        request.blocks = list(found)
        if not self._reserve(request):
            self.pool.release(found)
            request.blocks = []
            return False
        request.computed = request.finite = len(found) * self.pool.block_size
        request.published = len(found)
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
        """`rows` more committed tokens have KV rows, of which the first `finite` (None: all) are known to hold no NaN.

        Blocks that are full of such rows are published. Behind one that may hold a NaN nothing is, as it would be seen
        from there.
        """
        if request.finite == request.computed:
            request.finite += rows if finite is None else min(rows, finite)
        request.computed += rows
        assert request.computed <= len(request.tokens)
        full = request.finite // self.pool.block_size
        if full > request.published:
            keys = request.full_block_keys(self.pool.block_size)
            while request.published < full and self.pool.publish(
                request.blocks[request.published], keys[request.published]
            ):
                request.published += 1

    def update_gauges(self) -> None:
        """Write what is running, waiting and held into the stats."""
        self.stats.running = len(self.running)
        self.stats.waiting = len(self.waiting)
        self.stats.kv_usage = self.pool.usage

    def check(self) -> None:
        """Block conservation and status, for tests and the debug flag."""
        self.pool.check([request.blocks for request in self.running])
        assert all(request.status is Status.RUNNING for request in self.running)
        assert all(request.status is Status.WAITING and not request.blocks for request in self.waiting)


def in_line(places: Sequence[Request]) -> list[Request]:
    """The same places, each still its tenant's; there a tenant's requests stand by priority, then arrival.

    So a priority moves nothing that is somebody else's.
    """
    mine: dict[tuple[str, bool], list[Request]] = {}
    for each in places:
        mine.setdefault((each.tenant, _is_last(each)), []).append(each)
    best_first = {
        key: iter(sorted(requests, key=lambda each: (each.params.priority, each.arrival)))
        for key, requests in mine.items()
    }
    return [next(best_first[each.tenant, _is_last(each)]) for each in places]


def _is_last(request: Request) -> bool:
    return request.params.priority == LAST_PRIORITY
