"""One streaming request to an OpenAI-style /v1/completions, and ways to send many: closed loop, steady load, Poisson.

Nothing here knows which server answers. Times are seconds of `time.perf_counter`.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import httpx

PAUSE_AFTER_ERROR = 0.1  # seconds before a closed-loop user tries again, so that a full server is not flooded


class LoadTestError(Exception):
    """The load test cannot continue; the message is for its user."""


@dataclass(frozen=True)
class RequestOptions:
    """Options common to all requests of a run.

    `timeout` is in seconds for a whole request. With `request_seed`, request i asks for sampling seed `request_seed` +
    i. `running_usage` asks for the number of tokens so far in every chunk. `extra_body` overrides any field.
    """

    model: str
    max_tokens: int = 128
    temperature: float = 0.0
    ignore_eos: bool = True
    timeout: float = 600.0
    api_key: str | None = None
    request_seed: int | None = None
    running_usage: bool = False
    extra_body: dict[str, Any] = field(default_factory=dict)

    def body(self, prompt: str, index: int) -> dict[str, Any]:
        """The JSON body of request `index`."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True}
            | ({"continuous_usage_stats": True} if self.running_usage else {}),
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.request_seed is not None:
            body["seed"] = self.request_seed + index
        return body | self.extra_body


@dataclass
class Outcome:
    """The outcome of a request. Times in seconds; `ttft`, `e2e` and `gaps` count from the actual send.

    `queued` is the delay of the request in this client, not the server, after the moment it was due. `e2e` ends with
    the last chunk of output; `gaps` lie between chunks that have text. Token counts are the server's `usage` where
    `counted` is true; without it each chunk with text counts as one token and the prompt as none. `error` is a class
    such as "http_503", or None for a request that completed.
    """

    started: float
    queued: float = 0.0
    ttft: float = 0.0
    e2e: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    counted: bool = False
    error: str | None = None
    detail: str = ""

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first: (E2E - TTFT) / (tokens - 1). None for a single token."""
        return (self.e2e - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def user_rate(self) -> float | None:
        """Output tokens per second for this user; None if all came at once."""
        return 1 / self.tpot if self.tpot else None


class _Failure(Exception):
    """A request that failed in a way that the protocol defines: class and detail."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


