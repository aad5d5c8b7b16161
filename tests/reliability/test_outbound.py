"""No request makes the server connect to anything: an audit hook in its process sees every attempt."""

import multiprocessing
import socket
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import httpx

processes = multiprocessing.get_context("forkserver")


def run_child(port: Connection, seen: str) -> None:
    """Main of the process: every connect, name look-up and file written by the audit hook."""
    import sys

    import uvloop

    from dspark_server.api import ServerSettings, serve
    from tests.api.fake_engine import FakeEngine

    watching = False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen"):
            with Path(seen).open("a") as file:
                file.write(f"{event} {arguments}\n")

    listener = socket.create_server(("127.0.0.1", 0))
    engine = FakeEngine()
    sys.addaudithook(hook)
    watching = True
    # The hook must see what it is for.
    with socket.socket() as probe:
        probe.connect(listener.getsockname())
    port.send(listener.getsockname()[1])
    uvloop.run(serve(lambda: engine, ServerSettings(), sockets=[listener]))


def test_no_request_makes_the_server_go_out(tmp_path: Path) -> None:
    bait = socket.create_server(("127.0.0.1", 0))
    called: list[object] = []

    def accept() -> None:
        try:
            called.append(bait.accept())
        except OSError:
            return

    threading.Thread(target=accept, daemon=True).start()
    url = f"http://127.0.0.1:{bait.getsockname()[1]}/x.png"
    receiver, sender = processes.Pipe(duplex=False)
    seen = tmp_path / "seen"
    process = processes.Process(target=run_child, args=(sender, str(seen)))
    process.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{receiver.recv()}", timeout=20) as http:
            while http.get("/health").status_code == 503:
                time.sleep(0.01)
            image = {"type": "image_url", "image_url": {"url": url}}
            for path, body in (
                ("/v1/completions", {"prompt": f"say {url}", "model": url}),
                ("/v1/completions", {"prompt": f"say {url}", "user": url, "suffix": url}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}]}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": url}], "chat_template": url}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": url}], "tools": [{"url": url}]}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": url}], "response_format": {
                    "type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": url}}}}),
                ("/tokenize", {"prompt": url}),
            ):  # fmt: skip
                assert http.post(path, json=body).status_code in (200, 400, 404, 422)
            assert http.get("/v1/models/" + url).status_code == 404
            assert http.get("/health", headers={"Host": url, "X-Forwarded-For": url, "Referer": url}).status_code == 200
            done = http.post("/v1/completions", json={"prompt": "say fine"}).json()
            assert done["choices"][0]["text"] == "fine"
    finally:
        process.kill()
        process.join()
        bait.close()
    lines = seen.read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith("socket.connect"), lines  # the probe of the hook itself
    assert not called
