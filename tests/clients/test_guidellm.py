"""guidellm as it comes from PyPI: a short benchmark that must complete without an error."""

import json
from pathlib import Path

import pytest

from .conftest import Served, installed, run


@pytest.mark.parametrize(
    ("path", "profile"),
    [
        ("/v1/completions", "synchronous"),
        ("/v1/completions", "concurrent,streams=3"),
        ("/v1/chat/completions", "constant,rate=2"),
    ],
)
def test_benchmark(served: Served, tmp_path: Path, path: str, profile: str) -> None:
    before = served.counter("vllm:generation_tokens_total")
    command = [installed("guidellm", "guidellm"), "run", "--disable-progress"]
    command += ["--backend", f"kind=openai_http,target={served.url},request_format={path}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={served.directory}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=12"]
    command += ["--profile", f"kind={profile}", "--constraint", "kind=max_requests,count=9"]
    command += ["--output", f"kind=json,path={tmp_path / 'report.json'}"]
    run(command, tmp_path)
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert [len(requests[kind]) for kind in ("successful", "errored", "incomplete")] == [9, 0, 0]
    for request in requests["successful"]:
        assert request["output_tokens"] == 12
        assert request["prompt_tokens"] == 24 or (path != "/v1/completions" and request["prompt_tokens"] > 24)
        assert 0 < request["time_to_first_token_ms"] <= request["request_latency"] * 1000
    # Before the benchmark it sends a request of its own to see that the server works.
    assert served.counter("vllm:generation_tokens_total") - before >= 9 * 12
