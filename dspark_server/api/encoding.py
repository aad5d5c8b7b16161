"""JSON of answers, in pieces: one call of orjson, and one write, hold the event loop for as long as they take."""

from collections.abc import Iterable, Iterator
from typing import Any

import orjson

SLICE = 256  # list items that one call of orjson encodes: it holds the interpreter, whichever thread calls it
WRITE = 1 << 18  # bytes that are written at once

# Line ends for Python's str.splitlines, which some clients split the stream with; JSON escapes only the ASCII ones.
_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


def json_text(text: str) -> bytes:
    """Return a JSON string without line ends of any kind."""
    encoded = orjson.dumps(text)
    if not text.isascii():
        for raw, escaped in _LINE_ENDS:
            encoded = encoded.replace(raw, escaped)
    return encoded


def json_pieces(value: Any) -> Iterator[bytes]:
    """Yield the JSON of `value`; long lists are divided, also those inside dictionaries."""
    if isinstance(value, dict) and value:
        yield b"{"
        for number, piece in enumerate(json_fields(value)):
            yield piece if number else piece[1:]
        yield b"}"
    elif isinstance(value, list) and len(value) > SLICE:
        for start in range(0, len(value), SLICE):
            yield (b"," if start else b"[") + orjson.dumps(value[start : start + SLICE])[1:-1]
        yield b"]"
    else:
        yield orjson.dumps(value)


def json_fields(fields: dict[str, Any]) -> Iterator[bytes]:
    """Yield the fields of an object that has others before them."""
    for name, value in fields.items():
        yield b"," + orjson.dumps(name) + b":"
        yield from json_pieces(value)


def writes(pieces: Iterable[bytes]) -> list[bytes]:
    """The same bytes, in parts of about `WRITE`."""
    parts: list[bytes] = []
    gathered, size = [], 0
    for piece in pieces:
        gathered.append(piece)
        size += len(piece)
        if size >= WRITE:
            parts.append(b"".join(gathered))
            gathered, size = [], 0
    return [*parts, b"".join(gathered)] if gathered or not parts else parts
