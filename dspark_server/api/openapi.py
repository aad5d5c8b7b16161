"""JSON schemas of request bodies, for /openapi.json; reference.py makes docs/api.md from them."""

from typing import Any

from dspark_server.api.schema import Body


def body_schema(kind: type[Body], required: str) -> dict[str, Any]:
    """Return a body's JSON schema, without references; every field but `required` may be null.

    `x-refused` lists the fields that are known but not supported: a value with an effect gives a 400.
    """
    schema = kind.model_json_schema(ref_template="#/$defs/{model}")
    definitions = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                here = {name: resolve(inner) for name, inner in value.items() if name != "$ref"}
                return {**resolve(definitions[value["$ref"].rsplit("/", 1)[1]]), **here}
            return {name: resolve(inner) for name, inner in value.items()}
        return [resolve(inner) for inner in value] if isinstance(value, list) else value

    schema = resolve(schema)
    _allow_null(schema, except_for=required)
    schema["required"] = [required]
    if kind.unsupported:
        schema["x-refused"] = sorted(kind.unsupported)
    return dict(schema)


def _allow_null(schema: dict[str, Any], *, except_for: str | None = None) -> None:
    """Allow null in every field but `except_for`. Titles are removed: they repeat the names."""
    schema.pop("title", None)
    for name, value in schema.get("properties", {}).items():
        for part in (value, value.get("items", {}), *value.get("anyOf", ())):
            _allow_null(part)
        if name != except_for:
            about = {key: value.pop(key) for key in ("description", "default") if key in value}
            choices = value["anyOf"] if set(value) == {"anyOf"} else [value]
            schema["properties"][name] = {
                "anyOf": [*(choice for choice in choices if choice != {"type": "null"}), {"type": "null"}],
                **about,
            }
