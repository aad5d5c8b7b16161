"""What an attacker tries, with a key or without, over real sockets; each was tried by hand first."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dspark_server.api import ServerSettings
from dspark_server.api import edge as edge_module
from dspark_server.api.edge import Edge
from dspark_server.api.logs import TextFormatter
from dspark_server.api.schema import MAX_CONTAINERS
from dspark_server.api.structured import StructuredForms
from dspark_server.logcontext import concerned

from .support import Running, start
from .test_bad_input import check


@pytest.fixture
def keyed() -> Iterator[Running]:
    yield from start(ServerSettings(port=0, api_key=("first-key", "second-key")))


def opened(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def sent_until_cut(connection: socket.socket, piece: bytes, most: int) -> int:
    """Bytes sent before the server cut the connection; `most` or more if it never did. A timeout is no cut."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)  # what the kernel takes is not what was read
    sent = 0
    try:
        while sent < most:
            connection.sendall(piece)
            sent += len(piece)
    except ConnectionError:
        pass
    return sent


POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
ENDLESS = {
    "one header": (b"GET /health HTTP/1.1\r\nX: ", b"a" * 65536),
    "headers": (b"GET /health HTTP/1.1\r\n", b"X: aaaaaaaaaaaaaaaa\r\n" * 3000),
    "path": (b"GET /", b"a" * 65536),
    "chunk extension": (POST + b"Transfer-Encoding: chunked\r\n\r\n5;", b"a" * 65536),
    "trailers": (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"X: aaaaaaaaaaaaaaaa\r\n" * 3000),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_never_ends_is_cut_before_anyone_needs_a_key(keyed: Running, name: str) -> None:
    """The parser keeps all of it, so that without a bound this is as much memory as the network brings in 30 s.

    No more than is needed is sent: the parser copies a header as often as more of it comes.
    """
    begin, piece = ENDLESS[name]
    with opened(keyed) as connection:
        connection.sendall(begin)
        assert sent_until_cut(connection, piece, 16 << 20) < 16 << 20
    assert keyed.http.get("/health").status_code == 200


def test_a_body_in_chunks_of_a_byte_is_no_attack(server: Running) -> None:
    content = json.dumps({"prompt": "say fine", "max_tokens": 20, "user": "u" * 1000}).encode()
    content += b" " * (500_000 - len(content))
    with opened(server) as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        connection.sendall(b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200") and b'"fine"' in answer


def test_requests_may_be_sent_ahead_but_not_thousands(server: Running) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with opened(server) as connection:
        connection.sendall(request * 20)
        got = b""
        while got.count(b'{"status":"ready"}') < 20:
            got += connection.recv(65536)
    with opened(server) as connection:
        sent_until_cut(connection, request * 5000, len(request) * 5000)
        connection.settimeout(10)
        got = b""
        try:
            while piece := connection.recv(65536):
                got += piece
        except OSError:
            pass
        assert got.count(b"HTTP/1.1 200") < 5000
    server.canary()


def test_bodies_that_are_read_have_a_bound_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_module, "MOST_BODIES", 2)
    for server in start(ServerSettings(port=0, max_body_bytes=100_000)):
        head = POST + b"Content-Length: 90000\r\n\r\n"
        held = [opened(server) for _ in range(2)]
        for connection in held:
            connection.sendall(head + b" " * 89_000)
        time.sleep(0.3)
        with opened(server) as third:
            third.sendall(head + b" " * 89_000)
            answer = third.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after" in answer
        for connection in held:
            connection.close()
        deadline = time.monotonic() + 20
        large = {"prompt": "say fine", "max_tokens": 20, "x": "x" * 80_000}
        while server.http.post("/v1/completions", json=large).status_code != 200:
            assert time.monotonic() < deadline, "what was read for them is still counted"


@pytest.mark.parametrize("piece", [b"[],", b"{},"])
def test_a_body_of_very_many_lists_is_refused_before_it_is_read(server: Running, piece: bytes) -> None:
    """Eight million of them stopped the event loop for 10 to 50 s."""
    raw = b'{"prompt": "say x", "unknown": [' + piece * (MAX_CONTAINERS + 1) + piece[:2] + b"]}"
    error = check(server.http.post("/v1/completions", content=raw))
    assert error["code"] == "body_too_complex"


def test_a_large_body_keeps_no_other_out_of_the_queue(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess of its tokens by its bytes alone is over the whole queue's bound."""
    reserved: list[int] = []
    inner = server.engine.reserve
    monkeypatch.setattr(server.engine, "reserve", lambda n=1, tokens=0: reserved.append(tokens) or inner(n, tokens))
    server.complete(["say x", "say y"], ignored="x" * 3_000_000)
    server.chat("say x", ignored="x" * 3_000_000)
    assert reserved == [2 * server.engine.max_model_len, server.engine.max_model_len]


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://evil.example", 403), ("http://evil.example:8000", 403), ("null", 403), ("http://localhost:3000", 200),
     ("http://127.0.0.1:8000", 200), ("http://[::1]:8000", 200), ("http://192.168.0.7", 200),
     ("http://127.0.0.1.evil.example", 403), ("http://localhost.evil.example", 403), (None, 200)],
)  # fmt: skip
def test_a_foreign_page_may_not_use_a_server_without_keys(server: Running, origin: str | None, status: int) -> None:
    headers = {} if origin is None else {"Origin": origin}
    answer = server.http.post("/v1/completions", json={"prompt": "say x"}, headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert check(answer, 403)["code"] == "foreign_origin"


async def _nothing(_: Request) -> Response:
    return Response(status_code=204)


@pytest.mark.parametrize(
    ("listening", "origin", "status"),
    [("0.0.0.0", "http://gpu-box:8000", 204), ("0.0.0.0", "http://gpu-box", 403), ("0.0.0.0", "http://evil", 403),
     ("127.0.0.1", "http://gpu-box:8000", 403), ("localhost", "http://gpu-box:8000", 403),
     ("::1", "http://gpu-box:8000", 403)],
)  # fmt: skip
def test_our_own_page_is_known_by_the_name_it_was_reached_by(listening: str, origin: str, status: int) -> None:
    """But not where only this machine is listened to: there a foreign name that points at us is DNS rebinding."""
    edge = Edge(Starlette(routes=[Route("/", _nothing)]), ServerSettings(host=listening))

    async def ask() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(edge)) as client:
            headers = {"Origin": origin}
            return (await client.get("http://gpu-box:8000/", headers=headers)).status_code

    assert asyncio.run(ask()) == status


