"""The application before there is a model; tests/server/test_loading.py has the whole process."""

import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvloop

from dspark_server.api import ServerSettings, create_app
from dspark_server.api.loading import create_loading_app
from dspark_server.api.server import Server
from dspark_server.errors import CheckpointError

from .fake_engine import FakeEngine

KEY = {"Authorization": "Bearer the-key"}


def paths(app) -> set[tuple[str, frozenset[str]]]:
    return {(route.path, frozenset(route.methods)) for route in app.routes}


@pytest.mark.parametrize("dashboard", [True, False])
def test_its_routes_are_those_to_come(dashboard: bool) -> None:
    settings = ServerSettings(dashboard=dashboard)
    later = paths(create_app(FakeEngine(), settings))
    merged: dict[str, frozenset[str]] = {}
    for path, methods in later:  # GET and POST of /ping are routes of their own there
        merged[path] = merged.get(path, frozenset()) | methods
    assert paths(create_loading_app(settings)) == set(merged.items())


class Loading:
    """A server in a thread whose engine comes, or does not, when the test says so."""

    def __init__(self, **settings) -> None:
        self.go = threading.Event()
        self.engine = FakeEngine()
        self.fault: Exception | None = None
        self.raised: BaseException | None = None
        self.server = Server(self._load, ServerSettings(port=0, **settings))
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)

    def _load(self) -> FakeEngine:
        assert self.go.wait(20)
        if self.fault is not None:
            raise self.fault
        return self.engine

    def _run(self) -> None:
        try:
            uvloop.run(self.server.serve())
        except BaseException as error:
            self.raised = error


@pytest.fixture
def loading(request: pytest.FixtureRequest) -> Iterator[Loading]:
    made = Loading(**getattr(request, "param", {}))
    yield made
    made.go.set()
    made.server.should_exit = True
    made.thread.join(10)
    assert not made.thread.is_alive()
    made.http.close()


def is_loading(answer: httpx.Response) -> bool:
    error = answer.json()["error"]
    assert error["type"] == "service_unavailable_error"
    assert answer.headers["x-request-id"]
    return answer.status_code == 503 and int(answer.headers["retry-after"]) > 0 and "still loading" in error["message"]


def test_until_it_is_ready(loading: Loading) -> None:
    http = loading.http
    assert http.get("/live").json() == {"status": "alive"}
    for health in (http.get("/health"), http.get("/ping"), http.post("/ping")):
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
    body = {"prompt": "say fine"}
    assert is_loading(http.post("/v1/completions", json=body))
    for path in ("/", "/docs", "/v1/models", "/v1/models/a/b", "/metrics", "/version", "/dashboard/feed"):
        assert is_loading(http.get(path)), path
    assert http.get("/nothing").status_code == 404
    assert http.get("/v1/completions").status_code == 405
    loading.go.set()
    deadline = time.monotonic() + 10
    while http.get("/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == "fine"
    assert http.get("/").status_code == 200


@pytest.mark.parametrize("loading", [{"api_key": ("the-key",), "max_body_bytes": 100}], indirect=True)
def test_keys_and_caps_are_those_of_later(loading: Loading) -> None:
    http = loading.http
    for path in ("/health", "/live", "/metrics", "/"):
        assert http.get(path).status_code != 401
    for path in ("/v1/models", "/docs", "/nothing"):
        assert http.get(path).status_code == 401
    assert http.post("/v1/completions", json={}).status_code == 401
    assert is_loading(http.post("/v1/completions", json={}, headers=KEY))
    assert http.post("/v1/completions", content=b"x" * 101, headers=KEY).status_code == 413
    assert http.get("/nothing", headers=KEY).status_code == 404


def test_a_model_that_cannot_be_loaded_ends_the_server(loading: Loading) -> None:
    loading.fault = CheckpointError("the model is damaged")
    loading.go.set()
    loading.thread.join(10)
    assert loading.raised is loading.fault
