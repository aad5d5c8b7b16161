"""Log lines: text for people, or one JSON object a line, both with the id of the request they belong to.

No line has a prompt or an answer in it, at any level.
"""

import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import orjson

# Of the request that is being served; the client's X-Request-Id if it sent one. Empty outside requests.
request_id: ContextVar[str] = ContextVar("request_id", default="")

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """time (UTC, ISO 8601), level, logger, message, and request_id and exception where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        """One line: whatever a message holds, JSON escapes its line ends."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if identifier := request_id.get():
            fields["request_id"] = identifier
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(fields, default=str).decode()


def formatter(kind: str) -> logging.Formatter:
    """For `--log-format` text or json."""
    return JsonFormatter() if kind == "json" else logging.Formatter(TEXT)


def set_up(level: str, kind: str) -> None:
    """Send everything from `level` on to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(kind))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