def connect(url: str, api_key: str | None = None) -> httpx.AsyncClient:
    """A client without pool limits or proxies. Idle connections are dropped before servers commonly do (5 s)."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=None, limits=limits, trust_env=False)


# Called for each chunk with text: its time, and its number of tokens.
Progress = Callable[[float, int], None]


async def send(
    client: httpx.AsyncClient,
    options: RequestOptions,
    prompt: str,
    index: int = 0,
    *,
    due: float | None = None,
    progress: Progress = lambda _now, _tokens: None,
) -> Outcome:
    """Send one request now and read its stream to the end; never raises for errors of a server or network.

    `progress` gets the server's token counts if it sends them with every chunk, else one token per chunk.
    """
    outcome = Outcome(started=time.perf_counter())
    outcome.queued = max(0.0, outcome.started - due) if due is not None else 0.0
    try:
        async with (
            asyncio.timeout(options.timeout),
            client.stream("POST", "/v1/completions", json=options.body(prompt, index)) as response,
        ):
            if response.status_code != 200:
                raise _Failure(f"http_{response.status_code}", (await response.aread())[:300].decode(errors="replace"))
            await _read(response, outcome, progress)
    except _Failure as failure:
        outcome.error, outcome.detail = failure.kind, failure.detail
    except (TimeoutError, httpx.TimeoutException):
        outcome.error, outcome.detail = "timeout", f"no end within {options.timeout:g} s"
    except httpx.ConnectError as error:
        outcome.error, outcome.detail = "connect", str(error)
    except httpx.TransportError as error:
        outcome.error, outcome.detail = "disconnect", str(error)
    return outcome


async def _read(response: httpx.Response, outcome: Outcome, progress: Progress) -> None:
    """Fill `outcome` from a stream of completion chunks."""
    first = first_text = last_text = last = None
    texts, told, usage = 0, 0, None
    async for now, data in _events(response):
        if data == b"[DONE]":
            break
        try:
            chunk = json.loads(data)
            usage = chunk.get("usage") or usage
            choices = chunk.get("choices")
            has_text = bool(choices and choices[0].get("text"))
        except (ValueError, AttributeError, TypeError, LookupError):
            raise _Failure("malformed", f"not a completion chunk: {data[:200]!r}") from None
        if "error" in chunk:
            raise _Failure("stream_error", data[:300].decode(errors="replace"))
        if choices:
            last = now
            first = first or now
        if has_text:
            if last_text is not None:
                outcome.gaps.append(now - last_text)
            last_text = now
            first_text = first_text or now
            texts += 1
            so_far = (chunk.get("usage") or {}).get("completion_tokens") or told + 1
            progress(now, so_far - told)
            told = so_far
    else:
        raise _Failure("truncated", "the stream ended without [DONE]")
    outcome.counted = usage is not None
    outcome.prompt_tokens = (usage or {}).get("prompt_tokens") or 0
    outcome.output_tokens = (usage or {}).get("completion_tokens") or texts
    if first is None or last is None or not outcome.output_tokens:
        raise _Failure("empty", "the answer has no tokens")
    # A first chunk without text would flatter the server; for an answer without any text nothing better is known.
    outcome.ttft = (first_text or first) - outcome.started
    outcome.e2e = last - outcome.started


async def _events(response: httpx.Response) -> AsyncIterator[tuple[float, bytes]]:
    """The `data:` of each server-sent event, with the arrival time of its bytes."""
    rest = b""
    async for piece in response.aiter_raw():
        now = time.perf_counter()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield now, line[5:].strip()


Report = Callable[[Outcome], None]


async def closed_loop(
    client: httpx.AsyncClient,
    options: RequestOptions,
    prompt: Callable[[int], str],
    *,
    users: int,
    first: int = 0,
    requests: int | None = None,
    duration: float | None = None,
    report: Report = lambda _: None,
) -> list[Outcome]:
    """`users` that each send their next request when the last one ended.

    Requests are `first`, `first` + 1, …: `requests` of them, or as many as begin within `duration` seconds; those are
    read to their end.
    """
    indices: Iterator[int] = count(first) if requests is None else iter(range(first, first + requests))
    end = time.perf_counter() + duration if duration is not None else float("inf")
    outcomes: list[Outcome] = []

    async def user() -> None:
        while time.perf_counter() < end and (index := next(indices, None)) is not None:
            outcome = await send(client, options, prompt(index), index)
            outcomes.append(outcome)
            report(outcome)
            if outcome.error:
                await asyncio.sleep(PAUSE_AFTER_ERROR)

    await asyncio.gather(*[user() for _ in range(users)])
    return outcomes


@dataclass
class SteadyLoad:
    """Results of a steady load so far: its requests that ended, and (time, tokens) of every chunk."""

    outcomes: list[Outcome] = field(default_factory=list)
    chunks: list[tuple[float, int]] = field(default_factory=list)
    sent: int = 0

    def tokens_between(self, start: float, end: float) -> int:
        """Output tokens that came after `start` and up to `end`, of any request."""
        return sum(tokens for time, tokens in self.chunks if start < time <= end)


@asynccontextmanager
async def steady_load(
    client: httpx.AsyncClient,
    options: RequestOptions,
    prompt: Callable[[int], str],
    *,
    users: int,
    first: int = 0,
    report: Report = lambda _: None,
) -> AsyncIterator[SteadyLoad]:
    """`users` busy users out of step with each other, for as long as the context is open.

    Their first answers have lengths from 1 / `users` of `options.max_tokens` to all of it, and the context opens when
    the last of these has ended: without that, requests of equal lengths go in waves, and the number of waves in a
    measurement changes its result. On leaving, requests that have not ended are cancelled.
    """
    load = SteadyLoad()
    indices = count(first)
    options = replace(options, running_usage=True)
    out_of_step = asyncio.Semaphore(0)

    async def ask(options: RequestOptions) -> Outcome:
        index = next(indices)
        load.sent += 1
        outcome = await send(
            client, options, prompt(index), index, progress=lambda now, tokens: load.chunks.append((now, tokens))
        )
        load.outcomes.append(outcome)
        report(outcome)
        if outcome.error:
            await asyncio.sleep(PAUSE_AFTER_ERROR)
        return outcome

    async def user(number: int) -> None:
        await ask(replace(options, max_tokens=-(-options.max_tokens * (number + 1) // users)))
        out_of_step.release()
        while True:
            await ask(options)

    tasks = [asyncio.create_task(user(number)) for number in range(users)]
    try:
        for _ in range(users):
            await out_of_step.acquire()
        yield load
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def open_loop(
    client: httpx.AsyncClient,
    options: RequestOptions,
    prompt: Callable[[int], str],
    *,
    arrivals: Sequence[float],
    first: int = 0,
    max_in_flight: int | None = None,
    report: Report = lambda _: None,
) -> list[Outcome]:
    """Send a request at each of `arrivals` (seconds from now, ascending), whatever the outcome of the others.

    With `max_in_flight`, requests beyond it wait here, and that shows in `Outcome.queued`.
    """
    slots = asyncio.Semaphore(max_in_flight) if max_in_flight is not None else nullcontext()
    begin = time.perf_counter()

    async def one(index: int, due: float) -> Outcome:
        async with slots:
            outcome = await send(client, options, prompt(index), index, due=due)
        report(outcome)
        return outcome

    tasks: list[asyncio.Task[Outcome]] = []
    async with asyncio.TaskGroup() as group:
        for index, arrival in enumerate(arrivals, first):
            await asyncio.sleep(max(0.0, begin + arrival - time.perf_counter()))
            tasks.append(group.create_task(one(index, begin + arrival)))
    return [task.result() for task in tasks]
