"""Limits of a key, deadlines as clients see them, tenants that take turns and share no prefix, JSON logs."""

import json
import threading
from collections.abc import Iterator

import pytest

from dspark_server.api import ServerSettings
from dspark_server.api.limits import KeyLimits
from dspark_server.engine.batcher import Batcher
from dspark_server.engine.blocks import BlockPool
from dspark_server.engine.queue import LAST_PRIORITY
from dspark_server.engine.request import FinishReason, Request, SamplingParams
from dspark_server.engine.stats import EngineStats
from dspark_server.engine.thread import TokenEvent
from dspark_server.errors import CapacityError, DeadlineError, LimitError
from dspark_server.runtime.paging import CacheGroup

from .conftest import tiny_engine
from .support import Running, start
from .test_lifecycle import connect

KEYS = ("first-key", "second-key")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def guarded(request: pytest.FixtureRequest) -> Iterator[Running]:
    yield from start(ServerSettings(port=0, api_key=KEYS, **request.param))


@pytest.mark.parametrize("guarded", [{"key_max_requests": 2}], indirect=True)
def test_a_key_may_have_so_many_requests_running(guarded: Running) -> None:
    body = {"prompt": "forever", "max_tokens": 1500}
    long = {"json": body, "headers": bearer(KEYS[0])}
    threads = [threading.Thread(target=guarded.http.post, args=("/v1/completions",), kwargs=long) for _ in range(2)]
    for thread in threads:
        thread.start()
    guarded.wait(lambda: guarded.engine.in_flight == 2)
    short = {"prompt": "say fine"}
    refused = guarded.http.post("/v1/completions", json=short, headers=bearer(KEYS[0]))
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert guarded.http.post("/tokenize", json={"prompt": "x"}, headers=bearer(KEYS[0])).status_code == 429
    assert guarded.http.get("/v1/models", headers=bearer(KEYS[0])).status_code == 200
    assert guarded.http.post("/v1/completions", json=short, headers=bearer(KEYS[1])).status_code == 200
    guarded.engine.fail_all("over")
    for thread in threads:
        thread.join()
    assert guarded.http.post("/v1/completions", json=short, headers=bearer(KEYS[0])).status_code == 200
    assert {handle.tenant for handle in guarded.engine.submitted} == {"key1", "key2"}


@pytest.mark.parametrize("guarded", [{"key_requests_per_minute": 3}], indirect=True)
def test_a_key_may_send_so_many_requests_a_minute(guarded: Running) -> None:
    statuses = [
        guarded.http.post("/v1/completions", json={"prompt": "say x"}, headers=bearer(KEYS[0])) for _ in range(4)
    ]
    assert [answer.status_code for answer in statuses] == [200, 200, 200, 429]
    assert 15 <= int(statuses[-1].headers["retry-after"]) <= 20
    assert guarded.http.post("/v1/completions", json={"prompt": "say x"}, headers=bearer(KEYS[1])).status_code == 200


def test_the_rate_is_kept_over_time() -> None:
    now = [0.0]
    limits, served = KeyLimits(None, 60, clock=lambda: now[0]), 0
    for _ in range(1200):
        try:
            with limits.admit("key1"):
                served += 1
        except LimitError:
            pass
        now[0] += 0.25  # four a second for five minutes
    assert 60 + 299 <= served <= 60 + 301


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("cause", "status"), [(CapacityError("waited", retry_after=5), 503), (DeadlineError("late"), 504)]
)
def test_a_deadline_has_its_own_status(server: Running, cause: Exception, status: int, stream: bool) -> None:
    engine, answers = server.engine, []
    body = {"prompt": "forever", "max_tokens": 1500, "stream": stream}
    engine.per_step = 0  # nothing has been sent yet
    try:
        thread = threading.Thread(target=lambda: answers.append(server.http.post("/v1/completions", json=body)))
        thread.start()
        server.wait(lambda: engine.running)
        handle = engine.running[0]
        server_loop_call(
            server, lambda: engine._finish(handle, TokenEvent([], FinishReason.ERROR, error=str(cause), cause=cause))
        )
        thread.join(10)
    finally:
        engine.per_step = 1
    assert answers[0].status_code == status
    assert answers[0].json()["error"]["message"] == str(cause)


