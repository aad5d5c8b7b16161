"""Bytes that are not what HTTP clients send, over plain sockets: lengths that lie, bombs, forged names and paths."""

import contextlib
import gzip
import io
import json
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path
from types import SimpleNamespace

import pytest

from dspark_server.api import server as server_module

from .support import Running
from .test_bad_input import check
from .test_security import POST, keyed, opened, sent_until_cut

__all__ = ["keyed"]  # a fixture

FINE = json.dumps({"prompt": "say fine", "max_tokens": 20}).encode()


@pytest.fixture(autouse=True)
def canary(server: Running) -> Iterator[None]:
    yield
    server.canary()


def answers(server: Running, *pieces: bytes) -> bytes:
    """All that comes back until the server closes; it must."""
    with opened(server) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def resident() -> int:
    """Bytes of memory of this process, which is the server's too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_gigabyte_in_chunks_is_cut(server: Running) -> None:
    """Nobody announced its length. At the cap it is answered, and most of the rest nobody takes."""
    before = resident()
    with opened(server) as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        piece = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        assert sent_until_cut(connection, piece, 1 << 30) < 128 << 20
    assert resident() - before < 64 << 20


def test_a_body_that_drips_behind_its_answer_is_cut(monkeypatch: pytest.MonkeyPatch, keyed: Running) -> None:
    """It needs no key."""
    monkeypatch.setattr(server_module, "LINGER_TIMEOUT", 0.3)
    with opened(keyed) as connection:
        connection.sendall(POST + b"Content-Length: 1000\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 401")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < began + 10:
                connection.sendall(b" ")
                time.sleep(0.05)
        assert time.monotonic() < began + 10


def test_what_comes_behind_an_answer_may_be_followed_by_a_request(keyed: Running) -> None:
    with opened(keyed) as connection:
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(FINE))
        assert connection.recv(4096).startswith(b"HTTP/1.1 401")
        key = b"Authorization: Bearer first-key\r\nContent-Length: %d\r\n\r\n" % len(FINE)
        connection.sendall(FINE + POST + key + FINE)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_gigabyte_in_a_megabyte_of_gzip_stays_packed(server: Running) -> None:
    zeros = gzip.compress(b"0" * (1 << 20))
    bomb = zeros * 1024  # members one after another are one gzip stream
    assert len(bomb) < 2 << 20
    before = resident()
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        check(server.http.post(path, content=bomb, headers=headers))
    assert resident() - before < 64 << 20


def test_what_follows_a_short_content_length_is_no_part_of_the_body(server: Running) -> None:
    """It is read as the next request, and is none: the connection ends."""
    head = POST + b"Content-Length: %d\r\n\r\n" % (len(FINE) - 1)
    answer = answers(server, head + FINE)
    assert b"HTTP/1.1 200" not in answer and b"HTTP/1.1 400" in answer


@pytest.mark.parametrize(
    "lengths",
    [b"Content-Length: %d\r\nContent-Length: 5\r\n" % len(FINE),
     b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n" % len(FINE),
     b"Content-Length: %d, %d\r\n" % (len(FINE), len(FINE)), b"Content-Length: +%d\r\n" % len(FINE),
     b"Content-Length : %d\r\n" % len(FINE), b"Content-Length: 0x10\r\n",
     b"Content-Length: 18446744073709551617\r\n"],
)  # fmt: skip
def test_a_length_that_can_be_read_in_two_ways_is_refused(server: Running, lengths: bytes) -> None:
    submitted = len(server.engine.submitted)
    assert answers(server, POST + lengths + b"\r\n" + FINE).startswith(b"HTTP/1.1 400")
    assert len(server.engine.submitted) == submitted


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n", b"\r\n ", b"\0"], ids=repr)
def test_no_request_id_writes_a_header(server: Running, end: bytes) -> None:
    """At best it is the client's own header; in the answer it is none."""
    request = b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: a" + end + b"Set-Cookie: b\r\n\r\n"
    assert b"cookie" not in answers(server, request).lower()


def test_two_requests_may_have_one_id(server: Running) -> None:
    """They stay two."""
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(
                lambda number: server.http.post(
                    "/v1/completions",
                    json={"prompt": f"say answer {number}", "max_tokens": 20, "request_id": "same"},
                    headers={"x-request-id": "same"},
                ),
                range(8),
            )
        )
    assert [each.json()["choices"][0]["text"] for each in found] == [f"answer {number}" for number in range(8)]
    assert {each.headers["x-request-id"] for each in found} == {"same"}


@pytest.mark.parametrize(
    ("target", "host"),
    [("/v1/completions", "x/health?"), ("/v1/completions", "x/health#"), ("/v1/completions", "x/health?@y"),
     ("http://x/health?/v1/completions", "x"), ("http://x/v1/completions", "x/health?"),
     ("/health/../v1/completions", "x"), ("/health;/v1/completions", "x"), ("/%2e%2e/v1/completions", "x"),
     ("//v1/completions", "x"), ("/v1%2fcompletions", "x"), ("/%2fhealth", "x"), ("/health%00", "x"),
     ("/v1/completions#/health", "x"), ("/v1/completions?/health", "x")],
)  # fmt: skip
def test_no_name_or_path_passes_for_an_open_one(keyed: Running, target: str, host: str) -> None:
    """Routes go by the path, and so does the key: neither by a URL put together with a client's Host."""
    head = f"POST {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(FINE)}\r\n\r\n"
    answer = answers(keyed, head.encode() + FINE)
    assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400")), answer[:200]
    assert keyed.engine.submitted == []


@pytest.mark.parametrize("own_server", [{"per_step": 100_000, "settings": {"stall_timeout": 20.0}}], indirect=True)
def test_a_reader_may_pause_in_mid_stream(own_server: Running) -> None:
    """Shorter than the deadline, with every buffer on the way full: nothing is lost, nothing comes twice."""
    own_server.engine.max_model_len = 10**9
    asked = {"prompt": "forever", "max_tokens": 2_000_000, "stream": True, "return_token_ids": True}
    content = json.dumps(asked).encode()
    with opened(own_server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        connection.sendall(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        got = connection.recv(65536)
        [protocol] = own_server.server.server_state.connections
        own_server.wait(lambda: protocol.flow.write_paused and own_server.engine.in_flight == 0)
        got += b"".join(iter(lambda: connection.recv(1 << 20), b""))
    answer = HTTPResponse(SimpleNamespace(makefile=lambda mode: io.BytesIO(got)))  # type: ignore[arg-type]
    answer.begin()
    lines = [line[6:] for line in answer.read().split(b"\n") if line.startswith(b"data: ")]
    choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    assert sum(len(choice["token_ids"]) for choice in choices) == 2_000_000
    assert "".join(choice["text"] for choice in choices) == "x " * 1_000_000
    assert lines[-1] == b"[DONE]"
