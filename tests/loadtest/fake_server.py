"""A small OpenAI-style server that does what the prompt says; no model, real sockets.

    ok            `max_tokens` tokens, two a chunk        busy        503
    hang          two chunks, then silence                drop        two chunks, then the connection is cut
    fail          two chunks, then an error event         truncate    two chunks, then a clean end without [DONE]
    garbage       an event that is no JSON                empty       no tokens
    plain         as ok, without usage                    blank       as ok, after a first chunk without text
    slow          as ok, but the first chunk takes longer

As a program it stands in for `dspark-server`: fake_server.py serve MODEL --port PORT --speculative-config JSON.
"""

import argparse
import asyncio
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

FIRST_DELAY = 0.02  # seconds before the first chunk; ten times as long if slow
CHUNK_DELAY = 0.004
DRAFTED = 3  # tokens drafted a step, of which one is accepted


class FakeApp:
    """The ASGI application. Keeps the bodies it was sent and counts as vLLM does."""

    def __init__(self, *, speculative: bool = True, metrics: bool = True, die_after: int | None = None) -> None:
        self.bodies: list[dict] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.running = 0
        self.most_running = 0
        self.generated = 0
        self.drafts = 0
        self.speculative = speculative
        self.metrics = metrics
        self.die_after = die_after

    async def __call__(self, scope, receive, send) -> None:
        assert scope["type"] == "http"
        path = scope["path"]
        if path == "/health":
            await answer(send, 200, b"")
        elif path == "/v1/models":
            await answer(send, 200, json.dumps({"object": "list", "data": [{"id": "fake-model"}]}).encode())
        elif path == "/metrics" and self.metrics:
            await answer(send, 200, self.page().encode())
        elif path == "/v1/completions":
            self.headers.append(dict(scope["headers"]))
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            try:
                await self.complete(json.loads(await read(receive)), send)
            finally:
                self.running -= 1
        else:
            await answer(send, 404, b"{}")

    async def complete(self, body: dict, send) -> None:
        self.bodies.append(body)
        if self.die_after is not None and len(self.bodies) > self.die_after:
            print("a fatal thing happened", flush=True)
            os._exit(3)
        word = body["prompt"].split()[0]
        if word == "busy":
            await answer(send, 503, b'{"error": {"message": "The queue is full."}}')
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await asyncio.sleep(10 * FIRST_DELAY if word == "slow" else FIRST_DELAY)
        tokens = 0 if word == "empty" else body["max_tokens"]
        if word == "blank":
            await event(send, {"choices": [{"index": 0, "text": ""}]})
            await asyncio.sleep(FIRST_DELAY)
        for number in range(0, tokens, 2):
            if number == 4:
                if word == "hang":
                    await asyncio.sleep(30)
                elif word == "drop":
                    raise ConnectionError("dropped on purpose")
                elif word == "fail":
                    await event(send, {"error": {"message": "The engine failed."}})
                    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
                    return
                elif word == "truncate":
                    await send({"type": "http.response.body", "body": b""})
                    return
                elif word == "garbage":
                    await send({"type": "http.response.body", "body": b"data: {no json\n\n"})
                    return
            self.generated += min(2, tokens - number)
            self.drafts += tokens - number > 1
            chunk = {"choices": [{"index": 0, "text": "x " * min(2, tokens - number)}]}
            if body["stream_options"].get("continuous_usage_stats") and word != "plain":
                chunk["usage"] = {"prompt_tokens": 7, "completion_tokens": min(number + 2, tokens)}
            await event(send, chunk)
            await asyncio.sleep(CHUNK_DELAY)
        if word != "plain":
            await event(send, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    def page(self) -> str:
        """/metrics, spread over two engines as a data-parallel vLLM has it."""
        series = {"generation_tokens": self.generated}
        if self.speculative:
            series["spec_decode_num_drafts"] = self.drafts
            series["spec_decode_num_draft_tokens"] = DRAFTED * self.drafts
            series["spec_decode_num_accepted_tokens"] = self.drafts
        lines = []
        for name, value in series.items():
            lines.append(f"# TYPE vllm:{name} counter")
            for engine, part in enumerate((value // 2, value - value // 2)):
                lines.append(f'vllm:{name}_total{{engine="{engine}",model_name="fake"}} {part}.0')
        if self.speculative:
            lines.append("# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter")
            for position, value in enumerate((self.drafts, 0, 0)):
                labels = f'engine="0",model_name="fake",position="{position}"'
                lines.append(f"vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels}}} {value}.0")
        return "\n".join(lines) + "\n"


async def read(receive) -> bytes:
    """The whole body of a request."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def answer(send, status: int, body: bytes) -> None:
    """A whole response."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body})


async def event(send, chunk: dict) -> None:
    """A server-sent event, and more to come."""
    data = b"data: " + json.dumps(chunk).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": data, "more_body": True})


@contextmanager
def serving(app: FakeApp) -> Iterator[str]:
    """The base URL of `app` on a socket, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, lifespan="off", log_level="critical", timeout_graceful_shutdown=1, ws="none")
    )
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


def main() -> None:
    """Stand in for `dspark-server`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--speculative-config", type=json.loads, required=True)
    parser.add_argument("--die-after", type=int)
    parser.add_argument("--dies", help="only the server of this policy dies")
    parser.add_argument("--refuse", action="store_true")
    arguments = parser.parse_args()
    config = arguments.speculative_config
    print(json.dumps(config), flush=True)
    if arguments.refuse:
        raise SystemExit("fake: there is no such drafter")
    policy = config.get("selection", "none")
    app = FakeApp(
        speculative=config.get("method") != "none",
        die_after=arguments.die_after if arguments.dies in (None, policy) else None,
    )
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, lifespan="off", log_level="warning", ws="none")


if __name__ == "__main__":
    main()