def server_loop_call(server: Running, function) -> None:
    server.engine._task.get_loop().call_soon_threadsafe(function)


def request(tenant: str, *, priority: int = 0) -> Request:
    params = SamplingParams(max_tokens=8, priority=priority)
    return Request(tenant, 4, [1, 2, 3, 4], params, frozenset(), b"root", nonce=0, tenant=tenant)


def queue(*arrivals: Request) -> Batcher:
    made = Batcher(BlockPool(64, [CacheGroup(4)]), EngineStats(), max_num_seqs=2, max_num_batched_tokens=32, gamma=3)
    for each in arrivals:
        made.add(each)
    return made


def served(batch: Batcher, count: int) -> str:
    """The tenants of the next requests to be admitted."""
    order = ""
    for _ in range(count):
        order += batch.waiting.pop().tenant
    return order


def test_keys_take_turns() -> None:
    batch = queue(*[request("a") for _ in range(6)])
    for _ in range(2):
        batch.add(request("b"))
    batch.add(request("c"))
    assert served(batch, 9) == "abcabaaaa"


def test_a_key_that_comes_again_and_again_gets_its_share_and_no_more() -> None:
    batch, order = queue(*[request("a") for _ in range(10)]), ""
    for _ in range(8):
        batch.add(request("b"))
        order += served(batch, 1)
    assert order.count("b") == 4


def test_priority_counts_within_a_key_but_the_last_counts_everywhere() -> None:
    mild, urgent = request("a", priority=5), request("a", priority=-5)
    batch = queue(request("z", priority=LAST_PRIORITY), mild, request("b"), request("b"), urgent)
    assert [(each.tenant, each.params.priority) for each in batch.waiting] == [
        ("a", -5), ("b", 0), ("a", 5), ("b", 0), ("z", LAST_PRIORITY)
    ]  # fmt: skip


def test_one_key_does_not_find_what_another_wrote() -> None:
    body = {"prompt": list(range(5, 105)), "max_tokens": 4, "temperature": 0}

    def cached(running: Running, key: str) -> int:
        answer = running.http.post("/v1/completions", json=body, headers=bearer(key))
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    for running in start(ServerSettings(port=0, api_key=KEYS), tiny_engine("none")):
        assert [cached(running, key) for key in (KEYS[0], KEYS[0], KEYS[1], KEYS[1])] == [0, 96, 0, 96]


def test_logs_may_be_json_with_the_request_id_and_no_prompt(capfd: pytest.CaptureFixture[str]) -> None:
    settings = ServerSettings(port=0, log_format="json", access_log=True, api_key=KEYS)
    for running in start(settings):
        headers = bearer(KEYS[0]) | {"X-Request-Id": "id-of-mine"}
        running.http.post("/v1/completions", json={"prompt": "say secret-text"}, headers=headers)
        running.http.get("/health?x=%0d%0a{%22forged%22:1}", headers={"X-Request-Id": "bad id"})
    out = "".join(capfd.readouterr())
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    [access] = [line for line in lines if "POST /v1/completions" in line["message"]]
    assert access["request_id"] == "id-of-mine"
    assert access["level"] == "info" and access["logger"] == "uvicorn.access"
    assert not any("forged" in line for line in lines)
    assert "secret-text" not in out and KEYS[0] not in out


@pytest.mark.parametrize("own_server", [{"settings": {"key_max_requests": 1}}], indirect=True)
def test_a_client_that_hangs_up_gives_its_place_under_the_limit_back(own_server: Running) -> None:
    connect(own_server, {"prompt": "forever", "max_tokens": 1500}).close()
    own_server.wait(lambda: own_server.engine.submitted and own_server.engine.in_flight == 0)
    own_server.wait(lambda: own_server.complete("say fine").status_code == 200)
