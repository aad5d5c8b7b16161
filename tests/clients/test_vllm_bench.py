"""What `vllm bench serve` sends and how it reads the answers, without vLLM: its backend `openai` on completions.

It takes any chunk with choices as a token's arrival, TPOT from usage.completion_tokens, splits events at blank lines of
whatever the socket gave, and reads acceptance from the speculation counters before and after.
"""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
import pytest

from .conftest import Served

PREFIX = "vllm:spec_decode_num_"


@dataclass
class Outcome:
    """One request as the benchmark counts it; times in seconds."""

    success: bool = False
    error: str = ""
    text: str = ""
    output_tokens: int = 0
    prompt_tokens: int = 0
    ttft: float = 0.0
    gaps: list[float] = field(default_factory=list)
    latency: float = 0.0


def request(served: Served, prompt: str | list[int], tokens: int, **extra: object) -> Outcome:
    """One streamed request."""
    payload = {
        "model": served.model,
        "prompt": prompt,
        "repetition_penalty": 1.0,
        "max_tokens": tokens,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        **extra,
    }
    headers = {"x-request-id": f"bench-{time.monotonic_ns()}", "authorization": "Bearer EMPTY"}
    outcome = Outcome()
    began = newest = time.perf_counter()
    with httpx.stream("POST", f"{served.url}/v1/completions", json=payload, headers=headers, timeout=120) as response:
        if response.status_code != 200:
            outcome.error = response.read().decode()
            return outcome
        assert response.headers["x-request-id"] == headers["x-request-id"]
        buffer = ""
        for piece in response.iter_text():
            buffer += piece
            *events, buffer = buffer.split("\n\n")
            for event in events:
                data = event.strip().removeprefix("data: ")
                if data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if choices := chunk.get("choices"):
                    now = time.perf_counter()
                    if outcome.success:
                        outcome.gaps.append(now - newest)
                    else:
                        outcome.success, outcome.ttft = True, now - began
                    newest = now
                    outcome.text += choices[0].get("text") or ""
                elif usage := chunk.get("usage"):
                    outcome.output_tokens = usage["completion_tokens"]
                    outcome.prompt_tokens = usage["prompt_tokens"]
        assert not buffer.strip()
    outcome.latency = newest - began
    return outcome


def counters(served: Served) -> dict[str, float]:
    """The speculation counters, found as the benchmark finds them: by substring, line by line."""
    found: dict[str, float] = {}
    for line in httpx.get(f"{served.url}/metrics").text.splitlines():
        if not line.startswith(PREFIX) or "_created" in line:
            continue
        position = re.search(r'position="(\d+)"', line)
        name = line.partition("{")[0].removeprefix(PREFIX).removesuffix("_total")
        found[name + (position[1] if position else "")] = found.get(name, 0.0) + float(line.split()[-1])
    return found


def test_a_run(served: Served) -> None:
    """The readiness request, then a batch at a time of random prompts, with speculation's figures around it."""
    assert httpx.get(f"{served.url}/v1/models").json()["data"][0]["id"] == served.model
    assert request(served, "The first request only asks whether the server works.", 8).success
    before = counters(served)
    prompts = [[(7 * number + 13 * place) % 40_000 + 100 for place in range(32)] for number in range(16)]
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda prompt: request(served, prompt, 16), prompts))
    assert [outcome.error for outcome in outcomes] == [""] * 16
    for outcome in outcomes:
        assert (outcome.output_tokens, outcome.prompt_tokens) == (16, 32)
        assert 0 < outcome.ttft <= outcome.latency
        assert sum(outcome.gaps) == pytest.approx(outcome.latency - outcome.ttft)
        assert len(outcome.gaps) < 16
    after = counters(served)
    change = {name: after[name] - before.get(name, 0.0) for name in after}
    assert change["accepted_tokens"] <= change["draft_tokens"]
    positions = [count for name, count in change.items() if name.startswith("accepted_tokens_per_pos")]
    assert sum(positions) == change["accepted_tokens"]


@pytest.mark.parametrize(
    "extra",
    [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 40}, {"min_p": 0.05}, {"ignore_eos": False}],
    ids=str,
)
def test_sampling_options(served: Served, extra: dict[str, object]) -> None:
    outcome = request(served, "A list of colours:", 12, **extra)
    assert outcome.success, outcome.error
    assert 1 <= outcome.output_tokens <= 12
    assert outcome.text
