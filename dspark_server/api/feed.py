"""The dashboard's stream of server-sent events: the state of the engine, at most ten times a second.

A viewer gets `hello` first, then states. A state has the counters of /metrics, the newest step's picture, the cost
table, the gain of drafts, and the tokens of the viewer's own prompt. Prompts and answers of others are never shown,
only their lengths, probabilities and counts. A slow reader gets fewer states, each with all new text of the own prompt
and the newest of its blocks.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

import orjson
from fastapi import Response
from starlette.types import Receive, Scope, Send

from dspark_server.api.generation import Generation
from dspark_server.api.prompting import Prompting
from dspark_server.engine.engine import AsyncEngine
from dspark_server.engine.observer import Block, StepObserver
from dspark_server.errors import CapacityError, EngineDeadError

INTERVAL = 0.1  # seconds between two states
QUIET_INTERVAL = 1.0  # the same, while nothing changes
MAX_VIEWERS = 16
MAX_BLOCKS = 48  # of the own prompt, in one state; older ones are left out
LONGEST_PIECE = 24  # characters of a draft token that are shown


class OwnPrompt:
    """A viewer's prompt: its blocks as they arrive, with their texts."""

    def __init__(self, number: int, request_id: str, blocks: deque[Block], prompting: Prompting) -> None:
        self.number = number
        self.request_id = request_id
        self.generation: Generation | None = None  # once it is submitted
        self.tokens = 0
        self._blocks = blocks
        self._prompting = prompting
        self._stream = prompting.text_stream()
        self._began = self._last = 0.0  # monotonic seconds of the first and the newest tokens
        self._told_end = False

    @property
    def finish_reason(self) -> str | None:
        """The reason why it ended, None while it runs."""
        if self.generation is None:
            return None
        if self.generation.failure is not None:
            return "error"
        return self.generation.choices[0].finish_reason

    @property
    def has_news(self) -> bool:
        """Whether blocks or the end have not been sent yet."""
        return bool(self._blocks) or (self.finish_reason is not None and not self._told_end)

    def news(self) -> dict[str, Any]:
        """Return all new text and the newest blocks."""
        finish_reason = self.finish_reason  # read before the blocks: the last of them is there by then
        taken = [self._blocks.popleft() for _ in range(len(self._blocks))]
        now = monotonic()
        text: list[tuple[str, str]] = []
        for block in taken:
            self.tokens += len(block.committed)
            for index, token in enumerate(block.committed):
                text.append((self._stream.push((token,)), "draft" if index < block.accepted else "target"))
        if taken:
            self._began = self._began or now
            self._last = now
        if finish_reason is not None and not self._told_end:
            self._told_end = True
            text.append((self._stream.finish(), "target"))
        shown = taken[-MAX_BLOCKS:]
        return {
            "number": self.number,
            "text": [segment for segment in text if segment[0]],
            "blocks": [_described(block, self._prompting) for block in shown],
            "skipped": len(taken) - len(shown),
            "tokens": self.tokens,
            "seconds": round(self._last - self._began, 3),
            "finish_reason": finish_reason,
            "error": self.generation.failure if self.generation else None,
        }


def _described(block: Block, prompting: Prompting) -> dict[str, Any]:
    """Describe a block with its texts. `own` is the target's own token: the bonus token or the correction."""
    own = block.committed[block.accepted] if len(block.committed) > block.accepted else None
    return {
        "draft": [
            (prompting.piece(token)[:LONGEST_PIECE], round(100 * chance))
            for token, chance in zip(block.draft, block.survival, strict=True)
        ],
        "copied": block.copied,
        "verified": block.verified,
        "accepted": block.accepted,
        "own": None if own is None else prompting.piece(own)[:LONGEST_PIECE],
    }


class Viewer:
    """One open feed. Its id is a secret: with it a client may start a prompt and read its tokens here."""

    def __init__(self) -> None:
        self.id = secrets.token_urlsafe(16)
        self.own: OwnPrompt | None = None
        self.over = False
        self._news = asyncio.Event()

    def wake(self) -> None:
        """Report that there may be something to send."""
        self._news.set()

    async def wait(self) -> None:
        """Wait until woken; any number of calls to `wake` count as one."""
        await self._news.wait()
        self._news.clear()


