"""`dspark-server serve` with real weights, for clients that others wrote. Run by `make test-clients` alone."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from dspark_server.models.hub import resolve_model

ROOT = Path(__file__).parents[2]
MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Served:
    """A server under test; `directory` has the model's tokenizer."""

    url: str
    model: str
    directory: Path

    def counter(self, name: str) -> float:
        """One counter of /metrics, all its labels together."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """In float32, so that probabilities can be compared with transformers'."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from dspark_server.cli import main; main()", "serve", "--port", str(port)]
    command += ["--dtype", "float32", "--kv-cache-memory-bytes", str(512 << 20)]
    process = subprocess.Popen(command, env=os.environ)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, "the server ended while starting"
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield Served(url, MODEL, resolve_model(MODEL))
    finally:
        process.terminate()
        assert process.wait(60) == 0


def installed(venv: str, program: str) -> str:
    """Path of a client's program in its own environment; skips the test where it is not there."""
    path = ROOT / "build" / "clients" / venv / "bin" / program
    if not path.exists():
        pytest.skip(f"{program} is not installed: `make test-clients` does it")
    return str(path)


def run(command: list[str], directory: Path, *, seconds: float = 1200) -> str:
    """Run a client that may not look anything up on the network; its output. Fails if it does not exit with 0.

    Its imports alone take a minute where other jobs run. What it started ends with it, also when it is given up.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "hf")}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with (directory / "client.log").open("w+") as log:
        process = subprocess.Popen(
            command, cwd=directory, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        output = log.read()
    assert code == 0, output[-6000:]
    return output
