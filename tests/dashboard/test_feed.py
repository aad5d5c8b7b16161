"""What the feed says: the truth, no more than the viewer may know, and not too often."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from dspark_server.api import feed as feed_module
from dspark_server.api.chat_template import ChatTemplate
from dspark_server.api.feed import MAX_BLOCKS, MAX_VIEWERS, OwnPrompt
from dspark_server.api.prompting import Prompting
from dspark_server.engine.observer import Block
from dspark_server.engine.output import Detokenizer

from .support import Running, serving, tokenizer

PROMPT = "Once upon a time"


def test_counters_equal_a_difference_of_metrics(server: Running) -> None:
    with server.feed() as feed, ThreadPoolExecutor(4) as pool:
        before, first = server.metrics(), feed.state()["counters"]
        answers = [pool.submit(server.complete, f"{PROMPT} {n}", max_tokens=30 + n) for n in range(6)]
        assert server.post("load", requests=3, domain="code").status_code == 200
        assert server.post("prompt", feed=feed.id, prompt=PROMPT, max_tokens=50).status_code == 200
        feed.until(lambda state: state["own"] and state["own"]["finish_reason"])
        assert all(answer.result().status_code == 200 for answer in answers)
        server.post("load", requests=0)
        feed.until(lambda state: state["running"] == 0 and server.engine.in_flight == 0)
        last = feed.state()["counters"]
        after = server.metrics()

    def difference(name: str) -> float:
        return after[name] - before[name]

    shown = {name: last[name] - first[name] for name, value in last.items() if isinstance(value, int)}
    assert shown["drafts"] > 0
    assert shown["generation_tokens"] > 50
    assert shown["accepted_tokens"] <= shown["draft_tokens"]
    for name, series in {
        "prompt_tokens": "vllm:prompt_tokens_total{}",
        "generation_tokens": "vllm:generation_tokens_total{}",
        "preemptions": "vllm:num_preemptions_total{}",
        "drafts": "vllm:spec_decode_num_drafts_total{}",
        "draft_tokens": "vllm:spec_decode_num_draft_tokens_total{}",
        "accepted_tokens": "vllm:spec_decode_num_accepted_tokens_total{}",
        "drafted": 'dspark:draft_decisions_total{decision="drafted"}',
        "copied": 'dspark:draft_decisions_total{decision="copied"}',
        "skipped": 'dspark:draft_decisions_total{decision="skipped"}',
    }.items():
        assert shown[name] == difference(series), name
    for position, (now, then) in enumerate(
        zip(last["accepted_per_position"], first["accepted_per_position"], strict=True)
    ):
        series = f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="{position}"}}'
        assert now - then == difference(series)
    budgets = [now - then for now, then in zip(last["budgets"], first["budgets"], strict=True)]
    assert sum(budgets) == difference("dspark:verification_budget_count{}")
    assert sum(b * n for b, n in enumerate(budgets)) == difference("dspark:verification_budget_sum{}")


def test_the_own_prompt_is_shown_block_by_block(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "MAX_BLOCKS", 1000)
    expected = server.complete(PROMPT, max_tokens=44).json()
    with server.feed() as feed:
        number = server.post("prompt", feed=feed.id, prompt=PROMPT, max_tokens=44).json()["number"]
        own = feed.until(lambda state: state["own"] and state["own"]["finish_reason"])["own"]
    assert feed.text(number) == expected["choices"][0]["text"]
    assert own["finish_reason"] == expected["choices"][0]["finish_reason"]
    assert own["tokens"] == expected["usage"]["completion_tokens"]
    assert sum(told["skipped"] for told in feed.own) == 0
    blocks = [block for told in feed.own for block in told["blocks"]]
    assert sum(block["accepted"] + (block["own"] is not None) for block in blocks) == own["tokens"]
    assert any(block["draft"] for block in blocks)
    for block in blocks:
        assert block["accepted"] <= block["verified"] <= len(block["draft"]) <= feed.hello["gamma"]
        chances = [chance for _, chance in block["draft"]]
        assert chances == sorted(chances, reverse=True)
        assert all(0 <= chance <= 100 for chance in chances)
    kinds = [kind for told in feed.own for _, kind in told["text"]]
    assert set(kinds) <= {"draft", "target"}


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value that is not a key."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)


def test_nobody_sees_the_texts_of_others(server: Running) -> None:
    expected = server.complete("their secret", max_tokens=80).json()["choices"][0]["text"]
    with server.feed() as mine, server.feed() as theirs, ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(server.complete, "a secret", max_tokens=80) for _ in range(2)]
        server.post("prompt", feed=theirs.id, prompt="their secret", max_tokens=80)
        seen = [mine.state() for _ in range(4)]
        seen.append(mine.until(lambda state: state["running"] == 0 and all(c.done() for c in clients)))
        theirs.until(lambda state: state["own"] and state["own"]["finish_reason"])
    rows = [row for state in seen if state["picture"] for row in state["picture"]["rows"]]
    assert rows, "the requests were there to be seen"
    assert set(strings(seen)) <= {"ready", "causal", "dspark", "chat", "code", "math"}
    assert not mine.own
    assert theirs.text(theirs.own[0]["number"]) == expected, "theirs alone, though others ran beside it"


def test_a_prompt_needs_the_id_of_an_open_feed(server: Running) -> None:
    with server.feed() as feed:
        identifier = feed.id
    server.wait(lambda: server.post("prompt", feed=identifier, prompt="x").status_code == 400)
    answer = server.post("prompt", feed="guessed", prompt="x")
    assert answer.status_code == 400
    assert "hello" in answer.json()["error"]["message"]


def test_at_most_ten_small_messages_a_second(server: Running) -> None:
    with server.feed() as feed:
        server.post("load", requests=16, domain="math")
        feed.until(lambda state: state["running"] >= 12)
        began, count = time.monotonic(), 0
        while time.monotonic() - began < 1.5:
            feed.state()
            count += 1
    assert 3 <= count <= 17
    assert max(feed.sizes) < 32_000


def test_a_quiet_feed_still_says_that_it_lives(server: Running) -> None:
    with server.feed() as feed:
        feed.until(lambda state: state["running"] == 0)
        times = [feed.state()["at"] for _ in range(3)]
    assert 0.9 < times[2] - times[1] < 2


def test_a_slow_reader_gets_all_the_text_and_the_newest_blocks() -> None:
    intake: Any = SimpleNamespace(detokenizer=Detokenizer(tokenizer()))
    prompting = Prompting(intake, ChatTemplate(None))
    ids = tokenizer().encode("abc")
    blocks = deque(Block([ids[0], ids[1]], [0.9, 0.5], False, 1, 1, [ids[0], ids[2]]) for _ in range(100))
    told = OwnPrompt(1, "id", blocks, prompting).news()
    assert "".join(text for text, _ in told["text"]) == "ac" * 100
    assert told["text"][:2] == [("a", "draft"), ("c", "target")]
    assert len(told["blocks"]) == MAX_BLOCKS and told["skipped"] == 100 - MAX_BLOCKS
    assert told["blocks"][0] == {
        "draft": [("a", 90), ("b", 50)],
        "copied": False,
        "verified": 1,
        "accepted": 1,
        "own": "c",
    }


def test_seventeen_are_too_many(server: Running) -> None:
    with httpx.Client(base_url=server.url, limits=httpx.Limits(max_connections=None)) as client:
        open_feeds = [
            client.send(client.build_request("GET", "/dashboard/feed"), stream=True) for _ in range(MAX_VIEWERS)
        ]
        try:
            assert all(feed.status_code == 200 for feed in open_feeds)
            refused = server.http.get("/dashboard/feed")
            assert refused.status_code == 503
            assert "16" in refused.json()["error"]["message"]
            open_feeds.pop().close()
            server.wait(lambda: _opens(client))
        finally:
            for feed in open_feeds:
                feed.close()


def _opens(client: httpx.Client) -> bool:
    with client.stream("GET", "/dashboard/feed") as response:
        return response.status_code == 200


def test_nothing_is_watched_and_nothing_runs_when_the_last_viewer_has_left(server: Running) -> None:
    loop = server.engine.core.loop
    server.wait(lambda: loop._trace is None)
    with server.feed() as feed:
        server.post("load", requests=5, domain="chat")
        server.post("prompt", feed=feed.id, prompt=PROMPT, max_tokens=1000)
        feed.until(lambda state: state["running"] >= 6)
        assert loop._trace is not None
    server.wait(lambda: server.engine.in_flight == 0 and loop._trace is None)
    time.sleep(0.4)
    assert server.engine.in_flight == 0


def test_a_step_that_cannot_be_shown_is_a_step_all_the_same(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ValueError("cannot be shown")

    monkeypatch.setattr("dspark_server.engine.observer.StepObserver._look", broken)
    with server.feed() as feed:
        feed.state()
        assert server.complete(PROMPT).status_code == 200


def test_an_open_feed_does_not_hold_up_the_end_of_the_server() -> None:
    with serving() as server, server.feed() as feed:
        server.post("load", requests=4, domain="chat")
        feed.until(lambda state: state["running"] >= 4)
        server.engine.begin_drain()
        with pytest.raises(StopIteration):
            feed.until(lambda state: False)
        assert server.engine.in_flight == 0
        assert feed_module.INTERVAL < 1


def test_there_is_no_dashboard_with_it_switched_off() -> None:
    with serving(dashboard=False) as server:
        for path in ("/", "/static/dashboard.js", "/dashboard/feed"):
            assert server.http.get(path).status_code == 404
        assert server.post("load", requests=0).status_code == 404
