"""Log lines: text for people, or one JSON object a line, both with the id of the request they belong to.

No line contains a prompt or an answer, at any level.
"""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from dspark_server.logcontext import concerned

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
SHOWN = 8  # ids in a text line


class TextFormatter(logging.Formatter):
    """A text line; the ids of its requests follow the message, also on lines of the step thread."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format the line without its traceback. Line ends and control characters are escaped: none can be forged."""
        line, identifiers = super().formatMessage(record), concerned.get()()
        if identifiers:
            more = f", {len(identifiers) - SHOWN} more" if len(identifiers) > SHOWN else ""
            line = f"{line} [{', '.join(identifiers[:SHOWN])}{more}]"
        return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


class JsonFormatter(logging.Formatter):
    """time (UTC, ISO 8601), level, logger, message, and request_id (request_ids) and exception where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one line: JSON escapes the line ends of a message."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= _identified(concerned.get()())
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(fields, default=str).decode()


def _identified(identifiers: Sequence[str]) -> dict[str, Any]:
    if len(identifiers) > 1:
        return {"request_ids": list(identifiers)}
    return {"request_id": identifiers[0]} if identifiers else {}


def formatter(kind: str) -> logging.Formatter:
    """Return the formatter for `--log-format` text or json."""
    return JsonFormatter() if kind == "json" else TextFormatter(TEXT)


def set_up(level: str, kind: str) -> None:
    """Send all records from `level` on to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(kind))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
