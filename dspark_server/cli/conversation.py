"""A conversation over /v1/chat/completions, streamed: its messages, and the speed of the last answer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

import httpx
import orjson

from dspark_server.errors import DSparkServerError
from dspark_server.words import counted

READ_TIMEOUT = 300.0  # seconds without data from the server


class ServerError(DSparkServerError):
    """The server cannot be reached, or refused; the message says what to do."""


@dataclass
class Answer:
    """An answer and its measurements. Times on the monotonic clock, in seconds; None: not there yet, or never sent."""

    sent: float
    text: str = ""
    first: float | None = None
    last: float | None = None
    tokens: int | None = None
    acceptance_length: float | None = None
    finish_reason: str | None = None
    stopped: bool = False

    def summary(self) -> str:
        """One line: an early end, tokens, speed, time to the first token, tokens per target pass."""
        parts = []
        if self.stopped:
            parts.append("stopped")
        elif self.finish_reason == "length":
            parts.append("cut at the longest length")
        if self.tokens is not None:
            parts.append(counted(self.tokens, "token"))
        if self.first is not None and self.last is not None:
            if self.tokens is not None and self.tokens > 1 and self.last > self.first:
                parts.append(f"{(self.tokens - 1) / (self.last - self.first):.1f} tokens/s")
            parts.append(f"first after {self.first - self.sent:.2f} s")
        if self.acceptance_length is not None:
            parts.append(f"{self.acceptance_length:.2f} tokens per pass")
        return f"[{', '.join(parts) or 'no answer'}]"


@contextmanager
def connect(url: str, api_key: str = "") -> Iterator[httpx.Client]:
    """Return a client for the server at an address, with or without /v1. Raises ServerError for an invalid one."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    base = url.rstrip("/").removesuffix("/v1")
    try:
        http = httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(10, read=READ_TIMEOUT))
    except (httpx.InvalidURL, ValueError) as error:
        raise ServerError(f"{url} is no address such as http://127.0.0.1:8000: {error}.") from None
    with http:
        yield http


class Conversation:
    """Turns with one model. Raises ServerError if none is given and asking the server for one fails."""

    def __init__(
        self,
        http: httpx.Client,
        model: str | None = None,
        system: str | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        self._http = http
        self._system = [{"role": "system", "content": system}] if system else []
        self._sampling = sampling or {}
        self.model = model or self._first_model()
        self.messages = list(self._system)

    def reset(self) -> None:
        """Forget every turn but the system message."""
        self.messages = list(self._system)

    def ask(self, text: str, write: Callable[[str], None]) -> Answer:
        """Pass the answer to `write` piece by piece. Ctrl-C ends it early and keeps the text so far.

        Raises ServerError; the turn is then forgotten.
        """
        turn = {"role": "user", "content": text}
        answer = Answer(monotonic())
        try:
            self._stream([*self.messages, turn], answer, write)
        except KeyboardInterrupt:
            answer.stopped = True
        if answer.text:
            self.messages += [turn, {"role": "assistant", "content": answer.text}]
        return answer

    def _first_model(self) -> str:
        with self._explained():
            response = self._http.get("/v1/models")
        self._check(response)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise ServerError(f"{self._http.base_url} lists no models: is it an OpenAI-style server?") from None

    def _stream(self, messages: list[dict[str, str]], answer: Answer, write: Callable[[str], None]) -> None:
        body = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._sampling,
        }
        with self._explained(), self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                self._check(response)
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if piece := _read(data, answer):
                    answer.text += piece
                    write(piece)
        raise ServerError("the answer broke off.")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn network errors into errors that say what to do."""
        where = self._http.base_url
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise ServerError(
                f"no server answers at {where}: start one with `dspark-server serve`, or name it with --url."
            ) from None
        except httpx.HTTPError as error:
            raise ServerError(f"the connection to {where} failed: {str(error) or type(error).__name__}.") from None

    def _check(self, response: httpx.Response) -> None:
        """Raise ServerError for any response but success."""
        status = response.status_code
        if status == 200:
            return
        try:
            error = response.json()["error"]
            said, code = str(error["message"]), error.get("code")
        except (ValueError, LookupError, TypeError, AttributeError):
            said, code = response.reason_phrase, None
        is_chat = response.request.url.path.endswith("/chat/completions")
        if is_chat and status in (404, 405) and code != "model_not_found":
            raise ServerError(
                f"the server at {self._http.base_url} has no /v1/chat/completions, so it cannot chat: it may complete "
                "text at /v1/completions, which this command does not speak."
            )
        hint = _HINTS.get(status, "")
        if code == "context_length_exceeded":
            hint = " /reset begins a new conversation."
        raise ServerError(f"the server refused ({status}): {said}{hint}")


_HINTS = {
    401: " Give the key with --api-key or DSPARK_API_KEY.",
    503: " It is starting, full or shutting down: try again in a moment.",
}


def _read(data: str, answer: Answer) -> str:
    """Return a chunk's text; its other fields go into `answer`. Raises ServerError for an error or other data."""
    try:
        chunk = orjson.loads(data)
        if chunk.get("error"):
            raise ServerError(f"the server gave up: {chunk['error']['message']}")
        if chunk.get("usage"):
            answer.tokens = int(chunk["usage"]["completion_tokens"])
            figures = (chunk.get("metrics") or {}).get("speculative_decoding") or {}
            answer.acceptance_length = figures.get("mean_acceptance_length")
        if not chunk.get("choices"):
            return ""
        [choice] = chunk["choices"]
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        text = str(choice["delta"].get("content") or "")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ServerError("the server sent something that is no chunk of a chat completion.") from None
    if text:
        answer.last = monotonic()
        answer.first = answer.first or answer.last
    return text
