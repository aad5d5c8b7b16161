"""Prepares JSON schemas for llguidance: removes keywords that constrain nothing, and translates patterns.

llguidance refuses every keyword that it cannot enforce, also with a value that every answer meets (`uniqueItems:
false`). Only such values are removed here; keywords that constrain stay, and llguidance refuses them by name.
"""

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from dspark_server.engine.json_closing import Closing
from dspark_server.engine.json_pointer import resolved, steps, targets
from dspark_server.engine.regex import conjuncts, to_rust

Schema = Any  # an object or a boolean, as parsed

# Formats that llguidance enforces. Others are annotations, as JSON Schema says, and so is one beside a `pattern`.
FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
)
# A pattern that zod sends (z.iso.duration), with look-arounds so that something follows `P` and `T`; and without them.
DATES, TIMES = r"\d+Y(\d+M)?(\d+D)?|\d+M(\d+D)?|\d+D", r"\d+H(\d+M)?({0})?|\d+M({0})?|{0}".format(r"\d+([.,]\d+)?S")
PLAIN = {
    r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$": (
        f"^P(?:\\d+W|(?:{DATES})(?:T(?:{TIMES}))?|T(?:{TIMES}))$"
    )
}
ANNOTATIONS = frozenset(
    (
        *("$anchor", "$comment", "$defs", "$id", "$schema", "$vocabulary", "contentEncoding", "contentMediaType"),
        *("contentSchema", "default", "definitions", "deprecated", "description", "examples", "id", "readOnly"),
        *("title", "writeOnly"),
    )
)
OF_STRINGS = frozenset(("minLength", "maxLength", "pattern", "format"))
OF_VALUES = frozenset(("enum", "const", "not", "allOf", "anyOf", "oneOf", "$ref", "if", "then", "else", "$dynamicRef"))

ONE = (
    *("additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not"),
    *("propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"),
)
SEVERAL = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
NAMED = ("$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties")
DATA = ("const", "default", "enum", "example", "examples", "required", "x-guidance")  # hold no schemas


def prepared(text: str, *, closed: bool) -> str:
    """An equivalent schema (JSON text) for llguidance.

    `closed`: objects that name their properties and say nothing of others have no others. Raises ValueError for an
    unsupported pattern, for a schema that no answer satisfies, and for text that is not JSON.
    """
    schema = orjson.loads(text)
    made = _Preparation(schema, closed).schema(schema, ())
    if made is False:
        raise ValueError("no answer satisfies the schema")
    try:
        return orjson.dumps({} if made is True else made).decode()
    except orjson.JSONEncodeError:  # objects within objects 255 times
        raise ValueError("it is nested too deeply") from None


class _Preparation:
    def __init__(self, root: Schema, closed: bool) -> None:
        self._root = root
        self._places = set(targets(root))
        self._closing = Closing(root) if closed else None

    def schema(self, given: Schema, place: tuple[str, ...]) -> Schema:
        """Prepare a schema at a `place` of the document, and all below it."""
        if not isinstance(given, dict):
            return given
        node = {key: self._below(key, value, (*place, key)) for key, value in given.items()}
        if isinstance(node.get("pattern"), str):
            pattern = PLAIN.get(node["pattern"], node["pattern"])
            first, *others = map(to_rust, conjuncts(pattern))
            node["pattern"] = first
            if others:
                node["allOf"] = [*node.get("allOf", ()), *({"type": "string", "pattern": other} for other in others)]
        if isinstance(node.get("patternProperties"), dict):
            node["patternProperties"] = {to_rust(key): value for key, value in node["patternProperties"].items()}
        if isinstance(names := node.get("propertyNames"), dict) and "$ref" in names:
            self._refer(names)
        if is_true(node.get("not", False)):
            return False
        for key, void in VOID.items():
            if key in node and void(node[key], node):
                del node[key]
        if "propertyNames" in node:
            _name_properties(node)
        return node if self._closing is None else self._closing.closed(given, node)

    def _refer(self, names: dict[str, Any]) -> None:
        """Replace `$ref` by its target (pydantic refers to the names of an enumeration)."""
        way = steps(names["$ref"])
        if way is not None and ANNOTATIONS.issuperset(names.keys() - {"$ref"}):
            del names["$ref"]
            found = self.schema(resolved(self._root, way), way)
            names.update(found if isinstance(found, dict) else {"allOf": [found]})

    def _below(self, key: str, value: Any, place: tuple[str, ...]) -> Any:
        if key in NAMED and isinstance(value, dict):
            return {name: self.schema(each, (*place, name)) for name, each in value.items()}
        if key in SEVERAL and isinstance(value, list):
            return [self.schema(each, (*place, str(number))) for number, each in enumerate(value)]
        return self.schema(value, place) if key in ONE else self._elsewhere(key, value, place)

    def _elsewhere(self, key: str, value: Any, place: tuple[str, ...]) -> Any:
        """Prepare a value that is no schema, or a schema that only references use (OpenAPI's `components`)."""
        if key in DATA or not isinstance(value, dict):
            return value
        if place in self._places:
            return self.schema(value, place)
        return {name: self._elsewhere(name, each, (*place, name)) for name, each in value.items()}


