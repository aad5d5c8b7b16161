"""Limits of one API key: concurrent requests, and requests per minute. Beyond, 429 with Retry-After."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from dspark_server.errors import LimitError
from dspark_server.words import counted


class TokenBucket:
    """Allows `per_minute` requests a minute on average, and as many at once after a quiet minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._left = float(per_minute)
        self._seen = clock()

    def take(self) -> float:
        """Take a request and return 0.0; if none is left, return the seconds until there is one."""
        now = self._clock()
        self._left = min(self._per_minute, self._left + (now - self._seen) * self._per_minute / 60)
        self._seen = now
        if self._left < 1:
            return (1 - self._left) * 60 / self._per_minute
        self._left -= 1
        return 0.0


class KeyLimits:
    """Both limits for every tenant; None: no limit. Without API keys all clients are one tenant."""

    def __init__(
        self, max_concurrent: int | None, per_minute: int | None, *, clock: Callable[[], float] = monotonic
    ) -> None:
        self._max_concurrent = max_concurrent
        self._per_minute = per_minute
        self._clock = clock
        self._running: dict[str, int] = {}
        self._buckets: dict[str, TokenBucket] = {}

    @contextmanager
    def admit(self, tenant: str) -> Iterator[None]:
        """Count a request while it runs. Raises LimitError if it exceeds a limit."""
        running = self._running.get(tenant, 0)
        if self._max_concurrent is not None and running >= self._max_concurrent:
            raise LimitError(f"This API key has {counted(running, 'request')} running, the most it may have.")
        if self._per_minute is not None:
            bucket = self._buckets.setdefault(tenant, TokenBucket(self._per_minute, self._clock))
            wait = bucket.take()
            if wait:
                message = f"This API key may send {counted(self._per_minute, 'request')} a minute. Try again later."
                raise LimitError(message, retry_after=math.ceil(wait))
        self._running[tenant] = running + 1
        try:
            yield
        finally:
            self._running[tenant] -= 1
