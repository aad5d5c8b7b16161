"""Schemas as pydantic, zod and people write them: followed if they can be, and never in part."""

import json
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from pydantic import (
    AnyUrl,
    AwareDatetime,
    Base64Bytes,
    BaseModel,
    ConfigDict,
    DirectoryPath,
    Field,
    FilePath,
    FutureDate,
    HttpUrl,
    Json,
    NaiveDatetime,
    PastDatetime,
    PostgresDsn,
    SecretStr,
    StringConstraints,
)

from dspark_server.engine.grammar import FormError, GrammarCompiler

from .forms import admits, admits_value

ZOD: dict[str, Any] = json.loads((Path(__file__).parents[1] / "fixtures" / "zod.json").read_text())
ARABIC = "\u0663"


def an_object(**keywords: Any) -> dict[str, Any]:
    return {"type": "object", **keywords}


def an_array(**keywords: Any) -> dict[str, Any]:
    return {"type": "array", **keywords}


# ---- zod ---------------------------------------------------------------------------------------------------------

ZOD_VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "email": (["a.b@c.de"], ["a@b", ".a@b.de"]),
    "uuid": (["00000000-0000-0000-0000-000000000000"], ["00000000-0000-0000-0000-00000000000"]),
    "emoji": (["😀"], ["1", "a"]),
    "hostname": (["a.b-c.de"], ["-a", ".".join(["a" * 60] * 5)]),
    "cidrv4": (["10.0.0.0/8"], ["10.0.0.0"]),
    "base64": (["", "YQ=="], ["Y"]),
    "e164": (["+1234567"], [f"+12345{ARABIC}67"]),
    "jwt": (["anything"], []),
    "date": (["2024-02-29"], ["2023-02-29"]),
    "time": (["10:00", "10:00:00.5"], ["10:00:00Z"]),
    "datetime": (["2024-02-29T10:00:00Z"], ["2024-02-29T10:00:00"]),
    "duration": (["P1DT2H", "PT1,5S", "P3W"], ["P", "P1DT", "P1W1D"]),
    "lower": (["abc"], ["aBc"]),
    "sw": (["a.x"], ["ax"]),
    "inc": (["axb"], ["ab"]),
    "re": (["12a"], [f"1{ARABIC}a", "12é"]),
    "rec": ([{}, {"a b": 1.5}], [{"a": "b"}]),
    "recEnum": ([{"a": 1, "b": 2}], [{"a": 1}, {"a": 1, "b": 2, "c": 3}]),
    "precord": ([{}, {"b": 2}], [{"c": 3}]),
    "recRe": ([{"xy": 1}], [{"y": 1}]),
    "tup": ([["a", 1]], [["a"], ["a", 1, 2]]),
    "du": ([{"kind": "b", "w": "x"}], [{"kind": "a", "w": "x"}]),
    "loose": ([{"q": 1, "z": [2]}], [{"z": 2}]),
    "strict": ([{"q": 1}], [{"q": 1, "z": 2}]),
    "catchall": ([{"q": 1, "z": "a"}], [{"q": 1, "z": 2}]),
    "json": ([{"a": [1, None, {"b": True}]}], []),
    "desc": (["a"], [1]),
}


@pytest.mark.parametrize("name", sorted(ZOD["schemas"]))
def test_every_schema_of_zod(name: str, compiler: GrammarCompiler) -> None:
    schema = an_object(properties={"it": ZOD["schemas"][name]}) | {"$defs": ZOD["$defs"]}
    fits, does_not = ZOD_VALUES.get(name, ([], []))
    form = compiler.json_schema(json.dumps(schema))
    for value in fits:
        assert admits(form, json.dumps({"it": value}, separators=(",", ":"), ensure_ascii=False))
    for value in does_not:
        assert not admits(form, json.dumps({"it": value}, separators=(",", ":"), ensure_ascii=False))


# ---- pydantic ----------------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(9, ge=1, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    name: Annotated[str, StringConstraints(pattern=r"^\w+$", max_length=20)]


class Tree(BaseModel):
    value: int
    children: list["Tree"] = []


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


