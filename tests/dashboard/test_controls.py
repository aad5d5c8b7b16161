"""What the dashboard turns: policies, drafters and the background load. And what it refuses."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dspark_server.api.background import LAST_PRIORITY
from tests.engine.support import greedy, prompts

from .support import Running, core, serving

LONG = 120  # tokens: a second or two, in which the feed tells ten times a second


@pytest.mark.parametrize(
    ("route", "body", "words"),
    [
        ("policy", {"policy": "greedy"}, "causal, lagged, fixed, threshold, none"),
        ("policy", {"drafter": "eagle"}, "dspark, none"),
        ("policy", {"policy": 3}, "`policy`"),
        ("load", {}, "`requests`"),
        ("load", {"requests": -1}, "`requests`"),
        ("load", {"requests": 2.5}, "`requests`"),
        ("load", {"requests": 17}, "at most 16"),
        ("load", {"requests": 1, "domain": "law"}, "math, code, chat"),
        ("prompt", {"prompt": "x"}, "`feed`"),
        ("prompt", {"feed": "x", "prompt": ""}, "`prompt`"),
        ("prompt", {"feed": "x", "prompt": "x" * 8001}, "`prompt`"),
        ("prompt", {"feed": "x", "prompt": "x", "max_tokens": 5000}, "`max_tokens`"),
        ("prompt", {"feed": "x", "prompt": "x", "temperature": 3}, "`temperature`"),
        ("stop", {"feed": "x"}, "not the id of an open feed"),
    ],
)
def test_bad_bodies_are_400_and_say_why(server: Running, route: str, body: dict[str, Any], words: str) -> None:
    answer = server.post(route, **body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_a_body_that_is_no_object_is_400(server: Running, text: str) -> None:
    headers = {"Content-Type": "application/json"}
    assert server.http.post("/dashboard/load", content=text, headers=headers).status_code == 400


def test_what_another_sites_form_can_send_is_refused(server: Running) -> None:
    answer = server.http.post("/dashboard/load", content='{"requests": 0}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415


def test_a_load_that_nobody_watches_is_refused(server: Running) -> None:
    server.wait(lambda: server.post("load", requests=1, domain="chat").status_code == 409)


@pytest.fixture(scope="module")
def expected(shared_server: Running) -> str:
    """Greedy tokens after "Once", enough for a policy to be changed in their midst."""
    text: str = shared_server.complete("Once", max_tokens=LONG).json()["choices"][0]["text"]
    return text


@pytest.mark.parametrize("policy", ["lagged", "fixed", "threshold", "none", "causal"])
def test_the_policy_changes_between_steps_and_the_answer_does_not(server: Running, policy: str, expected: str) -> None:
    with server.feed() as feed:
        number = server.post("prompt", feed=feed.id, prompt="Once", max_tokens=LONG).json()["number"]
        feed.until(lambda state: state["own"] and state["own"]["tokens"] > 5)
        assert server.post("policy", policy=policy).json() == {"policy": policy, "drafter": "dspark"}
        feed.until(lambda state: state["own"]["finish_reason"])
        assert feed.text(number) == expected
        server.post("prompt", feed=feed.id, prompt="Twice", max_tokens=20)
        feed.until(lambda state: state["own"]["number"] > number and state["own"]["finish_reason"])
        state = feed.state()
    assert state["policy"] == policy
    assert state["picture"]["policy"] == policy


def test_drafter_none_drafts_nothing(server: Running) -> None:
    with server.feed() as feed:
        assert server.post("policy", drafter="none").json() == {"policy": "causal", "drafter": "none"}
        server.complete("settle", max_tokens=2)
        before = server.engine.stats.drafting["drafted"]
        server.complete("Once", max_tokens=40)
        assert server.engine.stats.drafting["drafted"] == before
        assert feed.until(lambda state: state["drafter"] == "none")["policy"] == "causal"
        server.post("policy", drafter="dspark")
        server.complete("Once", max_tokens=40)
        assert server.engine.stats.drafting["drafted"] > before


def test_a_policy_chosen_again_begins_without_history() -> None:
    made = core(selection="lagged")
    made.generate(prompts(3), greedy(20))
    used = made.loop._selection
    assert len(used._past) == 2  # type: ignore[attr-defined]
    made.select("lagged")
    assert made.loop._selection is not used
    assert not made.loop._selection._past  # type: ignore[attr-defined]
    assert made.policies == ("causal", "lagged", "fixed", "threshold", "none")


def test_without_costs_the_policies_that_go_by_them_are_not_offered() -> None:
    made = core(selection="fixed")
    assert made.policies == ("fixed", "threshold", "none")
    with serving(made) as server:
        assert "fixed, threshold, none" in server.post("policy", policy="causal").json()["error"]["message"]


def test_the_load_makes_the_budget_shrink_and_counts_like_any_other(server: Running) -> None:
    def budget(state: dict[str, Any]) -> float:
        rows = state["picture"]["rows"]
        return float(sum(1 + row["verified"] for row in rows) / len(rows))

    finished = 'vllm:request_success_total{finished_reason="length"}'
    before = server.metrics()[finished]
    with server.feed() as feed:
        server.post("load", requests=1, domain="math")
        feed.until(lambda state: state["running"] == 1 and state["picture"] and state["picture"]["drafts"])
        alone = [budget(feed.state()) for _ in range(10)]
        server.post("load", requests=16, domain="math")
        feed.until(lambda state: state["running"] == 16)
        crowd = [budget(feed.until(lambda state: state["running"] > 12)) for _ in range(10)]
        assert sum(crowd) < sum(alone)
        server.wait(lambda: server.metrics()[finished] > before)


def test_the_load_gives_way_to_clients() -> None:
    with serving(core(max_num_seqs=4)) as server, server.feed() as feed, ThreadPoolExecutor(6) as pool:
        server.post("load", requests=4, domain="chat")
        feed.until(lambda state: state["load"]["running"] == 4)
        waiting_behind_clients = {handle.request.params.priority for handle in list(server.engine._handles.values())}
        assert waiting_behind_clients == {LAST_PRIORITY}
        clients = [pool.submit(server.complete, f"client {n}", max_tokens=150) for n in range(4)]
        feed.until(lambda state: state["load"]["running"] == 0 and state["running"] == 4)
        # Of the four some may have ended by themselves just then.
        assert server.metrics()['vllm:request_success_total{finished_reason="abort"}'] >= 1
        assert all(client.result().json()["choices"][0]["finish_reason"] == "length" for client in clients)
        feed.until(lambda state: state["load"]["running"] == 4)


def test_the_load_gives_way_where_blocks_are_short() -> None:
    with serving(core(num_blocks=48)) as server, server.feed() as feed:
        server.post("load", requests=16, domain="chat")
        feed.until(lambda state: state["kv_usage"] > 0.5)
        answer = server.complete("x" * 200, max_tokens=100, temperature=1, ignore_eos=True)
        assert answer.json()["usage"]["completion_tokens"] == 100
        assert server.metrics()['vllm:request_success_total{finished_reason="abort"}'] > 0


def test_stop_ends_the_prompt(server: Running) -> None:
    with server.feed() as feed:
        server.post("prompt", feed=feed.id, prompt="Once", max_tokens=900)
        feed.until(lambda state: state["own"] and state["own"]["tokens"])
        assert server.post("stop", feed=feed.id).status_code == 200
        assert feed.until(lambda state: state["own"]["finish_reason"])["own"]["finish_reason"] == "abort"
