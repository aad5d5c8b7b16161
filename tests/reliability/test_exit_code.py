"""`dspark-server serve` itself, failpoints armed by the environment: what it exits with when the engine is dead."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from ..api.fake_engine import build_tokenizer
from .support import EXIT_DEAD, FIXTURE

COMMAND = (sys.executable, "-c", "from dspark_server.cli import main; main()", "serve", str(FIXTURE / "target"))


@pytest.mark.parametrize("fault", ["engine.thread=die@3", "step.verify=hang@3", "step.verify=raise:RuntimeError"])
def test_a_dead_engine_ends_the_process(fault: str, tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--kv-cache-memory-bytes", "8000000", "--log-format", "json"]
    command = [*COMMAND, *options, "--port", str(port), "--step-timeout", "1"]
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(command, env=os.environ | {"DSPARK_FAILPOINTS": fault}, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            deadline = time.monotonic() + 60
            while True:
                try:
                    http.get("/health").raise_for_status()
                    break
                except httpx.HTTPError:
                    assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                    time.sleep(0.05)
            for _ in range(3):
                answer = http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 50, "ignore_eos": True})
                assert answer.status_code in (500, 503)
            assert http.get("/live").status_code == 200
        assert process.wait(10) == EXIT_DEAD
    finally:
        process.kill()
        process.wait()
        log.close()
    written = (tmp_path / "log").read_text()
    assert "failpoints are armed" in written
    assert '"level":"critical"' in written
