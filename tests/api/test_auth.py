"""API keys: every route but the probes' needs one, and nothing else tells who knows it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dspark_server.api import ServerSettings, create_app

from .fake_engine import FakeEngine
from .support import Running, start

KEYS = ("first-key", "second-key")
OPEN = {("GET", path) for path in ("/", "/health", "/live", "/load", "/ping", "/metrics", "/version")}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path: Path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(KEYS[1])
    yield from start(ServerSettings(port=0, api_key=KEYS[:1], api_key_file=str(path)))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def routes() -> list[tuple[str, str]]:
    """Method and path of every route there is, with something in place of parameters."""
    found = []
    for route in create_app(FakeEngine()).routes:
        path = re.sub(r"\{[^}]*\}", "x", route.path)
        found += [(method, path) for method in sorted(getattr(route, "methods", None) or {"GET"})]
    return found


def refused(response: httpx.Response) -> bool:
    if response.status_code != 401:
        return False
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
    assert not any(key in response.text for key in KEYS)
    return True


def test_every_route_needs_a_key_but_those_listed(guarded: Running) -> None:
    found = routes()
    assert {("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/openapi.json")} <= set(found)
    for method, path in found:
        closed = (method.replace("HEAD", "GET"), path) not in OPEN and not path.startswith("/static")
        with guarded.http.stream(method, path) as answer:
            assert (answer.status_code == 401) == closed, (method, path)
        with guarded.http.stream(method, path, headers=bearer(KEYS[0])) as answer:  # it may be a feed without an end
            assert answer.status_code != 401, (method, path)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[("GET", path) for path in ("/nothing", "/v1", "//", "//health", "/health/", "/Health", "/metricsx")],
        *[("GET", path) for path in ("/static", "/staticx", "/%2Fstatic/x", "/v1/models?x=/static/")],
        *[("POST", path) for path in ("/", "/health", "/static/x", "/metrics")],
        *[("OPTIONS", path) for path in ("/v1/completions", "/health")],
    ],
)
def test_what_is_nearly_open_is_closed(method: str, path: str, guarded: Running) -> None:
    assert refused(guarded.http.request(method, guarded.url + path))


def test_each_key_opens(guarded: Running) -> None:
    for key in KEYS:
        for scheme in ("Bearer", "bearer", "BEARER"):
            answer = guarded.http.get("/v1/models", headers={"Authorization": f"{scheme} {key}"})
            assert answer.status_code == 200
    body = {"prompt": "say fine", "max_tokens": 9}
    done = guarded.http.post("/v1/completions", json=body, headers=bearer(KEYS[1])).json()
    assert done["choices"][0]["text"] == "fine"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "")],
        [("Authorization", "Bearer")],
        [("Authorization", "first-key")],
        [("Authorization", "Basic first-key")],
        [("Authorization", "Bearer first-ke")],
        [("Authorization", "Bearer first-key2")],
        [("Authorization", "Bearer FIRST-KEY")],
        [("Authorization", "Bearer first-key second-key")],
        [("Authorization", "Bearer first-key,second-key")],
        [("Authorization", b"Bearer \xff\xfe")],
        [("Authorization", "Bearer first-key"), ("Authorization", "Bearer wrong")],
        [("X-Api-Key", "first-key")],
    ],
)
def test_what_does_not_open(headers: list[tuple[str, str]], guarded: Running) -> None:
    assert refused(guarded.http.post("/v1/completions", json={"prompt": "say x"}, headers=headers))
    assert refused(guarded.http.get("/v1/models", params={"api_key": KEYS[0]}, headers=headers))
    assert guarded.engine.submitted == [] or guarded.engine.in_flight == 0


def test_without_keys_everybody_is_let_in(server: Running) -> None:
    assert server.http.get("/v1/models").status_code == 200
    assert server.http.get("/v1/models", headers=bearer("anything")).status_code == 200


@pytest.mark.parametrize("access_log", [True, False])
def test_the_access_log_leaves_paths_and_keys_out(access_log: bool, capfd: pytest.CaptureFixture[str]) -> None:
    settings = ServerSettings(
        port=0, api_key=KEYS, access_log=access_log, disable_access_log_for_endpoints=("/health", "/metrics")
    )
    for running in start(settings):
        for path in ("/health", "/health?a=1", "/metrics", "/live", "/v1/models"):
            running.http.get(path, headers=bearer(KEYS[0]))
    written = "".join(capfd.readouterr())
    logged = re.findall(r'"GET (\S+) HTTP/1.1" 200', written)
    assert logged == (["/live", "/v1/models"] if access_log else [])
    assert not any(key in written for key in KEYS)


def test_clients_of_openai_see_what_is_wrong(guarded: Running) -> None:
    import openai

    with pytest.raises(openai.AuthenticationError) as raised:
        guarded.openai.models.list()  # its key is "none"
    assert json.loads(raised.value.response.text)["error"]["message"] == "The API key is wrong."
