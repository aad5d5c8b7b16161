"""`dspark-server serve` while its model loads: a failpoint makes that last."""

import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import pytest

from dspark_server.engine.core import load_tokenizer

from ..api.fake_engine import build_tokenizer
from ..processes import CommandLine, processes

TARGET = Path(__file__).parents[1] / "fixtures" / "dspark_qwen3_vanilla" / "target"


class Serve:
    """One process, and its log."""

    def __init__(self, directory: Path, model: Path, *, port: int | None = None, fault: str = "") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = port or probe.getsockname()[1]
        build_tokenizer().save_pretrained(directory / "tokenizer")
        command = ["serve", str(model), "--tokenizer", str(directory / "tokenizer"), "--port", str(self.port)]
        command += ["--kv-cache-memory-bytes", "8000000", "--speculative-config", '{"method": "none"}']
        self.log = directory / "log"
        self.process = CommandLine(command, self.log, DSPARK_FAILPOINTS=fault)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=10)

    def wait(self, path: str, status: int) -> None:
        """Until a path answers with this status."""
        deadline = time.monotonic() + 60
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            try:
                if self.http.get(path).status_code == status:
                    return
            except httpx.TransportError:
                time.sleep(0.05)


@contextmanager
def serve(*arguments: object, **options: object) -> Iterator[Serve]:
    running = Serve(*arguments, **options)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
        running.http.close()


def test_it_answers_while_it_loads(tmp_path: Path) -> None:
    with serve(tmp_path, TARGET, fault="engine.load=sleep:1.5") as running:
        running.wait("/live", 200)
        health = running.http.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        refused = running.http.post("/v1/completions", json={"prompt": "abc"})
        assert refused.status_code == 503 and "still loading" in refused.json()["error"]["message"]
        running.wait("/health", 200)
        done = running.http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2, "ignore_eos": True})
        assert done.json()["usage"]["completion_tokens"] == 2
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) == 0
        log = running.log.read_text()
        assert log.index("Uvicorn running") < log.index("loading ") < log.index(" ready: ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_ends_it_at_once(number: signal.Signals, tmp_path: Path) -> None:
    with serve(tmp_path, TARGET, fault="engine.load=hang") as running:
        running.wait("/health", 503)
        sent = time.monotonic()
        running.process.send_signal(number)
        assert running.process.wait(10) == 0
        assert time.monotonic() - sent < 5
        assert "Traceback" not in running.log.read_text()


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with serve(tmp_path, tmp_path / "model") as running:
        assert running.process.wait(60) == 1
        log = running.log.read_text()
        assert "\ndspark-server: " in log and "Traceback" not in log and " ready: " not in log


def test_a_port_in_use_is_known_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serve(tmp_path, TARGET, port=port, fault="engine.load=hang") as running:
            assert running.process.wait(60) == 1
            log = running.log.read_text()
            assert (
                "address already in use" in log
                and "choose another with" in log
                and "Traceback" not in log
                and "loading " not in log
            )


def look(directory: str, answer: Connection) -> None:
    load_tokenizer(Path(directory))
    answer.send("torch._dynamo" in sys.modules)


def test_a_tokenizer_is_read_without_torchs_compiler(tmp_path: Path) -> None:
    """Seconds of every start."""
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((TARGET / "config.json").read_text())
    ours, theirs = processes.Pipe()
    process = processes.Process(target=look, args=(str(tmp_path), theirs))
    process.start()
    process.join(60)
    assert ours.poll(0) and ours.recv() is False
