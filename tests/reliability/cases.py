"""The cases of the chaos runner: what is done to a server, what must come of it, what did."""

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.support import CANARY, EXIT_DEAD, Answer, Canaries, Server


@dataclass
class Bench:
    """Where cases work; ends the servers they started."""

    directory: Path
    soak: float

    def __post_init__(self) -> None:
        self.servers: list[Server] = []

    def start(self, **options: Any) -> Server:
        """A server of the case's own, warm."""
        self.servers.append(Server(self.directory, **options))
        return self.servers[-1]

    def close(self) -> None:
        for server in self.servers:
            server.close()

    @contextmanager
    def canaries(self, server: Server) -> Iterator[Canaries]:
        """Canaries beside the block; afterwards none may have been wrong, and one must pass."""
        first = server.ask()
        assert first.ok and len(first.tokens) == CANARY["max_tokens"], first
        with Canaries(server, first.tokens) as canaries:
            yield canaries
        assert not canaries.wrong, f"wrong canary: {canaries.wrong[0]}"
        assert server.ask().tokens == first.tokens, "the canary after the fault"
        server.wait_idle()


@dataclass(frozen=True)
class Case:
    name: str
    expected: str
    run: Callable[[Bench], str]
    slow: bool = False


CASES: list[Case] = []


def case(name: str, expected: str, *, slow: bool = False) -> Callable[[Callable[[Bench], str]], Callable[[Bench], str]]:
    """Register the function below as a case."""

    def register(run: Callable[[Bench], str]) -> Callable[[Bench], str]:
        CASES.append(Case(name, expected, run, slow))
        return run

    return register


def body(seed: int, max_tokens: int = 200, **fields: Any) -> dict[str, Any]:
    """A greedy request of its own."""
    prompt = [3 + (seed * 37 + index * index * 11) % 240 for index in range(8 + seed % 5)]
    return {**CANARY, "prompt": prompt, "max_tokens": max_tokens, **fields}


def bodies(count: int, max_tokens: int = 200) -> list[dict[str, Any]]:
    return [body(seed, max_tokens, stream=bool(seed % 2)) for seed in range(count)]


def fates(answers: list[Answer]) -> str:
    ok = sum(answer.ok for answer in answers)
    return f"{ok} finished, {len(answers) - ok} failed"


def one_error_each(answers: list[Answer]) -> None:
    for answer in answers:
        assert answer.ok or (answer.errors == 1 and answer.status in (200, 500, 503)), answer


# -- one step or one request fails ------------------------------------------------------------------------------------


def _step_fails(point: str, fault: str) -> Callable[[Bench], str]:
    def run(bench: Bench) -> str:
        server = bench.start(engine={"max_num_seqs": 6})
        asked = bodies(12)
        expected = [answer.tokens for answer in server.ask_all(asked)]
        with bench.canaries(server) as canaries, server.asking(asked) as answers:
            server.wait(lambda: server.figures()["running"] >= 5, "busy")
            server.arm(**{point.replace(".", "__"): fault})
            time.sleep(0.3)
            server.arm()
            assert server.ready() and server.live()
        one_error_each(answers)
        failed = [answer for answer in answers if not answer.ok]
        assert len(failed) <= 6, fates(answers)
        assert len(failed) + canaries.refused >= 1, "the fault hit nobody"
        for answer, tokens in zip(answers, expected, strict=True):
            assert not answer.ok or answer.tokens == tokens, "tokens changed"
        return f"{fates(answers)}; {canaries.equal} canaries equal, {canaries.refused} failed; ready; no block lost"

    return run


_ONE = "those in the step get one error each, those waiting finish with the same tokens; ready; no block lost"
for _name, _point, _fault in (
    ("forward raises once", "step.verify", "raise:RuntimeError*1"),
    ("out of memory in the forward", "step.verify", "raise:MemoryError*1"),
    ("out of memory in the sampler", "step.sample", "raise:MemoryError*1"),
    ("out of memory in the block allocator", "blocks.allocate", "raise:MemoryError*1@2"),
    ("allocator exhausted", "blocks.allocate", "raise:CapacityError*1@1"),
    ("scheduler raises", "step.plan", "raise:RuntimeError*1"),
    ("commit fails before anyone", "step.commit", "raise:RuntimeError*1"),
    ("commit fails in the middle of a batch", "commit.request", "raise:RuntimeError*1@3"),
):
    CASES.append(Case(_name, _ONE, _step_fails(_point, _fault)))


