"""Compiles `response_format` and `structured_outputs` to forms, off the event loop, limited in size and time."""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from dspark_server.api.schema import MAX_GRAMMAR, GenerationRequest, StructuredOutputs
from dspark_server.api.settings import StructuredOutputsConfig
from dspark_server.engine.engine import AsyncEngine
from dspark_server.errors import RequestError

if TYPE_CHECKING:
    from dspark_server.engine.grammar import CompiledForm, GrammarCompiler

COMPILE_SECONDS = 10.0
KEPT_FORMS = 64

ANY_OBJECT = '{"type":"object"}'


@dataclass(frozen=True)
class Form:
    """A requested form. `param`: the field named in errors; `compact`, `closed`: see `GrammarCompiler.json_schema`."""

    param: str
    kind: str
    text: str
    compact: bool = True
    closed: bool = True


class StructuredForms:
    """Compiles the requested forms, and keeps the latest."""

    def __init__(self, engine: AsyncEngine, config: StructuredOutputsConfig) -> None:
        self._engine = engine
        self._config = config
        self._compiler: GrammarCompiler | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        # By tenant too: the time for a form must not reveal that another tenant uses it.
        self._kept: OrderedDict[tuple[str, Form], CompiledForm] = OrderedDict()

    def warm_up(self) -> None:
        """Create the compiler, which holds the interpreter for up to seconds, before any request waits."""
        self._compiler_now()

    async def of(self, body: GenerationRequest, tenant: str) -> "CompiledForm | None":
        """Return the form that a request asks for; None for free text. Raises RequestError."""
        form = asked_form(body, self._config)
        if form is None:
            return None
        if len(form.text) > MAX_GRAMMAR:
            raise RequestError(f"`{form.param}` may have at most {MAX_GRAMMAR} characters.", param=form.param)
        found = self._kept.get((tenant, form))
        if found is None:
            found = await self._compile(form)
            self._kept[tenant, form] = found
            while len(self._kept) > KEPT_FORMS:
                self._kept.popitem(last=False)
        self._kept.move_to_end((tenant, form))
        return found

    async def _compile(self, form: Form) -> "CompiledForm":
        loop, param = asyncio.get_running_loop(), form.param
        try:
            async with asyncio.timeout(COMPILE_SECONDS):
                return await loop.run_in_executor(self._thread, self._compile_now, form)
        except TimeoutError:
            raise RequestError(f"`{param}` took too long to compile; use a simpler form.", param=param) from None
        except ValueError as error:
            raise RequestError(f"`{param}` cannot be followed: {str(error)[:200]}", param=param) from None

    def _compiler_now(self) -> "GrammarCompiler":
        from dspark_server.engine.grammar import GrammarCompiler  # only where it is used: it takes memory

        if self._compiler is None:
            self._compiler = GrammarCompiler(self._engine.tokenizer, self._engine.vocab_size)
        return self._compiler

    def _compile_now(self, form: Form) -> "CompiledForm":
        compiler = self._compiler_now()
        match form.kind:
            case "regex":
                return compiler.regex(form.text)
            case "grammar":
                return compiler.grammar(form.text)
            case "choice":
                return compiler.choice(orjson.loads(form.text))
        return compiler.json_schema(form.text, compact=form.compact, closed=form.closed)


def asked_form(body: GenerationRequest, config: StructuredOutputsConfig) -> Form | None:
    """Return the form that a body asks for. Raises RequestError unless the fields describe exactly one."""
    compact, closed = config.disable_any_whitespace, config.disable_additional_properties
    wanted, forms = body.response_format, []
    if body.structured_outputs is not None:
        forms.append(_structured(body.structured_outputs, compact, closed))
    if wanted is not None and wanted.type != "text":
        param, schema = "response_format", ANY_OBJECT
        if wanted.type == "json_schema":
            given = (wanted.json_schema or {}).get("schema")
            if not isinstance(given, dict):
                raise RequestError('`response_format` needs {"json_schema": {"schema": {...}}}.', param=param)
            schema = _text(given, param)
        forms.append(Form(param, "json", schema, compact, closed))
    if len(forms) > 1:
        raise RequestError("Use `response_format` or `structured_outputs`, not both.", param="response_format")
    return forms[0] if forms else None


def _structured(asked: StructuredOutputs, compact: bool, closed: bool) -> Form:
    texts = {"regex": asked.regex, "grammar": asked.grammar}
    texts["choice"] = None if asked.choice is None else _text(asked.choice, "structured_outputs")
    forms = [(kind, text) for kind, text in texts.items() if text is not None]
    if asked.json_ is not None:
        schema = asked.json_ if isinstance(asked.json_, str) else _text(asked.json_, "structured_outputs")
        forms.append(("json", schema))
    if asked.json_object:
        forms.append(("json", ANY_OBJECT))
    if len(forms) != 1:
        raise RequestError(
            "`structured_outputs` needs exactly one of json, json_object, regex, choice, grammar.",
            param="structured_outputs",
        )
    if asked.disable_any_whitespace is not None:
        compact = asked.disable_any_whitespace
    if asked.disable_additional_properties is not None:
        closed = asked.disable_additional_properties
    return Form("structured_outputs", *forms[0], compact, closed)


def _text(value: Any, param: str) -> str:
    """JSON of a parsed part of the body. Raises RequestError for more depth than orjson writes: it reads more."""
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        raise RequestError(f"`{param}` is nested too deeply.", param=param) from None
