"""References of a JSON schema into its own document (RFC 6901 in a URI's fragment)."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote


def steps(reference: Any) -> tuple[str, ...] | None:
    """Path from the root that `#/a/b` names; None for any value that does not point into the document."""
    if reference == "#":
        return ()
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    return tuple(unquote(step).replace("~1", "/").replace("~0", "~") for step in reference[2:].split("/"))


def resolved(root: Any, way: tuple[str, ...] | None) -> Any:
    """The value at a path in a document; None if there is none."""
    found = root
    if way is None:
        return None
    for step in way:
        if isinstance(found, dict):
            found = found.get(step)
        elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            return None
    return found


def targets(value: Any) -> Iterator[tuple[str, ...]]:
    """Paths in a document that its own references point to."""
    if isinstance(value, dict) and (way := steps(value.get("$ref"))) is not None:
        yield way
    if isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from targets(each)
