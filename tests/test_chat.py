"""`dspark-server chat` against a server that answers in a script; as a process, where a signal or a pipe matters."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from dspark_server.cli import app


def delta(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], "usage": None}


def usage(tokens: int, **metrics: Any) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}, **metrics}


def error(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "x", "param": None, "code": code}}


class Fake(ThreadingHTTPServer):
    """`answers` are given one after another: (status, error object) or (200, events)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.models: tuple[int, dict[str, Any]] = (200, {"data": [{"id": "little"}, {"id": "other"}]})
        self.answers: list[tuple[int, Any]] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        assert self.path == "/v1/models"
        self._whole(*self.server.models)

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status, content = self.server.answers[len(self.server.asked) - 1]
        if status != 200:
            self._whole(status, content)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in content:
            if isinstance(event, float):
                time.sleep(event)
                continue
            text = event if isinstance(event, str) else json.dumps(event)
            self.wfile.write(f"data: {text}\n\n".encode())

    def _whole(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.delenv("DSPARK_API_KEY", raising=False)
    started = []

    def begin(*flags: str) -> subprocess.Popen[str]:
        # A shell's background job ignores Ctrl-C, and so does what it starts; a person's terminal does not.
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        code += "from dspark_server.cli import main; main()"
        command = [sys.executable, "-c", code, "chat", "--url", fake.url, *flags]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, **pipes))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def talk(process: subprocess.Popen[str], *lines: str) -> tuple[str, str, int]:
    """Write these lines to its stdin; returns its stdout, its stderr and its exit code."""
    out, err = process.communicate("".join(f"{line}\n" for line in lines), timeout=20)
    assert "Traceback" not in err
    return out, err, process.returncode


def said(fake: Fake, *lines: str, flags: tuple[str, ...] = ()) -> tuple[str, str, int]:
    """The same in this process, which is quicker."""
    text = "".join(f"{line}\n" for line in lines)
    done = CliRunner(env={"DSPARK_API_KEY": None}).invoke(app, ["chat", "--url", fake.url, *flags], input=text)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.stdout, done.stderr, done.exit_code


def test_several_turns_and_a_reset(fake: Fake, start: Start) -> None:
    speculation = {"metrics": {"speculative_decoding": {"mean_acceptance_length": 2.345}}}
    fake.answers = [
        (200, [delta(""), delta("Hel"), 0.05, delta("lo."), delta("", "stop"), usage(21, **speculation), "[DONE]"]),
        (200, [delta("Two.", "length"), usage(1), "[DONE]"]),
        (200, [delta("New."), "[DONE]"]),
    ]
    process = start("--system", "Be brief.", "--temperature", "0", "--max-tokens", "9", "--api-key", "k")
    out, err, code = talk(process, "Hi", "", "And?", "/help", "/reset", "Again", "/rest", "/exit", "never read")
    assert (out, code) == ("Hello.\nTwo.\nNew.\n", 0)
    system, first = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    assert fake.keys == ["Bearer k"]
    assert fake.asked[0] == {
        "model": "little",
        "messages": [system, first],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "max_tokens": 9,
    }
    assert fake.asked[1]["messages"] == [
        *(system, first, {"role": "assistant", "content": "Hello."}),
        {"role": "user", "content": "And?"},
    ]
    assert fake.asked[2]["messages"] == [system, {"role": "user", "content": "Again"}]
    [one] = [line for line in err.splitlines() if "21 tokens" in line]
    rate = float(one.split(" tokens/s")[0].split()[-1])
    assert rate > 0
    assert "2.35 tokens per pass" in one or "2.34 tokens per pass" in one
    assert "cut at the longest length, 1 token, " in err
    assert "/reset  forget the conversation" in err
    assert "There is no command /rest. Did you mean /reset?" in err


def test_ctrl_c_stops_an_answer_and_keeps_it(fake: Fake, start: Start) -> None:
    fake.answers = [(200, [delta("A long"), 10.0, delta(" story")]), (200, [delta("Yes."), usage(1), "[DONE]"])]
    process = start()
    assert process.stdin and process.stdout
    process.stdin.write("Tell\n")
    process.stdin.flush()
    assert process.stdout.read(6) == "A long"
    process.send_signal(signal.SIGINT)
    out, err, code = talk(process, "More?")
    assert (out, code) == ("\nYes.\n", 0)
    assert "[stopped, first after" in err
    assert [message["content"] for message in fake.asked[1]["messages"]] == ["Tell", "A long", "More?"]


def test_what_a_model_writes_does_not_command_the_terminal(fake: Fake) -> None:
    fake.answers = [(200, [delta("a\x1b[2J\x07\x9bb\tc\nd\x7f é 🙂"), "[DONE]"])]
    assert said(fake, "Hi")[0] == "a[2Jb\tc\nd é 🙂\n"


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (404, {"detail": "Not Found"}, "has no /v1/chat/completions"),
        (405, {}, "has no /v1/chat/completions"),
        (404, error("No such model.", "model_not_found"), "refused (404): No such model."),
        (401, error("Key?"), "refused (401): Key? Give the key with --api-key or DSPARK_API_KEY."),
        (503, error("Full."), "refused (503): Full. It is starting, full or shutting down: try again in a moment."),
        (400, error("Too long.", "context_length_exceeded"), "Too long. /reset begins a new conversation."),
        (500, {"error": "odd"}, "refused (500): Internal Server Error"),
        (200, [delta("Half"), error("Boom.")], "the server gave up: Boom."),
        (200, [delta("Half")], "the answer broke off"),
        (200, ["not json"], "no chunk of a chat completion"),
        (200, [{"choices": [{"text": "completions"}]}], "no chunk of a chat completion"),
    ],
)
def test_errors_are_said_and_the_turn_is_forgotten(status: int, content: Any, message: str, fake: Fake) -> None:
    fake.answers = [(status, content), (200, [delta("Fine."), "[DONE]"])]
    out, err, code = said(fake, "Hi", "Again")
    assert message in err
    assert out.endswith("Fine.\n")
    assert code == 0
    assert fake.asked[1]["messages"] == [{"role": "user", "content": "Again"}]


def test_the_exit_code_tells_that_the_last_answer_failed(fake: Fake) -> None:
    fake.answers = [(503, error("Full."))]
    assert said(fake, "Hi", flags=("--model", "mine"))[2] == 1
    assert fake.asked[0]["model"] == "mine"


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ((401, error("Key?")), "refused (401): Key? Give the key"),
        ((503, error("Starting.")), "refused (503): Starting."),
        ((200, {"data": []}), "lists no models"),
        ((200, {}), "lists no models"),
    ],
)
def test_a_server_that_names_no_model(models: Any, message: str, fake: Fake) -> None:
    fake.models = models
    out, err, code = said(fake, "Hi")
    assert (out, code) == ("", 1)
    assert message in err
