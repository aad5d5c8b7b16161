"""Which requests a log line belongs to; `api.logs` writes them into it."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar

# Gives the ids when a line is written: until then it costs nothing, on the step thread too. Nobody outside requests.
concerned: ContextVar[Callable[[], Sequence[str]]] = ContextVar("concerned", default=tuple)
