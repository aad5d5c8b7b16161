"""Closes objects that name their properties and say nothing of others, as by `unevaluatedProperties: false`.

An object whose names come from one schema is closed there, by `additionalProperties: false`. One that several schemas
describe together (`allOf`, or `$ref` and `anyOf` beside `properties`) is closed over the names of all of them, and
those schemas stay open.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from dspark_server.engine.json_pointer import resolved, steps

SPEAKS_OF_OTHERS = ("additionalProperties", "unevaluatedProperties")


class Closing:
    """Closes schemas of one document; knows which of them describe one object together with others."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._open: set[int] = set()  # ids of parsed schemas whose object another schema closes
        for node in _objects(root):
            if len(self._namers(node)) > 1:
                for part in self._parts(node):
                    self._open.update(map(id, self._together(part, set())))

    def closed(self, given: Mapping[str, Any], node: dict[str, Any]) -> dict[str, Any]:
        """`node`, made from the schema `given`, with the keywords that close it where needed."""
        if id(given) in self._open or any(key in given or key in node for key in SPEAKS_OF_OTHERS):
            return node
        namers = self._namers(given)
        if not namers or (len(namers) == 1 and namers[0] is not given):
            return node  # closed in that schema, if at all
        together = list(self._together(given, set()))
        if len(namers) > 1 and any(
            key in each for each in together for key in (*SPEAKS_OF_OTHERS, "patternProperties")
        ):
            return node
        names = {name: True for each in together for name in (*_names(each, "properties"), *_names(each, "required"))}
        if names.keys() == dict.fromkeys(_names(given, "properties")).keys():
            return {**node, "additionalProperties": False}
        rest: dict[str, Any] = {"properties": names, "additionalProperties": False}
        if "patternProperties" in node:
            rest["patternProperties"] = dict.fromkeys(node["patternProperties"], True)
        return {**node, "allOf": [*node.get("allOf", ()), rest]}

    def _namers(self, node: Mapping[str, Any]) -> list[Any]:
        """The node itself and the groups of its parts that name properties; alternatives are one group."""
        own = [node] if any(isinstance(node.get(key), dict) for key in ("properties", "patternProperties")) else []
        groups = [[part] for part in self._parts(node, ("allOf",))]
        groups += [list(self._parts(node, keys)) for keys in (("anyOf",), ("oneOf",), ("then", "else"), ("$ref",))]
        return own + [
            group
            for group in groups
            if any("properties" in each for part in group for each in self._together(part, {id(node)}))
        ]

    def _parts(
        self, node: Mapping[str, Any], keys: tuple[str, ...] = ("allOf", "anyOf", "oneOf", "then", "else", "$ref")
    ) -> Iterator[Any]:
        """The schemas that apply to the same value as `node` does."""
        for key in keys:
            value = node.get(key)
            if key == "$ref":
                value = resolved(self._root, steps(value))
            yield from value if isinstance(value, list) else [value]

    def _together(self, node: Any, seen: set[int]) -> Iterator[Mapping[str, Any]]:
        """A schema and all that apply to the same value, except those `seen` (by id)."""
        waiting = [node]
        while waiting:
            each = waiting.pop()
            if isinstance(each, dict) and id(each) not in seen:
                seen.add(id(each))
                yield each
                waiting.extend(self._parts(each))


def _names(node: Mapping[str, Any], key: str) -> list[str]:
    return [name for name in node.get(key) or () if isinstance(name, str)]


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    if isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _objects(each)
