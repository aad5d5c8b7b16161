"""Requests that wait for admission: tenants take turns, and each tenant's requests go by priority, then by arrival.

Arrival, admission, preemption and removal cost O(log n) for n waiting requests.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import count

from dspark_server.engine.request import Request

LAST_PRIORITY = 2**31 - 1  # of requests that must never delay others

Rank = tuple[int, float]


def rank(request: Request) -> Rank:
    """Order of a tenant's requests: the lowest priority number first, then the oldest."""
    return request.params.priority, request.arrival


def is_last(request: Request) -> bool:
    """Whether the request has the last priority of all, which is behind every other tenant's requests too."""
    return request.params.priority == LAST_PRIORITY


class WaitingQueue:
    """The order of admission.

    The tenants form a ring: the first one's best request is admitted, then the tenant moves to the ring's end. A
    preempted request gives its tenant one more place, in front of the ring; the tenant's best request takes it.
    Requests of the last priority form a separate ring behind all others.

    A request may also be set aside until another has run the part of the prompt that both share (`set_aside`).
    """

    def __init__(self) -> None:
        self._rings = (_Ring(), _Ring())  # of ordinary requests, and of those with the last priority
        self._followers: dict[Request, dict[Request, int]] = {}  # runner -> those set aside, and the blocks they await
        self._runner: dict[Request, Request] = {}  # of each request that is set aside
        self._arrivals = count()
        self._returns = count(1)

    def __len__(self) -> int:
        return sum(len(ring.places) for ring in self._rings) + len(self._runner)

    def __contains__(self, request: object) -> bool:
        return any(request in ring.places for ring in self._rings) or request in self._runner

    def __iter__(self) -> Iterator[Request]:
        """All in order of admission, then those set aside. O(n log n): not for the serving path."""
        for ring in self._rings:
            yield from ring
        yield from self._runner

    def push(self, request: Request) -> None:
        """Queue a request that arrives, or that is no longer set aside."""
        self._ring(request).push(request, next(self._arrivals))

    def push_back(self, request: Request) -> None:
        """Queue a request that was preempted: before its equals, and its tenant gets a place in front."""
        ring = self._ring(request)
        ring.push(request, -next(self._returns))
        ring.places_in_front.appendleft(request.tenant)
        ring.returned.add(request)

    def first(self) -> Request | None:
        """The next to be admitted; None if no request waits in line."""
        return next((ring.first() for ring in self._rings if ring.places), None)

    def pop(self) -> Request:
        """Take out the next to be admitted; it uses its tenant's turn."""
        return next(ring for ring in self._rings if ring.places).pop()

    def remove(self, request: Request) -> None:
        """Take out a request from any place in the queue. No turn is used."""
        runner = self._runner.pop(request, None)
        if runner is None:
            self._ring(request).remove(request)
        else:
            followers = self._followers[runner]
            del followers[request]
            if not followers:
                del self._followers[runner]

    def set_aside(self, request: Request, runner: Request, blocks: int) -> None:
        """Take a request out of the line until `runner` has published its first `blocks` blocks, or never will."""
        self._ring(request).remove(request)
        self._runner[request] = runner
        self._followers.setdefault(runner, {})[request] = blocks

    def call_back(self, runner: Request, published: int | None = None) -> None:
        """Put requests back in line that waited for up to `published` blocks of `runner`; None: all of them."""
        followers = self._followers.get(runner)
        if followers is None:
            return
        for request in [each for each, blocks in followers.items() if published is None or blocks <= published]:
            self.remove(request)
            self.push(request)

    def _ring(self, request: Request) -> "_Ring":
        return self._rings[is_last(request)]


class _Ring:
    """Tenants that take turns, each with its own line."""

    def __init__(self) -> None:
        self.places: dict[Request, int] = {}  # of each waiting request: the number in its heap entry
        self.places_in_front: deque[str] = deque()  # tenants, each at most once per returned request
        self.returned: set[Request] = set()
        self._lines: OrderedDict[str, _Line] = OrderedDict()

    def push(self, request: Request, number: int) -> None:
        self.places[request] = number
        self._lines.setdefault(request.tenant, _Line()).push(request, number)

    def first(self) -> Request:
        return self._next_line().first(self.places)

    def pop(self) -> Request:
        request = self.first()
        if self.places_in_front:
            self.places_in_front.popleft()
        else:
            self._lines.move_to_end(request.tenant)
        self.returned.discard(request)
        self._forget(request)
        return request

    def remove(self, request: Request) -> None:
        if request in self.returned:
            self.returned.discard(request)
            if request.tenant in self.places_in_front:
                self.places_in_front.remove(request.tenant)
        self._forget(request)

    def _next_line(self) -> "_Line":
        return self._lines[self.places_in_front[0] if self.places_in_front else next(iter(self._lines))]

    def _forget(self, request: Request) -> None:
        del self.places[request]
        line = self._lines[request.tenant]
        line.left(self.places)
        if not line.size:
            del self._lines[request.tenant]

    def __iter__(self) -> Iterator[Request]:
        lines = OrderedDict((tenant, deque(line.in_order(self.places))) for tenant, line in self._lines.items())
        for tenant in self.places_in_front:
            yield lines[tenant].popleft()
        while lines:
            tenant, line = lines.popitem(last=False)
            if line:
                yield line.popleft()
                lines[tenant] = line


class _Line:
    """One tenant's requests: a heap, in which entries of requests that left stay until they come up.

    An entry is live if `places` has its number for its request.
    """

    def __init__(self) -> None:
        self.size = 0  # live entries
        self._heap: list[tuple[Rank, int, Request]] = []

    def push(self, request: Request, number: int) -> None:
        heappush(self._heap, (rank(request), number, request))  # numbers differ: no two requests are compared
        self.size += 1

    def first(self, places: dict[Request, int]) -> Request:
        while places.get(self._heap[0][2]) != self._heap[0][1]:
            heappop(self._heap)
        return self._heap[0][2]

    def left(self, places: dict[Request, int]) -> None:
        """Count a request that left `places`. Entries of such requests never outnumber the others."""
        self.size -= 1
        if len(self._heap) > 2 * self.size:
            self._heap = [entry for entry in self._heap if places.get(entry[2]) == entry[1]]
            heapify(self._heap)

    def in_order(self, places: dict[Request, int]) -> list[Request]:
        return [request for _, number, request in sorted(self._heap) if places.get(request) == number]
