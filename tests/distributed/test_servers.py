"""`dspark-server serve` on two ranks over real sockets: what it answers, and how it ends when a rank does."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dspark_server.cli.ranks import EXIT_DEAD

from ..engine.support import FIXTURES, greedy, prompts
from ..processes import CommandLine
from .support import one_rank, tiny_config, tokenizer

PAIR = FIXTURES / "dspark_qwen3_vanilla"
STEP_TIMEOUT = 3  # seconds
ENDING = 60  # seconds for what takes one: interpreters end slowly on a busy machine
PROMPT = prompts(1)[0]
CANARY = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
LONG = CANARY | {"max_tokens": 900, "stream": True}


@pytest.fixture(scope="module")
def expected() -> list[int]:
    return one_rank(tiny_config(drafter=False)).generate([PROMPT], greedy(24))[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Served:
    """A server under test: the process that was started, and all ranks by what /proc says."""

    def __init__(
        self, launcher: list[str], directory: Path, port: int, log: Path, *, fork_ranks: bool, **variables: str
    ) -> None:
        self.log, self.port = log, port
        options = ["--tokenizer", str(directory), "--kv-cache-memory-bytes", "8000000", "--port", str(port)]
        options += ["--step-timeout", str(STEP_TIMEOUT), "--shutdown-timeout", "60"]
        drafter = f'{{"method": "dspark", "model": "{PAIR / "draft"}", "selection": "fixed"}}'
        arguments = ["serve", str(PAIR / "target"), *options, "--speculative-config", drafter]
        surroundings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | variables
        self.forked: dict[int, int] = {}  # rank and process id, where no command line says them
        self.process: CommandLine | subprocess.Popen[bytes]
        if launcher:
            with log.open("ab") as output:
                command = [sys.executable, *launcher, "-m", "dspark_server", *arguments]
                self.process = subprocess.Popen(command, env=os.environ | surroundings, stdout=output, stderr=output)
        else:
            self.process = CommandLine(arguments, log, fork_ranks=fork_ranks, **surroundings)
            self.forked = {int(variables.get("NODE_RANK", "0")): self.process.pid}
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def ready(self) -> None:
        """Wait until it is."""
        end = time.monotonic() + 200
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if self.http.get("/health").status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def loading(self) -> None:
        """Wait until it answers, which it must do before it is ready."""
        end = time.monotonic() + 100
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                answer = self.http.get("/health")
                assert (answer.status_code, answer.json()) == (503, {"status": "loading"})
                return
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def ranks(self) -> dict[int, int]:
        """Process ids by rank, of all that serve at this port."""
        found = {} if self.process.poll() is not None else dict(self.forked)
        for file in self.log.parent.glob(f"{self.log.name}.rank*"):
            found[int(file.suffix.removeprefix(".rank"))] = int(file.read_text())
        found = {rank: pid for rank, pid in found.items() if running(pid)}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().split(b"\0")
                ours = str(self.port).encode() in command and b"torch.distributed.run" not in command
                if ours and running(int(entry.name)):
                    variables = dict(v.partition(b"=")[::2] for v in (entry / "environ").read_bytes().split(b"\0"))
                    found[int(variables.get(b"RANK", variables.get(b"NODE_RANK", b"0")))] = int(entry.name)
        return found

    def gone(self, seconds: float) -> float:
        """Wait until no rank is left; the seconds it took."""
        began = time.monotonic()
        while self.ranks():
            assert time.monotonic() < began + seconds, f"left: {self.ranks()}\n{self.log.read_text()}"
            time.sleep(0.05)
        return time.monotonic() - began

    def tokens(self) -> Any:
        answer = self.http.post("/v1/completions", json=CANARY).json()
        return answer["choices"][0]["token_ids"]

    @contextlib.contextmanager
    def streaming(self, body: dict[str, Any]) -> Iterator[list[str]]:
        """A request that runs while the block does, as the lines of its answer."""
        lines: list[str] = []
        begun = threading.Event()

        def read() -> None:
            with (
                contextlib.suppress(httpx.TransportError),
                self.http.stream("POST", "/v1/completions", json=body) as response,
            ):
                for line in response.iter_lines():
                    lines.append(line)
                    begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(60)
        yield lines
        reader.join(60)


@contextlib.contextmanager
def served(tmp_path: Path, *launcher: str, fork_ranks: bool = True, **variables: str) -> Iterator[Served]:
    directory, log = tokenizer(tmp_path / "tokenizer"), tmp_path / "log"
    server = Served([*launcher], directory, free_port(), log, fork_ranks=fork_ranks, **variables)
    try:
        yield server
    finally:
        for pid in [server.process.pid, *server.ranks().values()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.process.wait()
        server.http.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Served]:
    """Two ranks that the server itself starts."""
    with served(tmp_path, DSPARK_TENSOR_PARALLEL_SIZE="2") as server:
        server.ready()
        yield server


def dies(server: Served) -> None:
    """Readiness says so, whoever comes is told, and then the process ends."""
    end = time.monotonic() + STEP_TIMEOUT + 10
    while server.http.get("/health").status_code == 200:
        assert time.monotonic() < end
        time.sleep(0.02)
    answer = server.http.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "dead")
    assert server.http.post("/v1/completions", json=CANARY).status_code == 503
    assert server.process.wait(10) == EXIT_DEAD
    server.gone(2)


def test_two_ranks_answer_as_one_and_end_together(two: Served, expected: list[int]) -> None:
    assert two.ranks().keys() == {0, 1}
    assert two.tokens() == expected
    assert two.http.get("/version").json()["backend"].endswith(", 2 ranks")
    with two.streaming(CANARY | {"stream": True, "max_tokens": 20}) as lines:
        two.process.send_signal(signal.SIGTERM)
    assert not any('"error"' in line for line in lines), "what runs may finish"
    assert two.process.wait(ENDING) == 0
    two.gone(0)


def test_a_killed_rank_ends_an_idle_server(two: Served) -> None:
    began = time.monotonic()
    os.kill(two.ranks()[1], signal.SIGKILL)
    dies(two)
    assert time.monotonic() - began < STEP_TIMEOUT, "nobody waited for a time to pass"
    assert "rank 1 ended by SIGKILL" in two.log.read_text()


def test_a_rank_that_hangs_ends_the_server(two: Served) -> None:
    with two.streaming(LONG) as lines:
        os.kill(two.ranks()[1], signal.SIGSTOP)
    assert sum('"error"' in line for line in lines) == 1
    dies(two)
    two.gone(1)  # a stopped process takes no other signal, but it is killed
    assert f"a step has not ended for {STEP_TIMEOUT} s" in two.log.read_text()


def test_nothing_is_left_of_a_killed_rank_0(tmp_path: Path) -> None:
    """Its rank 1 is a true child: a command of its own, that reads the end of its stdin."""
    with served(tmp_path, fork_ranks=False, DSPARK_TENSOR_PARALLEL_SIZE="2") as two:
        two.ready()
        assert two.ranks().keys() == {0, 1}
        with two.streaming(LONG):
            two.process.kill()
            two.process.wait()
            two.gone(5)


def test_ranks_that_torchrun_made(tmp_path: Path, expected: list[int]) -> None:
    """--tensor-parallel-size goes without saying there."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    with served(tmp_path, *torchrun) as server:
        server.ready()
        assert server.ranks().keys() == {0, 1}
        assert server.tokens() == expected
        server.process.send_signal(signal.SIGTERM)
        server.gone(ENDING)
        assert "Application shutdown complete" in server.log.read_text()
        server.process.wait(ENDING)


def node(number: int, port: int) -> dict[str, str]:
    """The environment of one of two nodes."""
    variables = {"NNODES": "2", "NODE_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"DSPARK_TENSOR_PARALLEL_SIZE": "2", **variables}


def test_one_rank_on_each_of_two_nodes(tmp_path: Path, expected: list[int]) -> None:
    """Its leader answers before the other node is there."""
    port = free_port()
    with served(tmp_path, **node(0, port)) as server:
        server.loading()
        assert server.http.get("/live").status_code == 200
        answer = server.http.post("/v1/completions", json=CANARY)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        with served(tmp_path, **node(1, port)) as other:
            server.ready()
            assert server.tokens() == expected
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(ENDING) == 0
            assert other.process.wait(ENDING) == 0


def test_a_server_whose_other_node_does_not_come_ends_when_told(tmp_path: Path) -> None:
    with served(tmp_path, **node(0, free_port())) as server:
        server.loading()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(ENDING) == 0
        assert "Traceback" not in server.log.read_text()
