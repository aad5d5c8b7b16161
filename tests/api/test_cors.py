"""Web pages of allowed origins, as a browser asks: before the request, and on every answer, errors included."""

from collections.abc import Iterator

import pytest

from dspark_server.api import ServerSettings
from dspark_server.errors import ConfigError
from dspark_server.settings import options

from .support import Running, start

PAGE = "https://chat.example.org"
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture
def keyed() -> Iterator[Running]:
    yield from start(ServerSettings(port=0, api_key=("secret",), allowed_origins=(PAGE,)))


@pytest.fixture
def open_to_one() -> Iterator[Running]:
    yield from start(ServerSettings(port=0, allowed_origins=(PAGE,), allow_credentials=True))


def asked_before(server: Running, origin: str) -> dict[str, str]:
    """The answer to a browser's question before a POST with a key, which has no key itself."""
    headers = {
        "Origin": origin, "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }  # fmt: skip
    answer = server.http.options("/v1/chat/completions", headers=headers)
    return dict(answer.headers) | {"status": str(answer.status_code)}


def test_a_browser_asks_before_it_sends_a_key(keyed: Running) -> None:
    told = asked_before(keyed, PAGE)
    assert told["status"] == "200"
    assert told["access-control-allow-origin"] == PAGE
    assert "authorization" in told["access-control-allow-headers"]
    assert "POST" in told["access-control-allow-methods"]
    told = asked_before(keyed, "https://evil.example")
    assert told["status"] == "400"
    assert "access-control-allow-origin" not in told


@pytest.mark.parametrize("stream", [False, True])
def test_answers_and_errors_can_be_read(keyed: Running, stream: bool) -> None:
    body = {"prompt": "say x", "stream": stream}
    for headers, status in ((KEY, 200), ({}, 401), ({"Authorization": "Bearer no"}, 401)):
        answer = keyed.http.post("/v1/completions", json=body, headers={"Origin": PAGE} | headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
    answer = keyed.http.post("/v1/completions", json=body, headers={"Origin": "https://evil.example"} | KEY)
    assert answer.status_code == 200  # whoever has the key; a browser gives a page nothing of it
    assert "access-control-allow-origin" not in answer.headers
    assert "access-control-allow-origin" not in keyed.http.post("/v1/completions", json=body, headers=KEY).headers


def test_without_keys_only_allowed_pages_may_ask(open_to_one: Running) -> None:
    for origin, status in ((PAGE, 200), ("https://evil.example", 403)):
        answer = open_to_one.http.post("/v1/completions", json={"prompt": "say x"}, headers={"Origin": origin})
        assert answer.status_code == status
        assert answer.headers.get("access-control-allow-origin") == (PAGE if status == 200 else None)
        assert answer.headers["access-control-allow-credentials"] == "true"


def test_without_the_setting_nothing_is_said(server: Running) -> None:
    assert asked_before(server, PAGE)["status"] != "200"
    answer = server.http.post("/v1/completions", json={"prompt": "say x"}, headers={"Origin": "http://localhost:3000"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_origins_are_written_as_in_vllm_or_with_commas() -> None:
    [option] = [each for each in options(ServerSettings) if each.field == "allowed_origins"]
    both = ("https://a.example", "https://b.example")
    assert option.read('["https://a.example", "https://b.example"]', "here") == both
    assert option.read("https://a.example,https://b.example", "here") == both
    with pytest.raises(ConfigError, match="here begins like a JSON list, but is none"):
        option.read('["https://a.example"', "here")
    with pytest.raises(ConfigError, match="takes origins such as"):
        ServerSettings(allowed_origins=("chat.example.org",))
