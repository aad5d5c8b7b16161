"""The client against real sockets: what it counts, what it times, what it calls an error."""

import asyncio
import time
from collections import Counter

import pytest

from loadtest.client import RequestOptions, closed_loop, connect, open_loop, send, steady_load
from loadtest.report import summarize
from loadtest.workload import poisson_arrivals

from .fake_server import FakeApp, serving


@pytest.fixture
def app():
    return FakeApp()


@pytest.fixture
def url(app):
    with serving(app) as address:
        yield address


def ask(url, *prompts, **options):
    """One request after the other; their outcomes."""

    async def run():
        async with connect(url, options.get("api_key")) as client:
            chosen = RequestOptions(model="fake", **{"max_tokens": 8, **options})
            return [await send(client, chosen, prompt, index) for index, prompt in enumerate(prompts)]

    return asyncio.run(run())


def test_tokens_are_those_of_usage(url):
    (outcome,) = ask(url, "ok", max_tokens=7)
    assert outcome.error is None
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.counted) == (7, 7, True)
    assert len(outcome.gaps) == 3  # four chunks
    assert 0 < outcome.ttft < outcome.e2e
    assert sum(outcome.gaps) == pytest.approx(outcome.e2e - outcome.ttft)
    assert outcome.tpot == pytest.approx((outcome.e2e - outcome.ttft) / 6)


def test_without_usage_chunks_are_counted(url):
    (outcome,) = ask(url, "plain", max_tokens=8)
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.counted) == (0, 4, False)


def test_a_single_token_has_no_tpot(url):
    (outcome,) = ask(url, "ok", max_tokens=1)
    assert outcome.output_tokens == 1
    assert outcome.tpot is None
    assert outcome.user_rate is None


def test_a_later_first_chunk_is_a_larger_ttft(url):
    quick, slow = ask(url, "ok", "slow")
    assert quick.ttft < slow.ttft
    assert slow.ttft >= 0.2


def test_a_first_chunk_without_text_is_no_first_token(url):
    (outcome,) = ask(url, "blank")
    assert outcome.ttft >= 0.04
    assert len(outcome.gaps) == 3


@pytest.mark.parametrize(
    ("prompt", "error", "detail"),
    [
        ("busy", "http_503", "The queue is full."),
        ("drop", "disconnect", ""),
        ("fail", "stream_error", "The engine failed."),
        ("truncate", "truncated", "[DONE]"),
        ("garbage", "malformed", "no json"),
        ("empty", "empty", ""),
    ],
)
def test_errors_by_class(url, prompt, error, detail):
    (outcome,) = ask(url, prompt)
    assert outcome.error == error
    assert detail in outcome.detail


def test_a_request_that_takes_too_long_is_a_timeout(url):
    (outcome,) = ask(url, "hang", timeout=0.3)
    assert outcome.error == "timeout"


def test_nobody_listening_is_a_connect_error():
    with serving(FakeApp()) as gone:
        pass
    (outcome,) = ask(gone, "ok")
    assert outcome.error == "connect"


def test_failed_requests_give_no_tokens_and_no_latencies(url):
    outcomes = ask(url, "ok", "busy", "drop", "busy", "ok")
    result = summarize(outcomes, 2.0)
    assert (result["completed"], result["failed"]) == (2, 3)
    assert result["errors_by_class"] == {"http_503": 2, "disconnect": 1}
    assert "The queue is full." in result["error_samples"]["http_503"]
    assert result["total_output_tokens"] == 16
    assert result["output_throughput"] == 8.0


def test_the_body(app, url):
    ask(url, "ok", temperature=0.5, request_seed=10, extra_body={"top_p": 0.9, "temperature": 1.0}, api_key="secret")
    assert app.bodies == [
        {
            "model": "fake",
            "prompt": "ok",
            "max_tokens": 8,
            "temperature": 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "seed": 10,
            "top_p": 0.9,
        }
    ]
    assert app.headers[0][b"authorization"] == b"Bearer secret"


def test_ignore_eos_and_seeds_can_be_left_out(app, url):
    ask(url, "ok", ignore_eos=False)
    assert "ignore_eos" not in app.bodies[0]
    assert "seed" not in app.bodies[0]


def drive(url, loop, prompt=lambda index: f"ok {index}", **options):
    async def run():
        async with connect(url) as client:
            return await loop(client, RequestOptions(model="fake", max_tokens=8), prompt, **options)

    return asyncio.run(run())


def test_closed_loop_keeps_so_many_users_busy(app, url):
    seen = []
    outcomes = drive(url, closed_loop, users=3, requests=12, first=5, report=seen.append)
    assert len(outcomes) == len(seen) == 12
    assert app.most_running == 3
    assert sorted(body["prompt"] for body in app.bodies) == sorted(f"ok {index}" for index in range(5, 17))


