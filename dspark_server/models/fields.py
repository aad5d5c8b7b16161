"""Strict reading of a config.json's fields: a value of the wrong kind is a CheckpointError that names the field."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark_server.errors import CheckpointError

Fields = Mapping[str, Any]

GGUF_IS_NOT_READ = (
    "GGUF files are not read; give the directory or Hugging Face id of the model they were made of (safetensors)"
)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a checkpoint directory. Raises CheckpointError if there is none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; is {path.parent} a complete model directory?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); download the model again") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(fields).__name__}")
    return fields


def integer(fields: Fields, name: str, default: int | None = None) -> int:
    """A positive integer; `default`, if there is one, for an absent field or null."""
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {name} must be a positive integer, not {value!r}")
    return value


def whole(fields: Fields, name: str, default: int) -> int:
    """An integer that may be 0; `default` for an absent field or null."""
    value = fields.get(name)
    return 0 if value == 0 and isinstance(value, int) else integer(fields, name, default)


def number(fields: Fields, name: str, default: float | None = None) -> float:
    """A positive number; `default`, if there is one, for an absent field or null."""
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {name} must be a positive number, not {value!r}")
    return float(value)


def flag(fields: Fields, name: str, default: bool = False) -> bool:
    """True or false; `default` for an absent field or null."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} must be true or false, not {value!r}")
    return value


def names(fields: Fields, name: str) -> list[str] | None:
    """A list of names, None for an absent field or null."""
    value = fields.get(name)
    if value is not None and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
        raise CheckpointError(f"config.json: {name} must be a list of names, not {value!r}")
    return value


def architecture(fields: Fields) -> str:
    """The one architecture that a config names; "" if it names none, or several."""
    value = fields.get("architectures")
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else ""


def token_ids(value: Any) -> tuple[int, ...]:
    """One id, a list of them, or null."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise CheckpointError(f"config.json: token ids must be non-negative integers, not {value!r}")
    return tuple(ids)


def refuse(fields: Fields, name: str, supported: tuple[Any, ...], why: str = "") -> None:
    """Raise CheckpointError unless the field is absent, null or one of the `supported` values."""
    value = fields.get(name)
    if value is not None and value not in supported:
        named = " or ".join(repr(each) for each in supported)
        raise CheckpointError(f"config.json: {name} {value!r} is not supported, only {named} is{why}")
