"""Clients that leave, stall, or send too much."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.reliability.cases.bench import Bench, case, fates
from tests.reliability.support import CANARY, Answer, Server, bodies, body, raw, reset, send


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
                reset(connection)
            connection.close()
        # What is left: those that stay, and the canary.
        took = server.wait(lambda: server.figures()["in_flight"] <= 9, "their places back", 1.0)
    assert [answer.tokens for answer in answers] == expected
    return f"{fates(answers)}, all equal; the places of 12 that left are back after {took * 1000:.0f} ms"


@case("half-close in mid-stream", "it counts as leaving: places back within 1 s, the others' tokens are the same")
def _half_close(bench: Bench) -> str:
    server = bench.start(engine={"max_num_seqs": 8})
    with bench.canaries(server) as canaries:
        leaving = [raw(server, body(seed, 900, stream=bool(seed % 2))) for seed in range(12)]
        server.wait(lambda: server.figures()["in_flight"] >= 12, "busy")
        for connection in leaving:
            connection.shutdown(socket.SHUT_WR)
        took = server.wait(lambda: server.figures()["in_flight"] <= 1, "their places back", 1.0)
        for connection in leaving:
            connection.settimeout(10)
            while connection.recv(1 << 16):  # what had been sent before, then the end
                pass
            connection.close()
    return (
        f"the places of 12 are back after {took * 1000:.0f} ms, each connection closed; {canaries.equal} canaries equal"
    )


@case("clients that leave, one after another", "blocks at baseline behind each", slow=True)
def _leavers(bench: Bench) -> str:
    server = bench.start(engine={"max_num_seqs": 8})
    count = 1000
    with bench.canaries(server) as canaries:
        for seed in range(count):
            connection = raw(server, body(seed, 500, stream=bool(seed % 2), n=1 + seed % 3, temperature=0.5))
            time.sleep(0.0007 * (seed % 20))  # before it is read, queued, in prefill, in mid-stream
            if seed % 2:
                reset(connection)
            connection.close()
            if seed % 50 == 49:
                server.wait(lambda: server.figures()["in_flight"] <= 1, "their places back", 2.0)
    server.wait_idle()
    return f"{count} in a row, no block held behind them; {canaries.equal} canaries equal, {canaries.refused} refused"


@case(
    "1 MB prompts beside a decoding stream",
    "event loop's lag p99 < 50 ms, /health p99 < 100 ms, or 3 x without them where others keep us waiting",
)
def _big_prompts(bench: Bench) -> str:
    server = bench.start()
    big = CANARY | {"prompt": "a b c " * 170_000, "max_tokens": 1, "truncate_prompt_tokens": 50}
    with bench.canaries(server) as canaries, ThreadPoolExecutor(12) as pool:
        quiet, _ = _health(server)
        quiet_lag = server.figures()["lag"]
        asking = [pool.submit(_later, number / 4, lambda: server.ask(big)) for number in range(12)]  # four a second
        p99, count = _health(server)
        lag = server.figures()["lag"]  # of the same three seconds
        answers = [each.result() for each in asking]
    assert p99 < max(0.1, 3 * quiet), f"{p99 * 1000:.0f} ms, {quiet * 1000:.0f} ms without"
    assert lag < max(0.05, 3 * quiet_lag), f"{lag * 1000:.0f} ms, {quiet_lag * 1000:.0f} ms without"
    assert all(answer.status in (200, 400) for answer in answers), answers[0].error
    return (
        f"lag p99 {lag * 1000:.0f} ms ({quiet_lag * 1000:.0f} ms without), /health p99 {p99 * 1000:.0f} ms of {count} "
        f"({quiet * 1000:.0f} ms without); {fates(answers)}; {canaries.equal} canaries equal"
    )


def _later(seconds: float, ask: Callable[[], Answer]) -> Answer:
    time.sleep(seconds)
    return ask()


def _health(server: Server) -> tuple[float, int]:
    """p99 of /health in seconds, and how often it was asked in three seconds."""
    times, end = [], time.monotonic() + 3
    while time.monotonic() < end:
        began = time.monotonic()
        assert server.ready()
        times.append(time.monotonic() - began)
        time.sleep(0.01)
    return sorted(times)[int(0.99 * len(times))], len(times)


@case(
    "50 readers at 1 B/s, 200 sockets with slow headers", "memory bounded, dropped at the deadline, others unaffected"
)
def _stalled(bench: Bench) -> str:
    server = bench.start(settings={"stall_timeout": 2.0}, engine={"max_num_seqs": 64})
    before = server.figures()
    with bench.canaries(server) as canaries:
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
        for connection in silent:
            connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        readers = []
        for seed in range(50):
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            reader.connect(("127.0.0.1", server.port))
            send(reader, body(seed, 600, stream=True, logprobs=20))
            readers.append(reader)
        over = threading.Event()
        drip = threading.Thread(target=_drip, args=(silent, readers, over))
        drip.start()
        try:
            server.wait(lambda: server.figures()["in_flight"] >= 20, "busy")
            server.wait(lambda: server.figures()["in_flight"] <= 1, "dropped or done", 400)
            grown = (server.figures()["rss"] - before["rss"]) / 2**20
            server.wait(lambda: server.figures()["files"] <= before["files"] + 70, "silent sockets dropped", 90)
        finally:
            over.set()
            drip.join()
        dropped = sum(not _took_all(reader) for reader in readers)
        for connection in (*silent, *readers):
            connection.close()
    assert grown < 300 and dropped > 10, f"{grown:.0f} MB, {dropped} dropped"
    return (
        f"{dropped} readers dropped, {50 - dropped} answers fitted the kernel's buffers; all 200 sockets closed; RSS "
        f"+{grown:.0f} MB; {canaries.equal} canaries equal, {canaries.refused} failed"
    )


def _drip(silent: list[socket.socket], readers: list[socket.socket], over: threading.Event) -> None:
    """A byte a second: sent of a header that never ends, taken of an answer."""
    for reader in readers:
        reader.settimeout(0.001)
    while not over.wait(1.0):
        for connection in silent:
            with contextlib.suppress(OSError):
                connection.send(b"a")
        for reader in readers:
            with contextlib.suppress(OSError):
                reader.recv(1)


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
