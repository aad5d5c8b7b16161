"""`dspark-server serve` with real weights, over a real socket, with the openai package."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from dspark_server.engine.core import load_tokenizer
from dspark_server.models.hub import resolve_model
from loadtest import fields, survival

MODEL = "SmolLM2-135M-Instruct"
FILE = Path(__file__).parents[2] / "configs" / "serve" / "smollm2-cpu.yaml"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The command as a shell runs it with a file of configs/serve, on a free port. Steps of 32 tokens for 8 requests:
    there is less to measure at the start, and prompts come in pieces."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from dspark_server.cli import main; main()", "serve", "--config", str(FILE)]
    command += ["--port", str(port), "--max-num-batched-tokens", "32", "--max-num-seqs", "8"]
    process = subprocess.Popen(command, env=os.environ)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client() as http:  # one for all: a client reads all certificates when it is made
            for _ in range(1800):  # a busy machine measures its costs slowly
                assert process.poll() is None, "the server ended while starting"
                with suppress(httpx.ConnectError):
                    if http.get(f"{url}/health").status_code == 200:
                        break
                time.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def client(server: tuple[str, object]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_answers_in_english(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0)
    assert answer.choices[0].text.startswith(" Paris")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 4)


def test_the_settings_of_the_file_are_in_force(server: tuple[str, object]) -> None:
    [cache] = re.findall(r"^vllm:cache_config_info\{(.*)\}", httpx.get(f"{server[0]}/metrics").text, re.MULTILINE)
    blocks, size = (int(re.search(rf'\b{name}="(\d+)"', cache)[1]) for name in ("num_gpu_blocks", "block_size"))
    assert blocks * size == pytest.approx(43_000, rel=0.03)  # 1 GiB, half of the default


def test_streams_the_same_text_alone_and_in_company(client: openai.OpenAI) -> None:
    def stream(prompt: str, seed: int | None) -> str:
        chunks = client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=24,
            temperature=0 if seed is None else 1,
            seed=seed,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    prompt = "Once upon a time, in a village by the sea,"
    alone = stream(prompt, None)
    assert len(alone.split()) > 8
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(stream, [prompt] * 4 + ["A list of colours:"] * 4, [None, None, 3, 3, None, 1, 2, 3]))
    assert together[2] == together[3]
    assert together[0] == together[1]
    # bf16 ties aside, company changes nothing: the beginning at least is decided by wide margins.
    assert together[0][:20] == alone[:20]


# In float32 every token of the greedy answer is at least half a logit ahead of the next: no near tie for bf16.
WEEK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How many days are in a week?"}]


def test_chats(client: openai.OpenAI) -> None:
    """Whole, streamed, and as a completion of the prompt that transformers makes of it: the same greedy answer."""
    answer = client.chat.completions.create(model=MODEL, messages=WEEK, temperature=0, seed=1)
    text = answer.choices[0].message.content
    assert text == "A week is approximately 7 days."
    assert answer.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(model=MODEL, messages=WEEK, temperature=0, seed=1) as stream:
        assert stream.get_final_completion().choices[0].message.content == text
    tokenizer = load_tokenizer(resolve_model(MODEL))
    prompt = str(tokenizer.apply_chat_template(WEEK, add_generation_prompt=True, tokenize=False))
    completion = client.completions.create(model=MODEL, prompt=prompt, temperature=0, seed=1, max_tokens=100)
    assert completion.choices[0].text == text
    assert completion.usage is not None and answer.usage is not None
    assert completion.usage.prompt_tokens == answer.usage.prompt_tokens


def test_chats_with_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=WEEK, temperature=0, logprobs=True, top_logprobs=3, max_completion_tokens=8
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    for entry in logprobs.content:
        assert entry.bytes == list(entry.token.encode())
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy: the likeliest
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert entry.logprob >= entry.top_logprobs[1].logprob >= entry.top_logprobs[2].logprob


def test_chats_in_a_form(server: tuple[str, object]) -> None:
    schema = {
        "type": "object",
        "properties": {"days": {"enum": [7, 8]}, "certain": {"type": "boolean"}},
        "required": ["days", "certain"],
        "additionalProperties": False,
    }

    async def ask() -> str | None:
        async with openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
            chunks = await client.chat.completions.create(
                model=MODEL,
                messages=[*WEEK, {"role": "user", "content": "Answer in JSON."}],
                response_format={"type": "json_schema", "json_schema": {"name": "week", "schema": schema}},
                max_completion_tokens=40,
                seed=5,
                stream=True,
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    told = json.loads(asyncio.run(ask()) or "")
    assert told["days"] in (7, 8)
    assert isinstance(told["certain"], bool)


def test_the_metrics_count_and_a_bad_request_harms_nobody(server: tuple[str, object], client: openai.OpenAI) -> None:
    url = server[0]

    def generated() -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total{"))

    before = generated()
    bad = httpx.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": [1 << 40], "max_tokens": 4}, timeout=60)
    assert bad.status_code == 400
    assert set(bad.json()["error"]) == {"message", "type", "param", "code"}
    client.completions.create(
        model=MODEL, prompt="One, two,", max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    assert generated() - before == 8


def test_a_prompt_is_scored_as_lm_eval_asks(server: tuple[str, object]) -> None:
    """Batches of token ids with echo, one token more; what a language-model evaluation reads of the answer."""
    prompts = [[504, 3575, 282, 4649, 314, 7042], [504, 3575, 282, 4649, 314]]
    body = {"model": MODEL, "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    answer = httpx.post(f"{server[0]}/v1/completions", json=body, timeout=60).json()
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(prompt) + 1
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert logprobs["text_offset"][1] == len(logprobs["tokens"][0])
        for own, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
            assert own <= max(top.values())
        assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())  # greedy, so exactly
    alone = httpx.post(
        f"{server[0]}/v1/completions", json=body | {"max_tokens": 0, "prompt": prompts[0]}, timeout=60
    ).json()
    assert alone["usage"]["completion_tokens"] == 0
    assert len(alone["choices"][0]["logprobs"]["tokens"]) == 6


def test_logprobs_do_not_depend_on_speculation(server: tuple[str, object]) -> None:
    body = {"model": MODEL, "prompt": "1, 2, 3, 4, 5, 6,", "logprobs": 3, "max_tokens": 24, "temperature": 0}
    answers = [
        httpx.post(f"{server[0]}/v1/completions", json=body | {"speculation": {"enabled": enabled}}, timeout=60).json()
        for enabled in (True, False)
    ]
    one, other = (answer["choices"][0]["logprobs"] for answer in answers)
    assert one["tokens"] == other["tokens"]
    assert one["token_logprobs"] == pytest.approx(other["token_logprobs"], abs=0.15)  # bfloat16


# Every field has an end: of an integer without a maximum, one sample in fifty at temperature 1 is a hundred digits.
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_have_the_form_asked_for(server: tuple[str, object], temperature: float) -> None:
    def ask(**form: object) -> list[str]:
        body = {"prompt": "Describe a person in JSON:\n", "max_tokens": 120, "n": 4, "temperature": temperature} | form
        answer = httpx.post(f"{server[0]}/v1/completions", json=body, timeout=60).json()
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
        return [choice["text"] for choice in answer["choices"]]

    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    for text in ask(response_format=wanted) + ask(structured_outputs={"json": SCHEMA}):
        person = json.loads(text)
        assert set(person) == {"name", "age"}
        assert isinstance(person["name"], str)
        assert isinstance(person["age"], int)
    assert all(
        text in ("red", "green or blue") for text in ask(structured_outputs={"choice": ["red", "green or blue"]})
    )
    colours = ask(structured_outputs={"choice": ["red", "blue"]}, ignore_eos=True)  # there is nothing to go on with
    assert set(colours) <= {"red", "blue"}
    assert all(re.fullmatch(r"\d{3}-[a-f]{4}", text) for text in ask(structured_outputs={"regex": r"\d{3}-[a-f]{4}"}))
    seeded = ask(structured_outputs={"json": SCHEMA}, seed=3)
    assert seeded == ask(structured_outputs={"json": SCHEMA}, seed=3, speculation={"enabled": False})
    contradiction = {"prompt": "x", "allowed_token_ids": [28], "bad_words": [","]}
    assert httpx.post(f"{server[0]}/v1/completions", json=contradiction, timeout=60).status_code == 400
    bad = httpx.post(f"{server[0]}/v1/completions", json={"prompt": "x", "structured_outputs": {"regex": "("}})
    assert bad.status_code == 400
    assert bad.json()["error"]["param"] == "structured_outputs"


def test_rules_hold_and_the_best_of_several_is_returned(server: tuple[str, object]) -> None:
    def ask(**fields: object) -> dict[str, Any]:
        body = {"prompt": "The sea, the sea, the", "max_tokens": 30, "temperature": 1.0, "ignore_eos": True} | fields
        answer: dict[str, Any] = httpx.post(f"{server[0]}/v1/completions", json=body, timeout=60).json()
        return answer

    def spelled(text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        tokens: list[int] = httpx.post(f"{server[0]}/tokenize", json=body, timeout=60).json()["tokens"]
        return tokens

    # By tokens, not by text: " seas" is another token, and may be said.
    banned = [spelled(text) for text in ("sea", " sea", "the", " the")]
    assert all(len(tokens) == 1 for tokens in banned)
    choices = ask(n=6, bad_words=["sea", "the"], return_token_ids=True)["choices"]
    assert all(tokens[0] not in choice["token_ids"] for choice in choices for tokens in banned)
    assert ask(logit_bias={"28": 100}, max_tokens=3, temperature=0)["choices"][0]["text"] == ",,,"
    allowed = ask(allowed_token_ids=[28, 30], n=3, logprobs=0)["choices"]
    assert {token for choice in allowed for token in choice["logprobs"]["tokens"]} <= {",", "."}
    plain = ask(temperature=0, return_token_ids=True)["choices"][0]["token_ids"]
    penalized = ask(temperature=0, frequency_penalty=2.0, return_token_ids=True)["choices"][0]["token_ids"]
    assert len(set(penalized)) > len(set(plain))
    best = ask(n=2, best_of=6, logprobs=0)
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == 180  # all that was generated
    means = [sum(choice["logprobs"]["token_logprobs"]) for choice in best["choices"]]
    assert means == sorted(means, reverse=True)


def test_the_dashboard_shows_a_chat_prompt_block_by_block(server: tuple[str, object], client: openai.OpenAI) -> None:
    url = server[0]
    question = "List the first ten square numbers, one a line."
    messages: Any = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=64, temperature=0)
    expected = answer.choices[0].message.content
    # A busy machine may have measured that no draft pays.
    assert httpx.post(f"{url}/dashboard/policy", json={"policy": "fixed"}, timeout=60).status_code == 200
    with httpx.stream("GET", f"{url}/dashboard/feed", timeout=60) as feed:
        events = (json.loads(line[6:]) for line in feed.iter_lines() if line.startswith("data: "))
        body = {"feed": next(events)["feed"], "prompt": question, "max_tokens": 64}
        assert httpx.post(f"{url}/dashboard/prompt", json=body, timeout=60).status_code == 200
        told = []
        while not told or told[-1]["finish_reason"] is None:
            state = next(events)
            told += [state["own"]] if state["own"] else []
    text = "".join(text for own in told for text, _ in own["text"])
    assert expected and text[:40] == expected[:40]  # bf16 ties aside, all of it
    assert any(kind == "draft" for own in told for _, kind in own["text"])
    blocks = [block for own in told for block in own["blocks"]]
    assert sum(block["accepted"] for block in blocks) > 0
    assert any(chance > 0 for block in blocks for _, chance in block["draft"])
    assert state["costs"], "the curve"


def test_the_settings_of_the_measurements_are_requests_that_it_takes(server: tuple[str, object]) -> None:
    bodies = [row.body for row in fields.ROWS.values()] + list(survival.SETTINGS.values())
    for body in bodies:
        asked = {"model": MODEL, "prompt": "The capital of", "max_tokens": 2} | body
        answer = httpx.post(f"{server[0]}/v1/completions", json=asked, timeout=60)
        assert answer.status_code == 200, answer.text
    counters = survival.Survival.parse(httpx.get(f"{server[0]}/metrics").text)
    assert len(counters.tenths) == 10


def test_zz_sigterm_finishes_what_runs_and_exits_0(server: tuple[str, subprocess.Popen[bytes]]) -> None:
    url, process = server
    body = {"model": MODEL, "prompt": "Tell me a story.", "max_tokens": 40, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    assert process.wait(30) == 0
