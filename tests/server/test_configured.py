"""`dspark-server serve` with a file, the environment and flags, over a real socket, with a tiny model."""

import signal
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from dspark_server.errors import ConfigError

from ..api.fake_engine import build_tokenizer
from ..engine.support import tiny_core
from ..processes import CommandLine

FIXTURE = Path(__file__).parents[1] / "fixtures" / "dspark_qwen3_vanilla"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer apart from its model: the fixture has none."""
    directory = tmp_path / "tokenizer"
    build_tokenizer().save_pretrained(directory)
    return directory


def test_file_environment_and_flags_reach_the_server(tokenizer: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = tmp_path / "serve.yaml"
    file.write_text(f"""
        model: {FIXTURE / "target"}
        tokenizer: {tokenizer}
        served-model-name: not-this
        max-model-len: 100
        kv-cache-memory-bytes: 8000000
        api-key-file: {tmp_path / "keys"}
        access-log: true
        disable-access-log-for-endpoints: [/health]
        speculative-config: {{method: dspark, model: {FIXTURE / "draft"}, selection: fixed}}
    """)
    (tmp_path / "keys").write_text("the-key-of-the-file\n")
    environment = {"DSPARK_SERVED_MODEL_NAME": "tiny", "DSPARK_PORT": "1", "DSPARK_LOG_LEVEL": "info"}
    log = tmp_path / "log"
    command = ["serve", "--config", str(file), "--port", str(port), "--max-model-len", "64"]
    process = CommandLine(command, log, **environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            wait_until_ready(http, process, log)
            assert http.get("/v1/models").status_code == 401
            http.headers["Authorization"] = "Bearer the-key-of-the-file"
            [card] = http.get("/v1/models").json()["data"]
            assert (card["id"], card["max_model_len"]) == ("tiny", 64)
            body: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "temperature": 0}
            body["ignore_eos"] = True
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"] == answer.json()["usage"] | {"prompt_tokens": 3, "completion_tokens": 12}
            metrics = http.get("/metrics").text.splitlines()
            [drafts] = [line for line in metrics if line.startswith("vllm:spec_decode_num_drafts_total{")]
            assert float(drafts.split()[-1]) > 0  # the drafter of the file is at work
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    written = log.read_text()
    assert "settings: model=" in written
    assert "api-key-file=" in written
    assert "the-key-of-the-file" not in written
    assert "POST /v1/completions" in written
    assert "GET /health" not in written


def wait_until_ready(http: httpx.Client, process: CommandLine, log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            http.get("/health").raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.05)
    raise AssertionError(log.read_text())


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<token-{index}>" for index in range(512)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has 769 tokens, but the model knows 512: it belongs to another model"):
        tiny_core(drafter=False, tokenizer=str(tmp_path))