def is_true(schema: Schema) -> bool:
    """Whether a schema trivially admits everything: true, or only annotations."""
    return schema is True or (isinstance(schema, dict) and ANNOTATIONS.issuperset(schema))


def _all(void: Callable[[Any], bool]) -> Callable[[Any, Mapping[str, Any]], bool]:
    return lambda value, node: isinstance(value, dict) and all(map(void, value.values()))


def _asks_nothing(value: Any) -> bool:
    return value == [] or is_true(value)


# By keyword: whether its value constrains nothing, given its node. In order: removing one may void a later one.
VOID: dict[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    **dict.fromkeys(("$vocabulary", "deprecated", "contentSchema"), lambda value, node: True),
    "format": lambda value, node: isinstance(value, str) and (value not in FORMATS or "pattern" in node),
    "uniqueItems": lambda value, node: value is False or node.get("maxItems") in (0, 1),
    "not": lambda value, node: value is False,
    "contains": lambda value, node: node.get("minContains") == 0 and "maxContains" not in node,
    "minContains": lambda value, node: "contains" not in node,
    "maxContains": lambda value, node: "contains" not in node,
    "unevaluatedItems": lambda value, node: is_true(value),
    "unevaluatedProperties": lambda value, node: is_true(value),
    "dependentRequired": _all(lambda value: value == []),
    "dependentSchemas": _all(_asks_nothing),
    "dependencies": _all(_asks_nothing),
    "then": lambda value, node: is_true(value) or "if" not in node,
    "else": lambda value, node: is_true(value) or "if" not in node,
    "if": lambda value, node: "then" not in node and "else" not in node,
    "propertyNames": lambda value, node: not _of_strings(value),
}


def _of_strings(schema: Schema) -> Schema:
    """The rules of a schema for strings; an empty one if there are none, and the schema itself if unsure."""
    if not isinstance(schema, dict):
        return {} if schema is True else {"enum": []}
    kinds = schema.get("type", "string")
    if kinds != "string" and (not isinstance(kinds, list) or "string" not in kinds):
        return schema
    unsure = {key: value for key, value in schema.items() if key in OF_STRINGS | OF_VALUES}
    return {key: value for key, value in unsure.items() if (key, value) != ("minLength", 0)}


def _name_properties(node: dict[str, Any]) -> None:
    """Express `propertyNames` by keywords that llguidance knows, where possible: names, a pattern, a length."""
    if "properties" in node or "patternProperties" in node:
        return
    rules = _of_strings(node["propertyNames"])
    value = node.get("additionalProperties", True)
    if len(rules) == 1 and ("enum" in rules or "const" in rules):
        names = rules.get("enum", [rules.get("const")])
        named = {"properties": {name: value for name in names if isinstance(name, str)}}
    elif rules.keys() == {"pattern"}:
        named = {"patternProperties": {rules["pattern"]: value}}
    elif rules.keys() <= {"minLength", "maxLength"} and all(isinstance(each, int) for each in rules.values()):
        length = f"{rules.get('minLength', 0)},{rules.get('maxLength', '')}"
        named = {"patternProperties": {f"^(?s:.{{{length}}})$": value}}
    else:
        return
    del node["propertyNames"]
    node.update(named, additionalProperties=False)