def test_closed_loop_by_duration_reads_what_it_began_to_the_end(app, url):
    outcomes = drive(url, closed_loop, users=2, duration=0.3)
    assert outcomes
    assert all(outcome.error is None and outcome.output_tokens == 8 for outcome in outcomes)
    assert len(outcomes) == len(app.bodies)


def test_closed_loop_does_not_flood_a_full_server(url):
    outcomes = drive(url, closed_loop, lambda index: "busy", users=2, duration=0.5)
    assert Counter(outcome.error for outcome in outcomes) == {"http_503": len(outcomes)}
    assert len(outcomes) <= 12


def test_progress_is_the_servers_count_where_it_sends_one(url):
    def told(prompt, **options):
        chunks = []

        async def run():
            async with connect(url) as client:
                chosen = RequestOptions(model="fake", max_tokens=7, **options)
                await send(client, chosen, prompt, progress=lambda now, tokens: chunks.append((now, tokens)))

        asyncio.run(run())
        assert chunks == sorted(chunks)
        return [tokens for _, tokens in chunks]

    assert told("ok", running_usage=True) == [2, 2, 2, 1]
    assert told("ok") == told("plain", running_usage=True) == [1, 1, 1, 1]


def test_a_steady_load_is_open_while_all_users_are_busy_and_out_of_step(app, url):
    async def run():
        async with connect(url) as client:
            options = RequestOptions(model="fake", max_tokens=8)
            async with steady_load(client, options, lambda index: f"ok {index}", users=4, first=3) as load:
                start, before, ended = time.perf_counter(), app.generated, len(load.outcomes)
                # No length of time: a busy machine needs longer, and its server may be behind this client.
                while app.generated < before + 130 or len(load.outcomes) == ended:
                    await asyncio.sleep(0.01)
                    assert load.sent - len(load.outcomes) == 4  # a user whose answer ends asks again at once
                end, generated = time.perf_counter(), app.generated - before
            assert len(load.outcomes) > ended
            return load, load.tokens_between(start, end), generated

    load, tokens, generated = asyncio.run(run())
    assert app.most_running == 4
    assert sorted(body["max_tokens"] for body in app.bodies[:4]) == [2, 4, 6, 8]
    assert {body["max_tokens"] for body in app.bodies[4:]} == {8}
    # What is given up on leaving may not have got as far as the server.
    arrived = [int(body["prompt"].split()[1]) for body in app.bodies]
    assert len(set(arrived)) == len(arrived) >= len(load.outcomes)
    missing = set(range(3, 3 + load.sent)) - set(arrived)
    assert len(missing) == load.sent - len(arrived) <= 4
    assert tokens == pytest.approx(generated, abs=16)  # chunks on their way at either edge
    assert tokens > 100
    assert load.tokens_between(0.0, 0.0) == 0
    assert load.tokens_between(0.0, float("inf")) > tokens  # the ramp


def test_open_loop_sends_whether_or_not_others_ended(app, url):
    outcomes = drive(url, open_loop, lambda index: f"slow {index}", arrivals=[0.0, 0.01, 0.02, 0.03], first=3)
    assert app.most_running > 1
    assert sorted(body["prompt"] for body in app.bodies) == ["slow 3", "slow 4", "slow 5", "slow 6"]
    starts = [outcome.started for outcome in outcomes]
    assert starts == sorted(starts)


def test_waiting_in_the_client_is_kept_apart(app, url):
    free = drive(url, open_loop, lambda index: "slow", arrivals=[0.0, 0.0, 0.0])
    held = drive(url, open_loop, lambda index: "slow", arrivals=[0.0, 0.0, 0.0], max_in_flight=1)
    queued = sorted(outcome.queued for outcome in held)
    assert queued[0] < 0.2 <= queued[1] < queued[2]
    assert max(outcome.queued for outcome in free) < queued[2]
    assert min(outcome.ttft for outcome in held) < queued[2]  # the server is not blamed for it


def test_poisson_arrivals_repeat_with_the_seed():
    arrivals = poisson_arrivals(20.0, "0/1", requests=2000)
    assert arrivals == poisson_arrivals(20.0, "0/1", requests=2000)
    assert arrivals != poisson_arrivals(20.0, "0/2", requests=2000)
    assert arrivals == sorted(arrivals)
    assert len(arrivals) / arrivals[-1] == pytest.approx(20.0, rel=0.1)


def test_poisson_arrivals_of_a_duration_begin_alike():
    some = poisson_arrivals(5.0, "7", duration=10.0)
    assert all(time < 10.0 for time in some)
    assert poisson_arrivals(5.0, "7", duration=20.0)[: len(some)] == some
    assert poisson_arrivals(5.0, "7", requests=len(some)) == some