class Wide(BaseModel):
    """One field of each kind that pydantic has a schema for."""

    when: datetime
    aware: AwareDatetime | None = None
    naive: NaiveDatetime | None = None
    past: PastDatetime | None = None
    day: date
    future: FutureDate | None = None
    hour: time
    length: timedelta
    id: UUID
    url: AnyUrl
    http: HttpUrl | None = None
    dsn: PostgresDsn | None = None
    price: Decimal
    raw: bytes
    encoded: Base64Bytes | None = None
    secret: SecretStr | None = None
    parsed: Json | None = None
    v4: IPv4Address
    v6: IPv6Address | None = None
    nets: tuple[IPv4Network, IPv6Network, IPv4Interface, IPv6Interface] | None = None
    path: Path
    file: FilePath | None = None
    folder: DirectoryPath | None = None
    colour: Colour
    size: Literal["s", "m", 3]
    maybe: str | None = None
    pet: Cat | Dog = Field(discriminator="kind")
    counts: dict[str, int]
    by_colour: dict[Colour, int] = {}
    short_names: dict[Annotated[str, StringConstraints(min_length=1, max_length=3)], int] = {}
    tags: Annotated[list[str], Field(min_length=1, max_length=2)]
    pair: tuple[int, str]
    half: float = Field(gt=0, multiple_of=0.5)
    tree: Tree
    loose: Loose
    mail: str = Field(json_schema_extra={"format": "email"})
    named: str = Field("x", json_schema_extra={"format": "name-email"}, deprecated=True, examples=["y"])


WIDE: dict[str, Any] = {
    "when": "2024-02-29T10:00:00Z",
    "day": "2024-02-29",
    "hour": "10:00:00Z",
    "length": "P1DT2H",
    "id": "6f1e5b2e-0d5c-4f0c-9a53-1f2f3d4c5b6a",
    "url": "https://a.example/b?c=d",
    "price": "1.50",
    "raw": "abc",
    "v4": "10.0.0.1",
    "nets": ["10.0.0.0/8", "::/0", "10.0.0.1/8", "::1/64"],
    "path": "/tmp/x",
    "colour": "blue",
    "size": 3,
    "maybe": None,
    "pet": {"kind": "dog", "name": "Rex"},
    "counts": {"a": 1, "b c": -2},
    "by_colour": {"red": 1},
    "short_names": {"abc": 1},
    "tags": ["a", "b"],
    "pair": [1, "a"],
    "half": 1.5,
    "tree": {"value": 1, "children": [{"value": 2, "children": []}]},
    "loose": {"a": 1, "b": 2},
    "mail": "a@b.de",
    "named": "A <a@b.de>",
}


def test_a_wide_model_of_pydantic(compiler: GrammarCompiler) -> None:
    schema = Wide.model_json_schema()
    Wide.model_validate(WIDE)
    assert admits_value(compiler, schema, WIDE)
    wrong = {
        "day": "2024-02-30", "id": "6f1e", "v4": "10.0.0.256", "colour": "green", "size": "l", "counts": {"a": "b"},
        "pet": {"kind": "dog", "lives": 3}, "by_colour": {"green": 1}, "short_names": {"abcd": 1}, "tags": [],
        "pair": [1], "half": 0.3, "tree": {"value": 1, "more": 2}, "mail": "a",
    }  # fmt: skip
    for name, value in wrong.items():
        assert not admits_value(compiler, schema, {**WIDE, name: value}), name


def test_a_set_is_refused_by_name(compiler: GrammarCompiler) -> None:
    class Tags(BaseModel):
        tags: set[str]

    with pytest.raises(FormError, match="uniqueItems"):
        compiler.json_schema(json.dumps(Tags.model_json_schema()))


