"""The requests that a log line belongs to; `api.logs` writes their ids into it."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar

# Returns the ids when a line is written: before, it costs nothing, on the step thread too. Empty outside requests.
concerned: ContextVar[Callable[[], Sequence[str]]] = ContextVar("concerned", default=tuple)
