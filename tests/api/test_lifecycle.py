"""Readiness, capacity, clients that leave or stall, metrics, and shutdown."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from dspark_server.api import ServerSettings
from dspark_server.errors import ConfigError

from .fake_engine import run_child
from .support import Running


def connect(server: Running, body: dict) -> socket.socket:
    """Send a completion request over a plain socket and read nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)), timeout=5)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def alive(connection: socket.socket) -> bool:
    """Ask for /live over an open connection, and return whether the answer was 200."""
    connection.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
    return connection.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.fixture(scope="module", autouse=True)
def quiet(shared_server: Running) -> Iterator[tuple[socket.socket, float]]:
    """A connection with one answer, idle since the first test of this file began, and when that was."""
    host, port = shared_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        assert alive(connection)
        yield connection, time.monotonic()


def test_probes_and_models(server: Running) -> None:
    assert server.http.get("/health").json() == {"status": "ready"}
    assert server.http.get("/live").status_code == 200
    assert server.http.get("/ping").status_code == server.http.post("/ping").status_code == 200
    assert set(server.http.get("/version").json()) == {"version", "backend"}
    models = server.openai.models.list().data
    assert [model.id for model in models] == ["fake"]
    assert server.openai.models.retrieve("fake").max_model_len == 2048
    assert "/v1/completions" in server.http.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize("state", ["draining", "dead"])
def test_not_ready_is_503(own_server: Running, state: str) -> None:
    own_server.engine.state = state
    assert own_server.http.get("/health").status_code == 503
    assert own_server.http.get("/live").status_code == 200
    response = own_server.complete("say x")
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "service_unavailable_error"
    own_server.engine.state = "ready"
    own_server.canary()


@pytest.mark.parametrize("own_server", [{"capacity": 2}], indirect=True)
def test_full_queue(own_server: Running) -> None:
    connections = [connect(own_server, {"prompt": "forever", "max_tokens": 1500, "stream": True}) for _ in range(2)]
    own_server.wait(lambda: own_server.engine.in_flight == 2)
    encoded = own_server.engine.encoded
    response = own_server.complete("say x")
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "no_capacity"
    assert own_server.engine.encoded == encoded  # refused before tokenizing
    with pytest.raises(openai.InternalServerError):
        own_server.openai.completions.create(model="fake", prompt="say x")
    for connection in connections:
        connection.close()
    own_server.wait(lambda: own_server.engine.in_flight == 0)
    own_server.canary()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_is_aborted(server: Running, streaming: bool, reset: bool) -> None:
    aborted = server.engine.aborted
    connection = connect(server, {"prompt": ["forever"] * 2, "max_tokens": 1500, "stream": streaming})
    server.wait(lambda: server.engine.in_flight == 2)
    if streaming:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    connection.close()
    server.wait(lambda: server.engine.in_flight == 0)
    assert server.engine.aborted == aborted + 2
    server.canary()


def test_load_counts_what_is_in_flight(own_server: Running) -> None:
    assert own_server.http.get("/load").json() == {"server_load": 0}
    with connect(own_server, {"prompt": ["forever"] * 3, "max_tokens": 1500}):
        own_server.wait(lambda: own_server.http.get("/load").json() == {"server_load": 3})
    own_server.wait(lambda: own_server.http.get("/load").json() == {"server_load": 0})


def test_openai_client_leaves_in_mid_stream(server: Running) -> None:
    aborted = server.engine.aborted
    with server.openai.completions.create(model="fake", prompt="forever", max_tokens=1500, stream=True) as stream:
        next(iter(stream))
    server.wait(lambda: server.engine.aborted == aborted + 1, seconds=0.5)


STALLING = {"step_seconds": 0.01, "settings": {"stall_timeout": 0.4}}


@pytest.mark.parametrize("own_server", [STALLING], indirect=True)
@pytest.mark.parametrize(("choices", "per_step"), [(8, 5_000), (1, 3_000_000)], ids=["generating", "finished"])
def test_a_reader_that_stalls_is_dropped(own_server: Running, choices: int, per_step: int) -> None:
    """Its tokens are merged while it does not read, and at the deadline everything it holds is freed."""
    engine = own_server.engine
    engine.max_model_len, engine.per_step = 10**9, per_step
    own_server.complete("say x")
    tokens = 1_000_000 if choices > 1 else 3_000_000
    body = {"prompt": "forever", "n": choices, "max_tokens": tokens, "stream": True, "return_token_ids": True}
    with connect(own_server, body):
        own_server.wait(lambda: len(engine.submitted) == 1 + choices)
        own_server.wait(lambda: engine.in_flight == 0)
        assert engine.aborted == (choices if choices > 1 else 0)
        own_server.wait(lambda: len(own_server.server.server_state.connections) <= 1)  # our keep-alive one
    own_server.canary()