FORMATS = [
    "date-time", "date", "time", "duration", "email", "idn-email", "name-email", "uri", "uri-reference", "iri",
    "uuid", "uuid1", "uuid3", "uuid4", "uuid5", "uuid7", "ipv4", "ipv6", "ipvanyaddress", "ipvanyinterface",
    "ipvanynetwork", "ipv4network", "ipv6network", "ipv4interface", "ipv6interface", "binary", "byte", "base64",
    "base64url", "path", "file-path", "directory-path", "password", "json-string", "json-pointer",
    "multi-host-uri", "regex", "color", "decimal", "phone", "int32", "emoji", "nanoid", "cuid", "cuid2", "ulid",
    "xid", "ksuid", "cidrv4", "cidrv6", "e164", "jwt", "guid", "url", "lowercase", "uppercase", "starts_with",
    "ends_with", "includes", "hostname", "mac", "unknown", "made-up",
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_kept_to_or_an_annotation(name: str, compiler: GrammarCompiler) -> None:
    """Those that llguidance knows are kept to; beside a pattern each is an annotation."""
    known = {"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"}
    assert admits_value(compiler, {"type": "string", "format": name}, "?! ?!") == (name not in known)
    assert admits_value(compiler, {"type": "string", "format": name, "pattern": r"^\d$"}, "7")
    assert not admits_value(compiler, {"type": "string", "format": name, "pattern": r"^\d$"}, ARABIC)


# ---- keywords ----------------------------------------------------------------------------------------------------

VOID: list[dict[str, Any]] = [
    {"uniqueItems": False}, {"uniqueItems": True, "maxItems": 1}, {"not": False}, {"not": {"not": {}}},
    {"not": {"not": {"title": "x"}}}, {"contains": {"type": "string"}, "minContains": 0}, {"minContains": 0},
    {"minContains": 2, "maxContains": 3}, {"unevaluatedItems": True}, {"unevaluatedItems": {}},
    {"unevaluatedProperties": True}, {"dependentRequired": {}}, {"dependentRequired": {"a": []}},
    {"dependentSchemas": {}}, {"dependentSchemas": {"a": True, "b": {}}}, {"dependencies": {}},
    {"dependencies": {"a": [], "b": {}}}, {"if": {"type": "string"}}, {"then": False}, {"else": {"type": "string"}},
    {"if": {"minItems": 1}, "then": True, "else": {}}, {"propertyNames": True}, {"propertyNames": {}},
    {"propertyNames": {"type": "string"}}, {"propertyNames": {"type": ["string", "null"], "minLength": 0}},
    {"propertyNames": {"format": "made-up", "description": "x", "maximum": 5}}, {"allOf": []}, {"allOf": [{}, True]},
    {"$comment": "x", "default": 1, "examples": [{"$ref": "x", "not": 1}], "title": "x", "description": "x"},
    {"readOnly": True, "writeOnly": False, "deprecated": True, "nullable": True, "externalDocs": {"url": "x"}},
    {"discriminator": {"propertyName": "kind", "mapping": {"a": "#/a"}}, "example": {"uniqueItems": True}},
    {"contentSchema": {"type": "string"}, "contentEncoding": "x", "contentMediaType": "y", "$vocabulary": {}},
    {"x-order": 1, "xml": {"name": "x"}, "minItems": 0, "required": [], "minProperties": 0},
]  # fmt: skip


@pytest.mark.parametrize("keywords", VOID, ids=json.dumps)
def test_what_constrains_nothing_is_not_refused(keywords: dict[str, Any], compiler: GrammarCompiler) -> None:
    for value in ([], ["a"], ["a"] * keywords.get("maxItems", 2)):
        assert admits_value(compiler, an_array(**keywords), value)
    nested = {"anyOf": [an_object(properties={"a": an_array(**keywords)}), {"$ref": "#/$defs/x"}]}
    nested["$defs"] = {"x": an_array(items=an_array(**keywords))}  # type: ignore[assignment]
    assert admits_value(compiler, nested, {"a": ["b"]})
    assert admits_value(compiler, nested, [["b"]])


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"contains": {"type": "string"}}, "contains"),
        ({"contains": {"type": "string"}, "minContains": 0, "maxContains": 1}, "contains"),
        ({"unevaluatedItems": False}, "unevaluatedItems"),
        ({"unevaluatedProperties": {"type": "string"}}, "unevaluatedProperties"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"dependentSchemas": {"a": {"type": "object"}}}, "dependentSchemas"),
        ({"dependencies": {"a": ["b"]}}, "dependencies"),
        ({"if": {"minItems": 1}, "then": {"maxItems": 2}}, "if"),
        ({"propertyNames": {"format": "date"}}, "propertyNames"),
        ({"propertyNames": {"type": "integer"}}, "propertyNames"),
        ({"propertyNames": {"pattern": "a"}, "properties": {"b": {}}}, "propertyNames"),
        ({"pattern": r"\bx"}, "word boundaries"),
        ({"$dynamicRef": "#x"}, "dynamicRef"),
        ({"not": {}}, "no answer"),
    ],
)
def test_what_constrains_is_refused_by_name(keywords: dict[str, Any], named: str, compiler: GrammarCompiler) -> None:
    with pytest.raises(FormError, match=named):
        compiler.json_schema(json.dumps(keywords))


