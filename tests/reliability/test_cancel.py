"""The handler of a request is cancelled at each of its awaits in turn: every slot, token and block comes back."""

import asyncio
import itertools
import json
import types
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from typing import Any

import pytest
from fastapi import FastAPI

from dspark_server import failpoints
from dspark_server.api import ServerSettings, create_app
from dspark_server.engine.engine import AsyncEngine

from .support import CANARY, tiny_engine

CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
LONG = {**CANARY, "max_tokens": 900}  # with steps of 20 ms far longer than anybody waits for it to be let go
REPEATS = 3  # of the same await: before a request has tokens, and after
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("/v1/completions", {**LONG, "prompt": ["abc", "xyz"], "n": 2, "echo": True}),
    "stream": ("/v1/completions", {**LONG, "prompt": "abc", "stream": True, "logprobs": 2}),
    "form": ("/v1/completions", {**LONG, "prompt": "abc", "structured_outputs": {"regex": "[a-f]{800}x"}}),
    "bad words": ("/v1/completions", {**LONG, "bad_words": ["ab"], "best_of": 2, "temperature": 1.0}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 900, "n": 2}),
    "tokenize": ("/tokenize", {"prompt": "abc"}),
}


Place = tuple[tuple[types.CodeType, int], ...]


def place(coroutine: Any) -> Place:
    """Code and line of every frame between a suspended coroutine and what it waits for."""
    frames = []
    while (frame := getattr(coroutine, "cr_frame", getattr(coroutine, "gi_frame", None))) is not None:
        frames.append((frame.f_code, frame.f_lineno))
        coroutine = getattr(coroutine, "cr_await", getattr(coroutine, "gi_yieldfrom", None))
    return tuple(frames)


@types.coroutine
def cancelled_at(
    number: int, coroutine: Coroutine[Any, Any, None], cancelled: Counter[Place]
) -> Generator[Any, Any, None]:
    """Run it, and cancel the task it runs in at its `number`-th suspension (from 0), which is counted by its place."""
    task = asyncio.current_task()
    assert task is not None
    go_on: Callable[[], Any] = partial(coroutine.send, None)
    for count in itertools.count():
        try:
            future = go_on()
        except StopIteration:
            return
        if count == number:
            cancelled[place(coroutine)] += 1
            task.cancel()
        try:
            yield future
            go_on = partial(coroutine.send, None)
        except BaseException as error:
            go_on = partial(coroutine.throw, error)


async def serve(app: FastAPI, path: str, body: dict[str, Any], number: int, cancelled: Counter[Place]) -> bool:
    """One request to the application, cancelled at an await of its handler; False: it ended before."""
    content = json.dumps(body).encode()
    headers = [(b"host", b"x"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "", "server": ("x", 80)}
    sent = [{"type": "http.request", "body": content[:9], "more_body": True}]
    sent += [{"type": "http.request", "body": content[9:], "more_body": False}]

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        return sent.pop(0) if sent else await asyncio.get_running_loop().create_future()

    async def send(message: dict[str, Any]) -> None:
        await asyncio.sleep(0)

    async def run() -> None:
        await cancelled_at(number, app(scope, receive, send), cancelled)  # type: ignore[arg-type]

    task = asyncio.create_task(run())
    await asyncio.wait([task])
    return task.cancelled()


async def settled(engine: AsyncEngine) -> None:
    """Nothing of the request is left, in the engine or on the event loop."""
    mine = {asyncio.current_task(), engine._watchdog}

    def busy() -> dict[str, Any]:
        stats = engine.stats
        figures = {"in_flight": engine.in_flight, "queued": engine.queued_tokens, "kv": stats.kv_usage}
        return figures | {"running": stats.running, "waiting": stats.waiting, "tasks": len(asyncio.all_tasks() - mine)}

    for _ in range(1000):
        if not any(busy().values()):
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"left behind: {busy()}")


@pytest.mark.parametrize("name", REQUESTS)
def test_a_handler_may_be_cancelled_at_any_await(name: str) -> None:
    path, body = REQUESTS[name]

    async def main(check: Callable[[FastAPI, AsyncEngine], Awaitable[None]]) -> None:
        engine = tiny_engine()
        engine.tokenizer.chat_template = CHAT_TEMPLATE
        app = create_app(engine, ServerSettings(key_max_requests=1))  # a place under a limit is given back too
        await engine.start()
        try:
            with failpoints.armed(step_plan="sleep:0.02"):
                await check(app, engine)
        finally:
            await engine.stop()

    async def check(app: FastAPI, engine: AsyncEngine) -> None:
        cancelled = Counter[Place]()
        # An await that comes back once more is that of another step's tokens, and so are those behind it.
        while max(cancelled.values(), default=0) <= REPEATS:
            if not await serve(app, path, body, cancelled.total(), cancelled):
                break
            await settled(engine)
        assert cancelled.total() >= 5, f"only {cancelled.total()} awaits were seen"

    asyncio.run(main(check))