def value(samples: dict[str, float], name: str, extra: str = "") -> float:
    found = [
        v for key, v in samples.items() if key.startswith(name + "{") and extra in key and 'model_name="fake"' in key
    ]
    assert len(found) == 1, (name, found)
    return found[0]


def test_metrics_have_vllms_names(own_server: Running) -> None:
    samples = own_server.samples()
    for name in (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
        *("prompt_tokens_total", "generation_tokens_total", "num_preemptions_total"),
        *("prefix_cache_queries_total", "prefix_cache_hits_total"),
        *("spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total"),
        "spec_decode_num_accepted_tokens_total",
    ):
        assert value(samples, "vllm:" + name) == 0
    for position, count in enumerate([3, 1]):
        label = f'position="{position}"'
        assert value(samples, "vllm:spec_decode_num_accepted_tokens_per_pos_total", label) == count
    assert value(samples, "vllm:request_success_total", 'finished_reason="stop"') == 0
    assert value(samples, "vllm:cache_config_info", 'num_gpu_blocks="100"') == 1


def test_metrics_show_what_speculation_decides(own_server: Running) -> None:
    stats = own_server.engine.stats
    stats.drafting.update(drafted=5, copied=2, skipped=1)
    stats.budgets.update({1: 1, 6: 5, 13: 2})
    stats.survival[7].judged, stats.survival[7].predicted, stats.survival[7].survived = 10, 7.4, 6
    stats.seconds["verify"] = 1.5
    stats.verify_seconds = {1: 0.02, 256: 0.5}
    stats.gain.observe(2.0, 3.0)
    stats.step_slowdown, stats.slow_steps = 6.5, True
    samples = own_server.samples()
    for decision, count in (("drafted", 5), ("copied", 2), ("skipped", 1)):
        assert value(samples, "dspark:draft_decisions_total", f'decision="{decision}"') == count
    assert value(samples, "dspark:verification_budget_bucket", 'le="1.0"') == 1
    assert value(samples, "dspark:verification_budget_bucket", 'le="6.0"') == 6
    assert value(samples, "dspark:verification_budget_count") == 8
    assert value(samples, "dspark:verification_budget_sum") == 1 + 30 + 26
    found = [value(samples, f"dspark:survival_{name}_total", 'predicted="0.75"')
             for name in ("judged", "predicted", "survived")]  # fmt: skip
    assert found == [10, 7.4, 6]
    assert value(samples, "dspark:step_seconds_total", 'part="verify"') == 1.5
    assert value(samples, "dspark:verify_seconds", 'tokens="256"') == 0.5
    assert value(samples, "dspark:speedup_estimate") == 1.5
    assert value(samples, "dspark:step_slowdown") == 6.5
    assert value(samples, "dspark:slow_steps") == 1


def test_metrics_count(own_server: Running) -> None:
    own_server.complete("say hello")
    own_server.complete("forever", max_tokens=10, stream=True)
    own_server.complete("say a.b", stop=".")
    own_server.complete("fail 2")
    assert own_server.complete("say x", max_tokens=9999).status_code == 400  # refused: counted nowhere
    samples = own_server.samples()
    assert value(samples, "vllm:request_success_total", 'finished_reason="stop"') == 2
    assert value(samples, "vllm:request_success_total", 'finished_reason="length"') == 1
    assert value(samples, "vllm:request_success_total", 'finished_reason="error"') == 1
    assert value(samples, "vllm:request_success_total", 'finished_reason="abort"') == 0
    assert value(samples, "vllm:generation_tokens_total") == 6 + 10 + 2 + 2
    assert value(samples, "vllm:time_to_first_token_seconds_count") == 4
    assert value(samples, "vllm:inter_token_latency_seconds_count") == 5 + 9 + 1 + 1
    assert value(samples, "vllm:e2e_request_latency_seconds_count") == 4
    for name in ("prefill", "decode", "queue"):
        assert value(samples, f"vllm:request_{name}_time_seconds_count") == 4
    assert value(samples, "vllm:request_time_per_output_token_seconds_count") == 4
    # E2E has what comes before admission too: it begins when the request arrives.
    parts = [value(samples, f"vllm:request_{name}_time_seconds_sum") for name in ("prefill", "decode")]
    assert 0 < parts[0] < value(samples, "vllm:time_to_first_token_seconds_sum")
    assert 16 * 0.002 <= parts[1] < sum(parts) < value(samples, "vllm:e2e_request_latency_seconds_sum")
    assert value(samples, "vllm:request_prompt_tokens_sum") == 9 + 7 + 7 + 6
    assert value(samples, "vllm:request_generation_tokens_sum") == 20
    assert value(samples, "vllm:iteration_tokens_total_count") == 20
    assert value(samples, "vllm:time_to_first_token_seconds_bucket", 'le="+Inf"') == 4
    assert value(own_server.samples(), "vllm:iteration_tokens_total_count") == 20  # drained once