def _one_fails(point: str, fault: str, most: int) -> Callable[[Bench], str]:
    def run(bench: Bench) -> str:
        server = bench.start()
        asked = bodies(8)
        expected = [answer.tokens for answer in server.ask_all(asked)]
        with bench.canaries(server) as canaries, server.asking(asked) as answers:
            server.wait(lambda: server.figures()["running"] >= 5, "busy")
            server.arm(**{point.replace(".", "__"): fault})
            time.sleep(0.3)
            server.arm()
        one_error_each(answers)
        failed = sum(not answer.ok for answer in answers) + canaries.refused
        assert failed <= most and (most == 0 or failed), f"{failed} failed"
        for answer, tokens in zip(answers, expected, strict=True):
            assert not answer.ok or answer.tokens == tokens, "tokens changed"
        drafts = server.figures()["failed_drafts"]
        without = f"; {drafts:.0f} steps without a draft" if drafts else ""
        return f"{failed} failed, {len(answers) + canaries.equal - failed} equal{without}"

    return run


_SOLE = "that request fails with one error, the others' tokens are the same"
_NOBODY = "nobody fails, tokens are the same"
for _name, _expected, _point, _fault, _most in (
    ("NaN in one row of the target", _SOLE, "target.logits", "nan:0*1", 1),
    ("infinity in one row of the target", _SOLE, "target.logits", "inf:0*1", 1),
    ("NaN in every confidence", _NOBODY, "draft.survival", "nan", 0),
    ("drafter raises", _NOBODY, "step.draft", "raise:RuntimeError*5", 0),
    ("out of memory in the drafter", _NOBODY, "step.draft", "raise:MemoryError*5", 0),
    ("detokenizer raises", _SOLE, "text.push", "raise:ValueError*1", 1),
):
    CASES.append(Case(_name, _expected, _one_fails(_point, _fault, _most)))


@case("tokenizer raises", "that request gets a 500 that says nothing; the next is served")
def _tokenizer(bench: Bench) -> str:
    server = bench.start()
    with bench.canaries(server):
        server.arm(tokenizer__encode="raise:ValueError*1")
        answer = server.ask(CANARY | {"prompt": "abc"})
        assert answer.status == 500 and answer.error == "Internal server error.", answer
        assert server.ask(CANARY | {"prompt": "abc"}).ok
    return f"{answer.status} {answer.error!r}, then 200"


# -- the engine cannot go on ------------------------------------------------------------------------------------------


def _dies(fault: dict[str, str], seconds: float, reason: str) -> Callable[[Bench], str]:
    def run(bench: Bench) -> str:
        server = bench.start(engine={"step_timeout": 1.0, "max_num_seqs": 4})
        assert server.ask().ok
        with server.asking(bodies(10, 900)) as answers:
            server.wait(lambda: server.figures()["running"] == 4, "busy")
            server.arm(**fault)
            began = time.monotonic()
            server.wait(lambda: server.http.get("/health").json() == {"status": "dead"}, "dead", seconds)
            unready = time.monotonic() - began
            live = server.live()
        told = time.monotonic() - began
        assert not any(answer.ok for answer in answers)
        one_error_each(answers)
        assert any(reason in (answer.error or "") for answer in answers), answers[0]
        code = server.exit_code()
        assert live and code == EXIT_DEAD and told < seconds + 1, (live, code, told)
        return f"/health 503 after {unready:.1f} s, /live 200; all 10 told once by {told:.1f} s; exit code {code}"

    return run


_DEAD = "every waiter gets one error within 1 s, /health 503 while /live 200, exit code not 0"
for _name, _expected, _faults, _seconds, _reason in (
    ("step thread dies", _DEAD, {"engine__thread": "die"}, 1.0, "its thread ended"),
    ("step thread dies in a step", _DEAD, {"step__verify": "die"}, 1.0, "its thread ended"),
    ("forward always raises", _DEAD, {"step__verify": "raise:RuntimeError"}, 1.0, "The engine"),
    (
        "forward hangs (--step-timeout 1)",
        "the same, 1 s after the deadline",
        {"step__verify": "hang"},
        2.0,
        "not ended",
    ),
):
    CASES.append(Case(_name, _expected, _dies(_faults, _seconds, _reason)))


