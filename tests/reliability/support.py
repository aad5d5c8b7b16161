"""A live server in a process of its own, over the real engine and a tiny model; a pipe arms its failpoints."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx

from tests.processes import CommandLine, processes

FIXTURE = Path(__file__).parents[1] / "fixtures" / "dspark_qwen3_vanilla"
EXIT_DEAD = 70

CANARY = {"prompt": [5, 9, 11, 7], "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def body(seed: int, max_tokens: int = 200, **fields: Any) -> dict[str, Any]:
    """A greedy request of its own."""
    prompt = [3 + (seed * 37 + index * index * 11) % 240 for index in range(8 + seed % 5)]
    return {**CANARY, "prompt": prompt, "max_tokens": max_tokens, **fields}


def bodies(count: int, max_tokens: int = 200) -> list[dict[str, Any]]:
    """Requests of their own, every other one streamed."""
    return [body(seed, max_tokens, stream=bool(seed % 2)) for seed in range(count)]


def tiny_engine(**engine: Any) -> Any:
    """The real engine over a random model with a drafter; one token per byte."""
    from dspark_server.config import EngineConfig, SpeculativeConfig
    from dspark_server.engine.core import EngineCore
    from dspark_server.engine.engine import AsyncEngine
    from dspark_server.speculation.cost_model import Profile
    from tests.api.fake_engine import build_tokenizer

    costs = Profile((1, 64, 256), (1e-3, 1.1e-3, 2e-3), (1, 16), (2e-4, 3e-4), 0.0, 0.0)
    speculative = SpeculativeConfig(method="dspark", model=str(FIXTURE / "draft"), selection="fixed")
    values = {"num_blocks": 1024, "block_size": 4, "check_invariants": True, "speculative": speculative} | engine
    config = EngineConfig(model=str(FIXTURE / "target"), served_model_name="tiny", dtype="float32", **values)
    return AsyncEngine(EngineCore.load(config, costs), build_tokenizer())


LAG_TICK, LAG_SECONDS = 0.005, 3.0


async def measure_lag(lags: deque[float]) -> None:
    """How late the event loop comes to what is due every 5 ms, in seconds; a stall makes late all that it held up."""
    due = time.monotonic() + LAG_TICK
    while True:
        await asyncio.sleep(due - time.monotonic())
        now = time.monotonic()
        while due <= now:
            lags.append(now - due)
            due += LAG_TICK


def run_child(commands: Connection, log: str, engine: dict[str, Any], settings: dict[str, Any], files: int) -> None:
    """Main of the process: sends its port, then does what it is told by the pipe while it serves."""
    import torch
    import uvloop

    from dspark_server import failpoints
    from dspark_server.api import ServerSettings, serve
    from dspark_server.api.logs import set_up
    from dspark_server.errors import EngineDeadError

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    chosen = ServerSettings(**settings)
    set_up("info", chosen.log_format)
    made = tiny_engine(**engine)
    listener = socket.create_server(("127.0.0.1", 0))
    # The kernel else takes megabytes for a reader that takes nothing.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
    if files:
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + files, used + files))

    lags: deque[float] = deque(maxlen=int(LAG_SECONDS / LAG_TICK))

    async def main() -> None:
        watch = asyncio.create_task(measure_lag(lags))
        try:
            await serve(lambda: made, chosen, sockets=[listener])
        finally:
            watch.cancel()

    def figures() -> dict[str, float]:
        stats, late = made.stats, sorted(lags)
        return {
            "in_flight": made.in_flight,
            "kv_usage": stats.kv_usage,
            "running": stats.running,
            "preemptions": stats.preemptions,
            "failed_drafts": stats.failed_drafts,
            "steps": stats.steps,
            "queued_tokens": made.queued_tokens,
            "threads": threading.active_count(),
            "tasks": len(asyncio.all_tasks(made._loop)) if made._loop else 0,
            "lag": late[int(0.99 * len(late))] if late else 0.0,
            "files": len(os.listdir("/proc/self/fd")),
            "rss": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
        }

    def obey() -> None:
        commands.send(listener.getsockname()[1])
        with contextlib.suppress(EOFError, OSError):
            while True:
                order = commands.recv()
                if order is not None:
                    failpoints.arm(order)
                commands.send(figures())

    threading.Thread(target=obey, daemon=True).start()
    try:
        uvloop.run(main())
    except EngineDeadError:
        os._exit(EXIT_DEAD)


@dataclass
class Answer:
    """What became of one request."""

    status: int
    tokens: list[int] = field(default_factory=list)
    error: str | None = None
    errors: int = 0
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.error is None


class Server:
    """The process, and a client of it."""

    def __init__(
        self,
        directory: Path,
        *,
        engine: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        files: int = 0,
        log: str | None = None,
    ) -> None:
        self.log = Path(log or directory / f"log-{time.monotonic_ns()}")
        self._commands, theirs = processes.Pipe()
        self._lock = threading.Lock()
        arguments = (theirs, str(self.log), engine or {}, settings or {}, files)
        self.process = processes.Process(target=run_child, args=arguments)
        self.process.start()
        theirs.close()
        self.port = self._commands.recv()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, limits=limits)
        self.wait(lambda: self.ready(), "ready")

    def ready(self) -> bool:
        """What readiness says; a refused connection is not ready."""
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def live(self) -> bool:
        """What liveness says."""
        try:
            return self.http.get("/live").status_code == 200
        except httpx.TransportError:
            return False

    def arm(self, **faults: str) -> None:
        """Arm exactly these failpoints, their dots written as two underscores; without any: disarm."""
        self.tell({name.replace("__", "."): text for name, text in faults.items()})

    def figures(self) -> dict[str, float]:
        """What the process says of itself."""
        return self.tell(None)

    def tell(self, order: dict[str, str] | None) -> dict[str, float]:
        with self._lock:
            self._commands.send(order)
            assert self._commands.poll(10), "the process does not answer"
            return self._commands.recv()

    def ask(self, body: dict[str, Any] = CANARY, *, key: str | None = None) -> Answer:
        """One completion, streamed or not; never raises."""
        began = time.monotonic()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            answer = self._ask(body, headers)
        except httpx.TransportError as error:
            answer = Answer(0, error=type(error).__name__)
        answer.seconds = time.monotonic() - began
        return answer

    def _ask(self, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        response = self.http.post("/v1/completions", json=body, headers=headers)
        if response.status_code != 200 or not body.get("stream"):
            said = response.json()
            if "error" in said:
                return Answer(
                    response.status_code, error=said["error"]["message"], errors=1, headers=dict(response.headers)
                )
            return Answer(200, said["choices"][0].get("token_ids", []))
        answer = Answer(200, headers=dict(response.headers))
        for line in response.text.split("\n\n"):
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    answer.error, answer.errors = event["error"]["message"], answer.errors + 1
                else:
                    answer.tokens += [t for choice in event["choices"] for t in choice.get("token_ids") or []]
        if not response.text.endswith("data: [DONE]\n\n"):
            answer.error = "the stream was cut"
        return answer

    def ask_all(self, bodies: list[dict[str, Any]], **options: Any) -> list[Answer]:
        """All at once."""
        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(lambda body: self.ask(body, **options), bodies))

    @contextlib.contextmanager
    def asking(self, bodies: list[dict[str, Any]]) -> Iterator[list[Answer]]:
        """All at once while the block runs; the answers are there behind it."""
        answers: list[Answer] = []
        with ThreadPoolExecutor(len(bodies)) as pool:
            futures = [pool.submit(self.ask, body) for body in bodies]
            yield answers
            answers += [future.result() for future in futures]

    def wait(self, condition: Any, what: str = "condition", seconds: float = 20.0) -> float:
        """Until the condition holds; the seconds it took."""
        began = time.monotonic()
        while not condition():
            assert self.process.is_alive() or what == "end", f"the process ended ({self.process.exitcode})"
            assert time.monotonic() - began < seconds, f"{what}: not reached in {seconds:g} s"
            time.sleep(0.01)
        return time.monotonic() - began

    def wait_idle(self, seconds: float = 5.0) -> float:
        """Until nothing is in flight and no block is held."""

        def idle() -> bool:
            figures = self.figures()
            return figures["in_flight"] == 0 and figures["kv_usage"] == 0 and figures["queued_tokens"] == 0

        return self.wait(idle, "idle", seconds)

    def processor_seconds(self) -> float:
        """Processor time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def exit_code(self, seconds: float = 15.0) -> int | None:
        """Of the process, which must end by itself."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"the process has not ended after {seconds:g} s"
        return self.process.exitcode

    def close(self) -> None:
        """End it, whatever its state."""
        self.http.close()
        if self.process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
            self.process.kill()
        self.process.join()
        self.process.close()
        self._commands.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Command:
    """`dspark-server serve` itself, over the tiny model without a drafter."""

    def __init__(self, directory: Path, *options: str, **environment: str) -> None:
        from tests.api.fake_engine import build_tokenizer

        build_tokenizer().save_pretrained(directory / "tokenizer")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = ["serve", str(FIXTURE / "target"), "--tokenizer", str(directory / "tokenizer")]
        command += ["--kv-cache-memory-bytes", "8000000", "--speculative-config", '{"method": "none"}']
        command += ["--port", str(port), *options]
        self.log = directory / "log"
        self.process: CommandLine | subprocess.Popen[bytes]
        if "LD_PRELOAD" in environment:  # read when a program is loaded
            with self.log.open("w") as log:
                program = [sys.executable, "-m", "dspark_server", *command]
                self.process = subprocess.Popen(program, env=os.environ | environment, stdout=log, stderr=log)
        else:
            self.process = CommandLine(command, self.log, **environment)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def __enter__(self) -> "Command":
        """Ready."""
        deadline = time.monotonic() + 60
        while True:
            try:
                self.http.get("/health").raise_for_status()
                return self
            except httpx.HTTPError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.05)

    def __exit__(self, *exc: object) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()


class Canaries:
    """Greedy requests, one by one, while a case runs: each must be an honest error or exactly the known tokens."""

    def __init__(self, server: Server, expected: list[int]) -> None:
        self._server, self._expected = server, expected
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.equal = self.refused = 0
        self.wrong: list[Answer] = []

    def _run(self) -> None:
        while not self._stop.is_set():
            answer = self._server.ask(CANARY | {"stream": bool(self.equal % 2)})
            if answer.ok and answer.tokens == self._expected:
                self.equal += 1
            elif answer.error is not None and answer.status in (0, 200, 500, 503):
                self.refused += 1
            else:
                self.wrong.append(answer)
            self._stop.wait(0.02)

    def __enter__(self) -> "Canaries":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(60)


def raw(server: Server, asked: dict[str, Any]) -> socket.socket:
    """A request over a plain socket, nothing read."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    send(connection, asked)
    return connection


def send(connection: socket.socket, asked: dict[str, Any]) -> None:
    """A completion request, as bytes."""
    content = json.dumps(asked).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content)
    connection.sendall(head + content)


def reset(connection: socket.socket) -> None:
    """Let the next close be a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