def test_with_keys_the_key_decides(keyed: Running) -> None:
    headers = {"Origin": "http://evil.example", "Authorization": "Bearer first-key"}
    assert keyed.http.post("/v1/completions", json={"prompt": "say x"}, headers=headers).status_code == 200


def test_what_form_another_key_compiled_shows_in_no_time(keyed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    inner = StructuredForms._compile_now
    monkeypatch.setattr(
        StructuredForms, "_compile_now", lambda self, form: compiled.append(form.text) or inner(self, form)
    )
    body = {"prompt": "say x", "structured_outputs": {"regex": "[a-z]+"}}
    for key in ("first-key", "first-key", "second-key"):
        answer = keyed.http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200
    assert len(compiled) == 2


def test_no_text_forges_a_line_of_the_log() -> None:
    forged = "a\n2026-01-01 00:00:00 CRITICAL forged\r\x1b[31m\u2028"
    record = logging.LogRecord("name", logging.INFO, "", 0, "field %s", (forged,), None)
    token = concerned.set(lambda: [forged, "second"])
    try:
        line = TextFormatter("%(message)s").format(record)
    finally:
        concerned.reset(token)
    assert line.isprintable() and "second" in line


def test_lines_of_the_step_thread_name_their_requests(caplog: pytest.LogCaptureFixture) -> None:
    from dspark_server import failpoints

    from .conftest import tiny_engine

    lines: list[str] = []
    formatter = TextFormatter("%(message)s")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(formatter.format(record))  # type: ignore[method-assign]
    logger = logging.getLogger("dspark_server")
    logger.addHandler(handler)
    try:
        for server in start(ServerSettings(port=0), tiny_engine("none")):
            with failpoints.armed(step_verify="raise:RuntimeError*1"):
                answer = server.http.post("/v1/completions", json={"prompt": "ab"}, headers={"X-Request-Id": "mine-7"})
            assert answer.status_code == 500
    finally:
        logger.removeHandler(handler)
    [failed] = [line for line in lines if line.startswith("a step failed")]
    assert "[cmpl-mine-7-0]" in failed.splitlines()[0]


def test_a_flood_without_a_key_costs_no_place(keyed: Running) -> None:
    def flood() -> None:
        with httpx.Client(base_url=keyed.url) as http:
            for _ in range(50):
                assert http.post("/v1/completions", json={"prompt": "forever"}).status_code == 401

    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        body = {"prompt": "say fine", "max_tokens": 20}
        answer = keyed.http.post("/v1/completions", json=body, headers={"Authorization": "Bearer first-key"})
        assert answer.json()["choices"][0]["text"] == "fine"
    for thread in threads:
        thread.join()
    assert len(keyed.engine.submitted) == 10