@case("long prompt, slow steps (--step-timeout 1)", "each chunk is life: ready all the time, the prompt is served")
def _long_prefill(bench: Bench) -> str:
    server = bench.start(engine={"step_timeout": 1.0, "max_num_batched_tokens": 80})
    server.arm(step__plan="sleep:0.3")
    readings = []
    with server.asking([body(1, 2, prompt=[5] * 900)]) as answers:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            readings.append(server.ready())
            time.sleep(0.05)
    assert answers[0].ok and all(readings), (answers, readings)
    assert answers[0].seconds > 3
    return f"prompt served in {answers[0].seconds:.1f} s; {len(readings)} of {len(readings)} probes ready"


@case("process stopped for 3 s (--step-timeout 1)", "no hang is seen; it goes on")
def _stopped(bench: Bench) -> str:
    server = bench.start(engine={"step_timeout": 1.0})
    server.arm(step__plan="sleep:0.02")
    with server.asking(bodies(4, 100)) as answers:
        server.wait(lambda: server.figures()["running"] == 4, "busy")
        server.signal(signal.SIGSTOP)
        time.sleep(3)
        server.signal(signal.SIGCONT)
    assert all(answer.ok for answer in answers), answers
    return f"{fates(answers)}; ready"


@case("SIGKILL and restart", "clients see a cut connection; a new process says the same tokens")
def _kill(bench: Bench) -> str:
    server = bench.start()
    expected = server.ask().tokens
    with server.asking(bodies(4, 900)) as answers:
        server.wait(lambda: server.figures()["running"] >= 3, "busy")
        server.signal(signal.SIGKILL)
    assert not any(answer.ok for answer in answers)
    assert server.exit_code() == -signal.SIGKILL
    assert bench.start().ask().tokens == expected
    return f"{fates(answers)}; after the restart the canary is equal"


# -- shutdown ---------------------------------------------------------------------------------------------------------


def _sigterm(timeout: float, signals: int, finish: bool) -> Callable[[Bench], str]:
    def run(bench: Bench) -> str:
        server = bench.start(settings={"shutdown_timeout": timeout})
        server.arm(step__plan="sleep:0.01")
        with server.asking(bodies(4, 400)) as answers:
            server.wait(lambda: server.figures()["running"] == 4, "busy")
            server.signal(signal.SIGTERM)
            began = time.monotonic()
            server.wait(lambda: server.http.get("/health").json() == {"status": "draining"}, "draining", 2)
            refused = server.ask()
            assert refused.status == 503 and "retry-after" in refused.headers, refused
            for _ in range(signals - 1):
                server.signal(signal.SIGTERM)
        one_error_each(answers)
        assert all(answer.ok == finish for answer in answers), answers
        code = server.exit_code()
        took = time.monotonic() - began
        assert code == 0 and (finish or took < timeout + 2 or signals > 1), (code, took)
        if signals > 1:
            assert took < 3, took
        return f"503 to new ones; {fates(answers)}; exit code {code} after {took:.1f} s"

    return run


CASES.append(Case("SIGTERM, time enough", "all finish, exit code 0", _sigterm(60, 1, True)))
CASES.append(Case("SIGTERM, 1 s given", "the rest get one error each, exit code 0", _sigterm(1, 1, False)))
CASES.append(Case("SIGTERM twice", "at once: one error each, exit code 0", _sigterm(60, 2, False)))


@case("SIGTERM when idle", "exit code 0 at once")
def _sigterm_idle(bench: Bench) -> str:
    server = bench.start()
    began = time.monotonic()
    server.signal(signal.SIGTERM)
    code = server.exit_code()
    assert code == 0 and time.monotonic() - began < 3
    return f"exit code {code} after {time.monotonic() - began:.1f} s"


# -- load -------------------------------------------------------------------------------------------------------------


