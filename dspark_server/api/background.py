"""The dashboard's background load: a number of requests kept running in the server, which give way to clients."""

import asyncio
import itertools
import logging
import random
import uuid
from collections.abc import Iterator

from dspark_server.api.prompting import Prompting
from dspark_server.api.sample_prompts import SAMPLE_PROMPTS
from dspark_server.engine.engine import AsyncEngine
from dspark_server.engine.queue import LAST_PRIORITY
from dspark_server.engine.request import SamplingParams
from dspark_server.errors import DSparkServerError

logger = logging.getLogger(__name__)

SHORTEST, LONGEST = 64, 192  # tokens of an answer
TEMPERATURE = 0.7
RETRY_AFTER = 0.25  # seconds until a refused request is tried again
ENOUGH = 0.5  # share of the KV cache in use above which no further request starts


class BackgroundLoad:
    """A closed loop of `wanted` users with prompts of one domain.

    Clients' requests come first: background requests have the lowest priority, one starts only while fewer than `limit`
    (max_num_seqs) requests are in flight and half of the KV cache is free, and `make_room`, called often, aborts those
    that a client waits for.
    """

    def __init__(self, engine: AsyncEngine, prompting: Prompting, limit: int) -> None:
        self._engine = engine
        self._prompting = prompting
        self.limit = limit
        self.domain = "chat"
        self._users: list[asyncio.Task[None]] = []  # oldest first
        self._running: dict[asyncio.Task[None], None] = {}  # those with a request in flight, oldest request first
        self._random = random.Random()
        self._prompts = self._endless()

    @property
    def wanted(self) -> int:
        """Number of requests to keep running."""
        return len(self._users)

    @property
    def running(self) -> int:
        """Number of requests in flight."""
        return len(self._running)

    def set(self, requests: int, domain: str) -> None:
        """Keep this many running; surplus ones end at once, youngest first. Later requests are of the new domain."""
        self.domain = domain
        while len(self._users) > requests:
            self._users.pop().cancel()
        while len(self._users) < requests:
            self._users.append(asyncio.create_task(self._user()))

    def stop(self) -> None:
        """End all background requests."""
        self.set(0, self.domain)

    def make_room(self) -> None:
        """Abort the youngest requests if clients would otherwise wait for a place or for blocks."""
        stats = self._engine.stats
        excess = self._engine.in_flight - self.limit
        if stats.waiting and stats.kv_usage > ENOUGH and self._engine.in_flight > self.running:
            excess = max(excess, 1)
        young = [user for user in reversed(self._running) if not user.cancelling()]
        for user in young[: max(0, excess)]:
            place = self._users.index(user)
            user.cancel()
            self._users[place] = asyncio.create_task(self._user())

    async def _user(self) -> None:
        """Send one request after another."""
        task = asyncio.current_task()
        assert task is not None
        while True:
            if self._engine.in_flight >= self.limit or self._engine.stats.kv_usage > ENOUGH:
                await asyncio.sleep(RETRY_AFTER)
                continue
            try:
                await self._request(task)
            except DSparkServerError as error:  # full, draining or dead; the dashboard ends the load eventually
                logger.debug("a background request was refused: %s", error)
                await asyncio.sleep(RETRY_AFTER)
            except Exception:
                logger.exception("a background request failed")
                await asyncio.sleep(RETRY_AFTER)

    async def _request(self, task: asyncio.Task[None]) -> None:
        params = SamplingParams(
            max_tokens=min(self._random.randint(SHORTEST, LONGEST), self._engine.max_model_len // 4),
            temperature=TEMPERATURE,
            priority=LAST_PRIORITY,
        )
        prompt = next(self._prompts)
        self._running[task] = None
        try:
            generation = await self._prompting.start(prompt, params, f"load-{uuid.uuid4().hex}")
            try:
                await generation.wait_over()
            finally:
                generation.close()
        finally:
            del self._running[task]

    def _endless(self) -> Iterator[str]:
        for index in itertools.count():
            prompts = SAMPLE_PROMPTS[self.domain]
            yield prompts[index % len(prompts)]