class Feed:
    """All viewers of one engine. Without viewers the engine does no work for it.

    `state` gives the other fields of a state; `tick` is called ten times a second, `on_leave` when a viewer has left.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        hello: Callable[[], dict[str, Any]],
        state: Callable[[], dict[str, Any]],
        tick: Callable[[], None],
        on_leave: Callable[[Viewer], None],
    ) -> None:
        self._engine = engine
        self._hello = hello
        self._state = state
        self._tick = tick
        self._on_leave = on_leave
        self.watch = StepObserver(engine.costs)
        self.viewers: dict[str, Viewer] = {}
        self.latest = b""  # the newest state, without its closing brace
        self._ticker: asyncio.Task[None] | None = None

    def open(self) -> Viewer:
        """Add a viewer.

        Raises CapacityError when too many are open, EngineDeadError when the engine has stopped.
        """
        if self._engine.health() == "dead":
            raise EngineDeadError("The engine has stopped; see the server's log.")
        if len(self.viewers) >= MAX_VIEWERS:
            raise CapacityError(f"{MAX_VIEWERS} dashboards are open, which is the limit. Close one of them.")
        viewer = Viewer()
        self.viewers[viewer.id] = viewer
        if self._ticker is None:
            self.watch.picture = None
            self.latest = self._latest()
            self._engine.watch(self.watch)
            self._ticker = asyncio.create_task(self._run())
        viewer.wake()
        return viewer

    def close(self, viewer: Viewer) -> None:
        """Remove a viewer that left. After the last one the engine is no longer observed."""
        if self.viewers.pop(viewer.id, None) is None:
            return
        viewer.over = True
        viewer.wake()
        self._on_leave(viewer)
        if not self.viewers and self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
            self._engine.watch(None)

    def hello(self, viewer: Viewer) -> bytes:
        """Return the first event."""
        return b"event: hello\ndata: " + orjson.dumps({"feed": viewer.id, **self._hello()}) + b"\n\n"

    def message(self, viewer: Viewer) -> bytes:
        """Return one state for one viewer."""
        own = b"null"
        if viewer.own is not None:
            own = orjson.dumps(viewer.own.news())
            if viewer.own.finish_reason is not None:
                self.watch.unfollow(viewer.own.request_id)
        return b'event: state\ndata: %b,"at":%.3f,"own":%b}\n\n' % (self.latest, monotonic(), own)

    async def _run(self) -> None:
        told = b""
        at = 0.0
        while True:
            await asyncio.sleep(INTERVAL)
            self._tick()
            health = self._engine.health()
            if health == "dead" or (health == "draining" and self._engine.in_flight == 0):
                for viewer in self.viewers.values():  # an open stream would delay the server's shutdown
                    viewer.over = True
            self.latest = self._latest()
            changed = self.latest != told or monotonic() - at >= QUIET_INTERVAL
            if changed:
                told, at = self.latest, monotonic()
            for viewer in self.viewers.values():
                if changed or viewer.over or (viewer.own is not None and viewer.own.has_news):
                    viewer.wake()

    def _latest(self) -> bytes:
        stats, costs = self._engine.stats, self._engine.costs
        state = {
            "health": self._engine.health(),
            **self._state(),
            "running": stats.running,
            "waiting": stats.waiting,
            "kv_usage": round(stats.kv_usage, 4),
            "counters": counters(self._engine),
            "picture": self.watch.picture,
            "gain": None if stats.gain.ratio is None else round(stats.gain.ratio, 2),
            "slow": stats.slow_steps,
            "slowdown": round(stats.step_slowdown, 3),
            "costs": [] if costs is None else [(tokens, 1e3 * s) for tokens, s in costs.verify_seconds.items()],
        }
        return orjson.dumps(state)[:-1]


def counters(engine: AsyncEngine) -> dict[str, Any]:
    """Return the counters of /metrics since the server's start; `budgets[b]` counts requests with b tokens verified."""
    stats = engine.stats
    budgets = dict(stats.budgets)
    return {
        "steps": stats.steps,
        "prompt_tokens": stats.prompt_tokens,
        "generation_tokens": stats.generation_tokens,
        "preemptions": stats.preemptions,
        "drafts": stats.drafts,
        "draft_tokens": stats.draft_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "accepted_per_position": list(stats.accepted_per_position),
        "drafted": stats.drafting["drafted"],
        "copied": stats.drafting["copied"],
        "skipped": stats.drafting["skipped"],
        "budgets": [budgets.get(budget, 0) for budget in range(engine.gamma + 2)],
        "seconds": {part: round(seconds, 4) for part, seconds in stats.seconds.items()},
    }


class FeedResponse(Response):
    """Sends one viewer's events until the viewer leaves or the server ends."""

    def __init__(self, feed: Feed, viewer: Viewer) -> None:
        super().__init__()
        self._feed = feed
        self._viewer = viewer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        feed, viewer = self._feed, self._viewer
        watcher = asyncio.create_task(self._watch_disconnect(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": feed.hello(viewer), "more_body": True})
            while not viewer.over:
                await viewer.wait()
                await send({"type": "http.response.body", "body": feed.message(viewer), "more_body": True})
            with suppress(OSError):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watcher.cancel()
            feed.close(viewer)

    async def _watch_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._feed.close(self._viewer)


_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