@case("64 streams, KV pool a quarter of the demand", "all finish, preemptions > 0, outputs equal the solo run")
def _preemption(bench: Bench) -> str:
    asked = [body(seed, 100, stream=True) for seed in range(64)]
    # 64 requests of some 110 tokens, 4 a block: 1,800 blocks.
    server, roomy = bench.start(engine={"num_blocks": 450}), bench.start(engine={"num_blocks": 4096})
    solo = [roomy.ask(each).tokens for each in asked]
    answers = server.ask_all(asked)
    assert all(answer.ok for answer in answers)
    assert [answer.tokens for answer in answers] == solo
    preemptions = server.figures()["preemptions"]
    assert preemptions > 0
    server.wait_idle()
    return f"64 of 64 equal, {preemptions:.0f} preemptions, all blocks back"


@case("burst of 1,000 on a queue of 64", "the refused get 503 + Retry-After, the admitted all finish", slow=True)
def _burst(bench: Bench) -> str:
    server = bench.start(engine={"max_num_seqs": 16, "max_num_queued_reqs": 48})
    answers = server.ask_all([body(seed % 50, 20) for seed in range(1000)])
    done = [answer for answer in answers if answer.ok]
    refused = [answer for answer in answers if answer.status == 503]
    assert len(done) + len(refused) == 1000 and len(done) >= 64, fates(answers)
    assert all("retry-after" in answer.headers for answer in refused)
    server.wait_idle()
    return f"{len(done)} finished, {len(refused)} refused with 503 + Retry-After"


@case("half the clients disconnect", "blocks back within 1 s, the others' tokens are the same")
def _disconnect(bench: Bench) -> str:
    server = bench.start(engine={"max_num_seqs": 8})
    asked = bodies(8)
    expected = [answer.tokens for answer in server.ask_all(asked)]
    with bench.canaries(server), server.asking(asked) as answers:
        leaving = [raw(server, body(seed, 900, stream=bool(seed % 2))) for seed in range(20, 32)]
        server.wait(lambda: server.figures()["in_flight"] >= 12, "busy")
        for index, connection in enumerate(leaving):
            if index % 3 == 0:  # a reset in place of a close
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            connection.close()
        # What is left: those that stay, and the canary.
        took = server.wait(lambda: server.figures()["in_flight"] <= 9, "their places back", 1.0)
    assert [answer.tokens for answer in answers] == expected
    return f"{fates(answers)}, all equal; the places of 12 that left are back after {took * 1000:.0f} ms"


def raw(server: Server, asked: dict[str, Any]) -> socket.socket:
    """A request over a plain socket, nothing read."""
    import json

    content = json.dumps(asked).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)
    )
    return connection


@case("1 MB prompts beside a decoding stream", "/health p99 < 100 ms")
def _big_prompts(bench: Bench) -> str:
    server = bench.start()
    times = []
    big = [CANARY | {"prompt": "a b c " * 170_000, "max_tokens": 1, "truncate_prompt_tokens": 50} for _ in range(6)]
    with bench.canaries(server) as canaries, server.asking(big) as answers:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            began = time.monotonic()
            assert server.ready()
            times.append(time.monotonic() - began)
            time.sleep(0.01)
    p99 = sorted(times)[int(0.99 * len(times))]
    assert p99 < 0.1, f"{p99 * 1000:.0f} ms"
    assert all(answer.status in (200, 400) for answer in answers), answers[0].error
    return f"/health p99 {p99 * 1000:.0f} ms of {len(times)}; {fates(answers)}; {canaries.equal} canaries equal"


@case("30 readers that take nothing, 100 silent sockets", "memory bounded, the readers dropped at the deadline")
def _stalled(bench: Bench) -> str:
    server = bench.start(settings={"stall_timeout": 2.0}, engine={"max_num_seqs": 64})
    before = server.figures()
    with bench.canaries(server) as canaries:
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
        readers = []
        for seed in range(30):
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            reader.connect(("127.0.0.1", server.port))
            _send(reader, body(seed, 600, stream=True, logprobs=20))
            readers.append(reader)
        server.wait(lambda: server.figures()["in_flight"] >= 20, "busy")
        server.wait(lambda: server.figures()["in_flight"] <= 1, "dropped or done", 60)
        grown = (server.figures()["rss"] - before["rss"]) / 2**20
        dropped = sum(not _took_all(reader) for reader in readers)
        for connection in silent:
            connection.settimeout(40)
            assert connection.recv(1) == b"", "a socket without headers is still open"
        for connection in (*silent, *readers):
            connection.close()
    assert grown < 300, f"{grown:.0f} MB"
    return (
        f"{dropped} readers dropped, {30 - dropped} answers fitted the kernel's buffers; all 100 sockets closed; RSS "
        f"+{grown:.0f} MB; {canaries.equal} canaries equal, {canaries.refused} failed"
    )


