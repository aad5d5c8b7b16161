"""Resolves settings: command line over environment (DSPARK_...) over configuration file over defaults."""

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dspark_server.errors import ConfigError
from dspark_server.settings import Option, options, read_object, suggest, underscored

PREFIX = "DSPARK_"
DEFAULT = "default"
CONFIG_VARIABLE = "DSPARK_CONFIG"
# Variables that belong to the machine rather than to a server, and their meaning.
OTHER_VARIABLES = {
    CONFIG_VARIABLE: "The configuration file, if `--config` is not given.",
    "DSPARK_CACHE_DIR": "Keeps converted models, built kernels, profiles; default `~/.cache/dspark-server`.",
    "DSPARK_FAILPOINTS": "Faults to inject, for tests only (docs/reliability.md).",
    "DSPARK_KERNELS": "Which kernels run: `auto`, `native` or `reference` (plain PyTorch).",
    "DSPARK_LINEAR": "Which matrix product bfloat16 weights get: `auto`, `native`, `onednn` or `plain`.",
}

# Variables that Kubernetes adds to every container for each Service of its namespace (unless enableServiceLinks is
# false). Those of a Service whose name begins with "dspark" must not look like settings of ours.
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")

T = TypeVar("T")


@dataclass(frozen=True)
class Resolved:
    """A value in force and its source: "default", "command line", "environment NAME" or "file PATH".

    `keys` are the keys of a mapping that the source gave; the others are defaults.
    """

    value: Any
    source: str
    keys: frozenset[str] = frozenset()


class Resolution:
    """The settings in force, by Option."""

    def __init__(self, settings: dict[Option, Resolved]) -> None:
        self.settings = settings

    def __str__(self) -> str:
        """Settings that are not defaults, for the log."""
        given = [
            f"{option.name}={option.show(resolved.value)} ({resolved.source})"
            for option, resolved in self.settings.items()
            if resolved.source != DEFAULT
        ]
        return ", ".join(given) or "defaults"

    def make(self, cls: type[T], **changes: Any) -> T:
        """Return an instance of a dataclass of settings. Raises ConfigError for conflicting values."""
        by_name = {option.name: resolved.value for option, resolved in self.settings.items()}
        return cls(**({option.field: by_name[option.name] for option in options(cls)} | changes))


def resolve(
    known: Sequence[Option],
    command_line: Mapping[str, Any],
    environment: Mapping[str, str] = os.environ,
    file: Path | None = None,
) -> Resolution:
    """Return the value of every known option. `command_line` holds the given flags, by key (underscores).

    Raises ConfigError for an unknown key or variable, a value that cannot be read, and a damaged file.
    """
    _refuse_unknown_variables(known, environment)
    if file is None and environment.get(CONFIG_VARIABLE):
        file = Path(environment[CONFIG_VARIABLE])
    written = {} if file is None else _read_file(file.expanduser(), known)
    found = {}
    for option in known:
        if option.key in command_line:
            given, where, source = command_line[option.key], f"--{option.name}", "command line"
        elif option.variable in environment and not _is_service_link(option.variable, environment[option.variable]):
            given, where, source = environment[option.variable], option.variable, f"environment {option.variable}"
        elif option.key in written:
            given, where, source = written[option.key], f"{option.name} in {file}", f"file {file}"
        else:
            found[option] = Resolved(option.default, DEFAULT)
            continue
        value = option.read(given, where)
        keys = frozenset(map(underscored, read_object(given, where))) if option.is_mapping else frozenset()
        found[option] = Resolved(value, source, keys)
    return Resolution(found)


def _refuse_unknown_variables(known: Sequence[Option], environment: Mapping[str, str]) -> None:
    names = {option.variable for option in known} | set(OTHER_VARIABLES)
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in names and not _is_service_link(name, environment[name]):
            raise ConfigError(f"the environment variable {name} is not a setting.{suggest(name, names)}")


def _is_service_link(name: str, value: str) -> bool:
    return bool(_SERVICE_LINK.search(name) or (name.endswith("_PORT") and _LINK_VALUE.match(value)))


def _read_file(path: Path, known: Sequence[Option]) -> dict[str, Any]:
    """Return the content of a YAML file by option key."""
    content = load_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping such as `max-num-seqs: 32`.")
    keys = {option.key: option.name for option in known}
    written: dict[str, Any] = {}
    for name, value in content.items():
        key = underscored(name)
        if key not in keys:
            raise ConfigError(
                f"{path} has the key {name!r}, which is not a setting.{suggest(str(name), keys.values())}"
            )
        if key in written:
            raise ConfigError(f"{path} gives {keys[key]} twice.")
        written[key] = value
    return written


def load_yaml(path: Path) -> Any:
    """Return the content of a YAML file. Raises ConfigError if it cannot be read, or a mapping has a key twice."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses equal keys in a mapping, of which PyYAML silently takes the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        problem = f"the key {key.value!r} is there twice"
                        raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                    seen.add(key.value)
            made: dict[Hashable, Any] = super().construct_mapping(node, deep)
            return made

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except yaml.MarkedYAMLError as error:
        # Without PyYAML's excerpt: the line may hold a secret key.
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{path} is not valid YAML: {error.problem}{where}.") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"{path} is not valid YAML: it has bytes that are no text.") from None