def test_settings_are_checked() -> None:
    for wrong in ({"port": 70000}, {"max_body_bytes": 0}, {"shutdown_timeout": -1.0}, {"stall_timeout": 0.0},
                  {"per_request_spec_decode_metrics": "all"}):  # fmt: skip
        with pytest.raises(ConfigError):
            ServerSettings(**wrong)


processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["dspark_server.api.server"])  # torch and transformers: imported once for all children


class Child:
    """A server in a process of its own."""

    def __init__(self, log: Path, *, shutdown_timeout: float = 5.0, step_seconds: float = 0.002) -> None:
        receiver, sender = processes.Pipe(duplex=False)
        arguments = (sender, str(log), shutdown_timeout, step_seconds)
        self.process = processes.Process(target=run_child, args=arguments)
        self.process.start()
        sender.close()
        self.log = log
        self.answer: httpx.Response | None = None
        with receiver:
            self.http = httpx.Client(base_url=f"http://127.0.0.1:{receiver.recv()}", timeout=20)
        deadline = time.monotonic() + 20
        while self.http.get("/health").status_code == 503:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def terminate(self) -> None:
        """SIGTERM."""
        os.kill(self.process.pid, signal.SIGTERM)

    def stream(self, prompt: str, **fields: object) -> threading.Thread:
        """Read a stream to its end in the background; returns once it has begun."""
        begun = threading.Event()

        def read() -> None:
            body = {"prompt": prompt, "stream": True, **fields}
            with self.http.stream("POST", "/v1/completions", json=body) as response:
                begun.set()
                response.read()
                self.answer = response

        thread = threading.Thread(target=read)
        thread.start()
        assert begun.wait(10)
        return thread

    def end(self) -> None:
        """It ends by itself, with exit code 0 and nothing alarming in its log."""
        self.process.join(10)
        log = self.log.read_text()
        assert self.process.exitcode == 0, log
        assert "Traceback" not in log
        assert "ERROR" not in log


@pytest.fixture
def start_child(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    started: list[Child] = []

    def start(**options: float) -> Child:
        started.append(Child(tmp_path / "log", **options))
        return started[-1]

    yield start
    for child in started:
        child.http.close()
        if child.process.is_alive():
            child.process.kill()
        child.process.join()
        child.process.close()


def test_sigterm_lets_running_requests_finish(start_child: Callable[..., Child]) -> None:
    child = start_child(shutdown_timeout=10, step_seconds=0.005)
    thread = child.stream("forever", max_tokens=200)
    child.terminate()
    deadline = time.monotonic() + 2
    while (health := child.http.get("/health")).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert health.json() == {"status": "draining"}
    refused = child.http.post("/v1/completions", json={"prompt": "say x"})
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    assert child.http.get("/live").status_code == 200
    thread.join(10)
    assert child.answer.text.endswith("data: [DONE]\n\n")
    assert child.answer.text.count('"text":') == 200
    assert "error" not in child.answer.text
    child.end()


@pytest.mark.parametrize("twice", [False, True])
def test_sigterm_ends_the_rest_with_one_error(start_child: Callable[..., Child], twice: bool) -> None:
    child = start_child(shutdown_timeout=30 if twice else 0.3, step_seconds=0.01)
    thread = child.stream("forever", max_tokens=2000)
    child.terminate()
    if twice:
        time.sleep(0.3)
        child.terminate()
    thread.join(5)
    events = child.answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    error = json.loads(events[-3][6:])["error"]
    assert "shutting down" in error["message"]
    assert child.answer.text.count('"error"') == 1
    child.end()


def test_sigterm_when_idle(start_child: Callable[..., Child]) -> None:
    child = start_child()
    child.terminate()
    child.end()


def test_an_idle_connection_outlives_those_of_its_clients(quiet: tuple[socket.socket, float]) -> None:
    """httpx drops one after 5 s: were the server as quick, it would close some under a request on its way."""
    connection, begun = quiet
    time.sleep(max(0.0, begun + 6 - time.monotonic()))
    assert alive(connection)
