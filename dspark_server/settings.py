"""Settings as data: dataclass fields with a description, a group and the allowed values.

Flags, the configuration file, the environment, `dspark-server config` and docs/configuration.md are all derived from
these fields, so that a new setting is one line in its dataclass. Nothing here is slow to import: `--help` reads it.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dspark_server.errors import ConfigError

GROUPS = ("Model", "Engine", "Speculation", "Server", "Limits", "Logging")
MASK = "********"

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_METAVARS = {int: "INTEGER", float: "NUMBER", bool: "BOOLEAN", str: "TEXT"}

T = TypeVar("T")


def setting(default: Any, help: str, *, group: str, **rules: Any) -> Any:
    """A dataclass field that is a setting; `rules` are attributes of Option (name, choices, minimum, secret, ...)."""
    metadata = {"help": help, "group": group, **rules}
    return dataclasses.field(default=default, metadata=metadata, repr=not rules.get("secret"))


@dataclass(frozen=True)
class Option:
    """One setting. `kind` is its type without None, which is allowed if `optional`; `name` is the long flag's."""

    field: str
    kind: Any
    optional: bool
    default: Any
    help: str
    group: str
    name: str = ""
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    metavar: str = ""
    secret: bool = False

    @property
    def key(self) -> str:
        """The name with underscores, as in Python; configuration files may use it too."""
        return underscored(self.name)

    @property
    def variable(self) -> str:
        """The environment variable."""
        return f"DSPARK_{self.key.upper()}"

    @property
    def is_list(self) -> bool:
        """Whether the value is a tuple, of texts or of whole numbers."""
        return typing.get_origin(self.kind) is tuple

    @property
    def is_mapping(self) -> bool:
        """Whether the value is a nested dataclass of settings, written as a JSON object or a YAML mapping."""
        return dataclasses.is_dataclass(self.kind)

    def show(self, value: Any) -> str:
        """The value for people; a secret is masked."""
        if value is None or value == ():
            return ""
        if self.secret:
            return MASK
        if isinstance(value, bool):
            return str(value).lower()
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    def read(self, value: Any, where: str) -> Any:
        """Convert and check a value from text (command line, environment) or from YAML.

        Raises ConfigError naming `where` it was written.
        """
        if value is None and self.optional:
            return None
        if value == "":
            raise ConfigError(f"{where} is empty; leave it out to get the default.")
        if self.is_mapping:
            return build(self.kind, read_object(value, where), where)
        if self.is_list:
            parts = _split(value, where) if isinstance(value, str) else value
            if typing.get_args(self.kind)[0] is int:
                return self._whole_numbers(parts, value, where)
            if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
                raise ConfigError(f"{where} must be a list of texts{self._but(value)}.")
            return tuple(part.strip() for part in parts)
        made = _convert(self.kind, value)
        if made is None:
            quote = " (quote it)" if self.kind is str and isinstance(value, (int, float)) else ""
            raise ConfigError(f"{where} must be {_KINDS[self.kind]}{quote}{self._but(value)}.")
        self.check(made, where)
        return made

    def _whole_numbers(self, parts: Any, value: Any, where: str) -> tuple[int, ...]:
        numbers = (
            [_convert(int, part) for part in parts] if isinstance(parts, (list, tuple)) else [_convert(int, parts)]
        )
        if None in numbers:
            raise ConfigError(f"{where} must be whole numbers with commas between{self._but(value)}.")
        self.check(tuple(numbers), where)
        return tuple(numbers)

    def check(self, value: Any, where: str) -> None:
        """Raise ConfigError if the value, of the right type, is out of bounds; each of a tuple's is checked."""
        if isinstance(value, tuple):
            for each in value:
                self.check(each, where)
            return
        if value is None or self.is_mapping:
            return
        if self.choices and value not in self.choices:
            raise ConfigError(
                f"{where} must be one of {', '.join(self.choices)}{self._but(value)}.{suggest(value, self.choices)}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where} must be finite{self._but(value)}.")
        if self.minimum is not None and value < self.minimum:
            raise ConfigError(f"{where} must be at least {self.minimum}{self._but(value)}.")
        if self.maximum is not None and value > self.maximum:
            raise ConfigError(f"{where} must be at most {self.maximum}{self._but(value)}.")
        if self.above is not None and value <= self.above:
            raise ConfigError(f"{where} must be more than {self.above}{self._but(value)}.")

    def _but(self, value: Any) -> str:
        if self.secret:
            return ""
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
        return f", not {text[:80]}"


def options(cls: type[Any]) -> tuple[Option, ...]:
    """Return the settings of a dataclass: its fields made by `setting`. The others are internal."""
    found = []
    for field in dataclasses.fields(cls):
        if "group" in field.metadata:
            kind, optional = _without_none(field.type)
            rules = {"name": field.name.replace("_", "-"), **field.metadata}
            rules["metavar"] = rules.get("metavar") or _METAVARS.get(kind, "TEXT")
            found.append(Option(field.name, kind, optional, field.default, **rules))
    return tuple(found)


def check(instance: Any, prefix: str = "--") -> None:
    """Raise ConfigError for the first setting of the dataclass instance that is out of bounds."""
    for option in options(type(instance)):
        option.check(getattr(instance, option.field), prefix + (option.name if prefix else option.field))


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Return an instance of a dataclass of settings from a mapping with the fields' names.

    Raises ConfigError for unknown keys and values of the wrong type.
    """
    known = {option.field: option for option in options(cls)}
    read: dict[str, Any] = {}
    for name, value in values.items():
        key = underscored(name)
        if key not in known:
            raise ConfigError(f"{where} has no key {name!r}.{suggest(key, known)} Known are {', '.join(known)}.")
        read[key] = known[key].read(value, f"{key} in {where}")
    return cls(**read)


def underscored(name: object) -> str:
    """Return a file's key in Python's spelling; both spellings are accepted."""
    return str(name).replace("-", "_")


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean X?` if a known word is close to this one, else ""."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def _split(text: str, where: str) -> Any:
    """The parts of a list: JSON, as vLLM writes them, or separated by commas. Raises ConfigError naming `where`."""
    if not text.startswith("["):
        return text.split(",")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} begins like a JSON list, but is none: {error}.") from None


def _without_none(kind: Any) -> tuple[Any, bool]:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        rest = [part for part in typing.get_args(kind) if part is not types.NoneType]
        assert len(rest) == 1, f"a setting has one type, or one type and None, not {kind}"
        return rest[0], True
    return kind, False


def _convert(kind: Any, value: Any) -> Any:
    """Convert the value to `kind`, or None. Text is read leniently (yes, on, 1), all else strictly (no 1.5 as 1)."""
    from pydantic import TypeAdapter, ValidationError  # takes a tenth of a second, which --help can do without

    if isinstance(value, str) and kind is str:
        return value
    try:
        adapter = TypeAdapter(kind)
        return (
            adapter.validate_strings(value) if isinstance(value, str) else adapter.validate_python(value, strict=True)
        )
    except ValidationError:
        return None


def read_object(value: Any, where: str) -> Mapping[str, Any]:
    """Return a JSON object, or a mapping as it is. Raises ConfigError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a JSON object.")
    return value