def _took_all(reader: socket.socket) -> bool:
    """Read what is there: whether the answer is whole."""
    reader.settimeout(5)
    tail = b""
    try:
        while piece := reader.recv(1 << 16):
            tail = (tail + piece)[-64:]
            if b"[DONE]" in tail:
                return True
    except OSError:
        pass
    return False


def _send(connection: socket.socket, asked: dict[str, Any]) -> None:
    import json

    content = json.dumps(asked).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content)
    connection.sendall(head + content)


@case("goodput at 3 x capacity", "at least 80 % of its peak", slow=True)
def _goodput(bench: Bench) -> str:
    # Steps of 20 ms, whatever is in them: the device is the bottleneck, not this machine's other core.
    server = bench.start(engine={"max_num_seqs": 8, "max_num_queued_reqs": 16, "queue_timeout": 2.0})
    server.arm(step__plan="sleep:0.02")
    began = time.monotonic()
    answers = server.ask_all([body(seed, 24) for seed in range(64)][:24])
    capacity = sum(answer.ok for answer in answers) / (time.monotonic() - began)
    found = {}
    for load in (0.5, 0.9, 1.5, 3.0):
        found[load] = open_loop(server, load * capacity, 8.0)
        server.wait_idle(20)
    peak = max(found.values())
    assert found[3.0] >= 0.8 * peak, found
    shown = ", ".join(f"{load:g} x: {value:.1f}/s" for load, value in found.items())
    return f"capacity {capacity:.1f}/s; goodput at {shown}: {100 * found[3.0] / peak:.0f} %"


def open_loop(server: Server, rate: float, seconds: float) -> float:
    """Requests that finished, of those sent at `rate` a second, over the time until the last had its answer."""
    from concurrent.futures import ThreadPoolExecutor

    began = time.monotonic()
    with ThreadPoolExecutor(128) as pool:
        futures = []
        while (late := time.monotonic() - began) < seconds:
            if len(futures) < late * rate:
                futures.append(pool.submit(server.ask, body(len(futures) % 40, 24)))
            else:
                time.sleep(0.002)
        answers = [future.result() for future in futures]
    assert all(answer.ok or answer.status == 503 for answer in answers), fates(answers)
    return sum(answer.ok for answer in answers) / (time.monotonic() - began)


@case("one key floods, another sends one by one", "the other waits its turn, not the flood's end")
def _fair(bench: Bench) -> str:
    server = bench.start(engine={"max_num_seqs": 2}, settings={"api_key": ("flood", "calm")})
    from concurrent.futures import ThreadPoolExecutor

    server.arm(step__plan="sleep:0.01")
    with ThreadPoolExecutor(60) as pool:
        flood = [pool.submit(server.ask, body(seed, 60), key="flood") for seed in range(60)]
        server.wait(lambda: server.figures()["in_flight"] >= 50, "busy")
        calm = [server.ask(body(seed, 60), key="calm") for seed in range(5)]
        left = sum(not future.done() for future in flood)
        answers = [future.result() for future in flood]
    assert all(answer.ok for answer in (*answers, *calm))
    assert left > 25, f"only {left} of the flood were left"
    mean = sum(answer.seconds for answer in calm) / 5
    return f"5 calm requests took {mean:.1f} s each while {left} of 60 of the flood still waited"


# -- the machine ------------------------------------------------------------------------------------------------------


@case("32 file descriptors", "connections beyond wait or fail; afterwards it serves")
def _few_files(bench: Bench) -> str:
    server = bench.start(files=32)
    with bench.canaries(server):
        held = []
        for _ in range(60):
            connection = socket.socket()
            connection.settimeout(1)
            try:
                connection.connect(("127.0.0.1", server.port))
                held.append(connection)
            except OSError:
                connection.close()
        time.sleep(1)
        for connection in held:
            connection.close()
        time.sleep(0.5)
    return f"{len(held)} sockets held, then the canary is equal; {server.figures()['files']:.0f} files open"


