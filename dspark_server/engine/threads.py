"""The number of compute threads, adapted while serving."""

import logging
from collections.abc import Callable
from statistics import median
from time import monotonic

from dspark_server.runtime import processors
from dspark_server.words import counted

logger = logging.getLogger(__name__)

LOOK = 1.0  # seconds between two readings of cpuset and quota
WINDOW = 5.0  # seconds of steps that are compared with those before them
FEWEST = 20  # minimum number of steps of a window
CHEAPER = 0.97  # another number is kept if its cost is at most this share of the cost before
WAIT, LONGEST_WAIT = 60.0, 960.0  # seconds between two trials; twice as long after each that was not kept


class ThreadCount:
    """One thread per usable processor, or fewer if a hypervisor steals processor time and fewer are faster.

    Cpuset and quota are limits: the number follows them at once. Stolen time only suggests a number to try. If the
    hypervisor limits the whole machine, fewer threads wait less for each other; if each processor has other guests,
    more threads get more time. So the suggested number runs for a while, and the cost of steps decides.
    """

    def __init__(
        self,
        most: int,
        *,
        usable: Callable[[], int] = processors.usable,
        stolen: Callable[[], tuple[int, int]] = processors.stolen,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """At most `most` threads. The other arguments replace readings of the machine."""
        self._most = most
        self._usable = usable
        self._stolen = stolen
        self._clock = clock
        self._allowed = self.count = min(most, usable())
        self._before: tuple[int, float] | None = None  # in a trial: the number before it, and its cost
        self._wait = WAIT
        self._next_trial = self._next_look = 0.0
        self._begin_window(clock())

    def stepped(self, cost: float) -> bool:
        """Record the `cost` of a step, relative to the cost model; gives whether `count` has changed."""
        self._costs.append(cost)
        now, count = self._clock(), self.count
        if now < self._next_look:
            return False
        self._next_look = now + LOOK
        allowed = min(self._most, self._usable())
        if allowed != self._allowed:
            self._allowed = self.count = allowed
            self._before, self._wait, self._next_trial = None, WAIT, 0.0
            self._begin_window(now)
        elif now >= self._window_end and len(self._costs) >= FEWEST:
            self._compare(median(self._costs), self._stolen_share(), now)
            self._begin_window(now)
        if self.count != count:
            logger.info("computing with %s, %d before", counted(self.count, "thread"), count)
        return self.count != count

    def _compare(self, cost: float, stolen: float, now: float) -> None:
        if self._before is not None:
            count, cost_before = self._before
            self._before = None
            if cost > CHEAPER * cost_before:
                self.count = count
                self._wait = min(2 * self._wait, LONGEST_WAIT)
            self._next_trial = now + self._wait
        elif now >= self._next_trial:
            promising = max(1, round(self._allowed * (1 - stolen)))
            if promising != self.count:
                self._before, self.count = (self.count, cost), promising

    def _begin_window(self, now: float) -> None:
        self._costs: list[float] = []
        self._window_end = now + WINDOW
        self._ticks = self._stolen()

    def _stolen_share(self) -> float:
        """Share of the window's processor time that the hypervisor gave to others."""
        (before, all_before), (after, all_after) = self._ticks, self._stolen()
        return max(0, after - before) / max(1, all_after - all_before)