def test_patterns_are_ascii_wherever_they_stand(compiler: GrammarCompiler) -> None:
    schema = an_object(
        properties={"a": {"$ref": "#/components/schemas/X"}},
        patternProperties={r"^x\s\d$": {"type": "string", "pattern": r"^[^\D]\\d\s$"}},
        components={"schemas": {"X": {"type": "string", "pattern": r"^\s\w$"}}},
    )
    assert admits_value(compiler, schema, {"a": " w", "x 1": "1\\d "})
    for value in ({"a": "\u00a0w"}, {"a": " é"}, {f"x {ARABIC}": "1\\d "}, {"x 1": f"{ARABIC}\\d "}, {"x 1": "1\\1 "}):
        assert not admits_value(compiler, schema, value)


# ---- closed objects ----------------------------------------------------------------------------------------------

BASE = {"$defs": {"base": an_object(properties={"a": {"type": "integer"}}, required=["a"])}}
CLOSED: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "its names": (an_object(properties={"a": {}}), {"a": 1}, True),
    "others": (an_object(properties={"a": {}}), {"a": 1, "b": 2}, False),
    "no names at all": (an_object(properties={}), {"b": 2}, False),
    "any object": (an_object(), {"b": 2}, True),
    "said to be open": (an_object(properties={"a": {}}, additionalProperties=True), {"a": 1, "b": 2}, True),
    "said to be open, otherwise": (an_object(properties={"a": {}}, unevaluatedProperties=True), {"b": 2}, True),
    "a pattern": (an_object(properties={"a": {}}, patternProperties={"^x": {}}), {"a": 1, "x": 2}, True),
    "beside a pattern": (an_object(properties={"a": {}}, patternProperties={"^x": {}}), {"y": 2}, False),
    "required alone": (an_object(properties={"a": {}}, required=["b"]), {"a": 1, "b": 2}, True),
    "nested": (an_object(properties={"a": {"items": an_object(properties={"b": {}})}}), {"a": [{"c": 1}]}, False),
    "together": ({"allOf": [{"$ref": "#/$defs/base"}, {"properties": {"b": {}}}], **BASE}, {"a": 1, "b": 2}, True),
    "together, others": ({"allOf": [{"$ref": "#/$defs/base"}, {"properties": {"b": {}}}], **BASE}, {"c": 2}, False),
    "one of all": ({"allOf": [{"$ref": "#/$defs/base"}], "description": "x", **BASE}, {"a": 1, "b": 2}, False),
    "beside a reference": ({"$ref": "#/$defs/base", "properties": {"b": {}}, **BASE}, {"a": 1, "b": 2}, True),
    "alternatives": ({"anyOf": [an_object(properties={"a": {}}), an_object(properties={"b": {}})]}, {"b": 1}, True),
    "mixed": ({"anyOf": [an_object(properties={"a": {}}), an_object(properties={"b": {}})]}, {"a": 1, "b": 1}, False),
    "beside alternatives": (
        an_object(properties={"a": {}}, anyOf=[{"required": ["a"]}, {"properties": {"b": {}}, "required": ["b"]}]),
        {"b": 1},
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CLOSED)
def test_objects_are_closed_unless_they_speak_of_others(case: str, compiler: GrammarCompiler) -> None:
    schema, value, fits = CLOSED[case]
    assert admits_value(compiler, schema, value) == fits


def test_with_the_setting_off_they_are_as_json_schema_has_them(compiler: GrammarCompiler) -> None:
    assert admits_value(compiler, an_object(properties={"a": {}}), {"a": 1, "b": 2}, closed=False)
    assert not admits_value(
        compiler, an_object(properties={"a": {}}, additionalProperties=False), {"b": 2}, closed=False
    )


def test_white_space_is_let_through_where_it_is_asked_for(compiler: GrammarCompiler) -> None:
    schema = json.dumps(an_object(properties={"a": {"type": "string"}}))
    assert not admits(compiler.json_schema(schema), '{"a": "b"}')
    assert admits(compiler.json_schema(schema), '{"a":"b  c"}')
    flexible = compiler.json_schema(schema, compact=False)
    assert admits(flexible, '{"a":"b"}')
    assert admits(flexible, '{\n  "a": "b"\n}')
    assert not admits(flexible, '{"a":' + " " * 17 + '"b"}')


@pytest.mark.parametrize("depth", [300, 500, 2000])  # beyond what orjson writes, what Python calls, what orjson reads
def test_a_schema_that_is_too_deep_is_refused(compiler: GrammarCompiler, depth: int) -> None:
    with pytest.raises(FormError, match=r"nested too deeply|depth limit"):
        compiler.json_schema('{"items":' * depth + "{}" + "}" * depth)