@case("log on a full disk", "requests are served")
def _full_disk(bench: Bench) -> str:
    server = bench.start(log="/dev/full", settings={"access_log": True})
    with bench.canaries(server) as canaries:
        server.arm(step__verify="raise:RuntimeError*1")
        time.sleep(0.5)
    return f"{canaries.equal} canaries equal, {canaries.refused} failed with the injected fault"


@case("soak with faults", "canaries equal; at idle no block held; files, threads, RSS flat", slow=True)
def _soak(bench: Bench) -> str:
    from concurrent.futures import ThreadPoolExecutor

    server = bench.start(engine={"max_num_seqs": 8, "num_blocks": 512})
    faults = ("step__verify", "step__sample", "blocks__allocate", "commit__request", "step__draft", "text__push")
    for _ in range(3):  # warm: allocators, caches
        server.ask_all(bodies(16, 60))
    server.wait_idle()
    before, began, number, sent, failed = server.figures(), time.monotonic(), 0, 0, 0
    with bench.canaries(server) as canaries, ThreadPoolExecutor(4) as pool:
        while time.monotonic() < began + bench.soak:
            server.arm(**{faults[number % len(faults)]: "raise:RuntimeError*1@10"})  # once the eight run
            answers = list(pool.map(server.ask, [body(number * 8 + index, 60) for index in range(8)]))
            leaver = raw(server, body(number, 500, stream=True))
            time.sleep(0.05)
            leaver.close()
            one_error_each(answers)
            sent, failed, number = sent + 8, failed + sum(not answer.ok for answer in answers), number + 1
        server.arm()
    after = server.figures()
    grown = {name: after[name] - before[name] for name in ("files", "threads", "rss")}
    megabytes = grown["rss"] / 2**20
    assert after["kv_usage"] == 0 and grown["files"] <= 8 and grown["threads"] <= 8 and megabytes < 100, grown
    return (
        f"{bench.soak:.0f} s, {number} faults, {sent} requests, {failed} failed; {canaries.equal} canaries equal, "
        f"{canaries.refused} failed; KV 0"
        f", files {grown['files']:+.0f}, threads {grown['threads']:+.0f}, RSS {megabytes:+.0f} MB"
    )


# -- the command ------------------------------------------------------------------------------------------------------


@case("damaged checkpoints", "a clear error, exit code not 0, never ready")
def _checkpoints(bench: Bench) -> str:
    import subprocess

    seen = []
    for name, damage in damages().items():
        directory = bench.directory / name
        damage(directory)
        command = [sys_executable(), "-c", "from dspark_server.cli import main; main()", "serve", str(directory)]
        done = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0 and "Traceback" not in done.stderr and " ready: " not in done.stderr, done
        assert "\ndspark-server: " in done.stderr, done.stderr
        seen.append(f"{name}: {done.returncode}")
    return ", ".join(seen)


def sys_executable() -> str:
    import sys

    return sys.executable


def damages() -> dict[str, Callable[[Path], None]]:
    """Ways to damage the target of the fixture."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    from tests.reliability.support import FIXTURE

    def copy(directory: Path) -> Path:
        shutil.copytree(FIXTURE / "target", directory)
        return next(directory.glob("*.safetensors"))

    def truncated(directory: Path) -> None:
        weights = copy(directory)
        weights.write_bytes(weights.read_bytes()[:-1000])

    def oversized(directory: Path) -> None:
        weights = copy(directory)
        weights.write_bytes(weights.read_bytes() + b"\0" * 1000)

    def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
        def damage(directory: Path) -> None:
            weights = copy(directory)
            tensors = load_file(weights)
            name = next(name for name in tensors if "layers.0" in name)
            save_file(tensors | {name: change(tensors[name].clone()).contiguous()}, weights)

        return damage

    return {
        "truncated": truncated,
        "oversized": oversized,
        "NaN weight": changed(lambda tensor: tensor.fill_(float("nan"))),
        "wrong shape": changed(lambda tensor: tensor[:-1]),
    }
