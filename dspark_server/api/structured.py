"""From `response_format` and `structured_outputs` to a compiled form, off the event loop, capped in size and time."""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import orjson

from dspark_server.api.schema import MAX_GRAMMAR, GenerationRequest
from dspark_server.engine.engine import AsyncEngine
from dspark_server.errors import RequestError

if TYPE_CHECKING:
    from dspark_server.engine.grammar import CompiledForm, GrammarCompiler

COMPILE_SECONDS = 10.0
KEPT_FORMS = 64

Form = tuple[str, str, str]  # the field to blame, kind, text


class StructuredForms:
    """Compiles the forms that requests ask for, and keeps the latest."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._compiler: GrammarCompiler | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        # By tenant too: by the time a form takes nobody may learn that another uses it.
        self._kept: OrderedDict[tuple[str, str, str], CompiledForm] = OrderedDict()

    def warm_up(self) -> None:
        """Make the compiler, which holds the interpreter for up to seconds: before there are requests to wait."""
        self._compiler_now()

    async def of(self, body: GenerationRequest, tenant: str) -> "CompiledForm | None":
        """The form a request asks for; None for free text. Raises RequestError."""
        form = asked_form(body)
        if form is None:
            return None
        param, kind, text = form
        if len(text) > MAX_GRAMMAR:
            raise RequestError(f"`{param}` may have at most {MAX_GRAMMAR} characters.", param=param)
        found = self._kept.get((tenant, kind, text))
        if found is None:
            found = await self._compile(param, kind, text)
            self._kept[tenant, kind, text] = found
            while len(self._kept) > KEPT_FORMS:
                self._kept.popitem(last=False)
        self._kept.move_to_end((tenant, kind, text))
        return found

    async def _compile(self, param: str, kind: str, text: str) -> "CompiledForm":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(COMPILE_SECONDS):
                return await loop.run_in_executor(self._thread, self._compile_now, kind, text)
        except TimeoutError:
            raise RequestError(f"`{param}` took too long to compile; use a simpler form.", param=param) from None
        except ValueError as error:
            raise RequestError(f"`{param}` cannot be followed: {str(error)[:200]}", param=param) from None

    def _compiler_now(self) -> "GrammarCompiler":
        from dspark_server.engine.grammar import GrammarCompiler  # only where it is used: it takes memory

        if self._compiler is None:
            self._compiler = GrammarCompiler(self._engine.tokenizer, self._engine.vocab_size)
        return self._compiler

    def _compile_now(self, kind: str, text: str) -> "CompiledForm":
        compiler = self._compiler_now()
        if kind == "regex":
            return compiler.regex(text)
        return compiler.choice(orjson.loads(text)) if kind == "choice" else compiler.json_schema(text)


def asked_form(body: GenerationRequest) -> Form | None:
    """What a body says of the form of its answer. Raises RequestError where it says too much or too little."""
    forms: list[Form] = []
    structured, wanted = body.structured_outputs, body.response_format
    if structured is not None:
        param = "structured_outputs"
        if structured.json_ is not None:
            schema = structured.json_
            forms.append((param, "json", schema if isinstance(schema, str) else orjson.dumps(schema).decode()))
        if structured.json_object:
            forms.append((param, "json", '{"type":"object"}'))
        if structured.regex is not None:
            forms.append((param, "regex", structured.regex))
        if structured.choice is not None:
            forms.append((param, "choice", orjson.dumps(structured.choice).decode()))
        if len(forms) != 1:
            raise RequestError(
                "`structured_outputs` needs exactly one of json, json_object, regex, choice.", param=param
            )
    if wanted is not None and wanted.type != "text":
        param, schema_text = "response_format", '{"type":"object"}'
        if wanted.type == "json_schema":
            given = (wanted.json_schema or {}).get("schema")
            if not isinstance(given, dict):
                raise RequestError('`response_format` needs {"json_schema": {"schema": {...}}}.', param=param)
            schema_text = orjson.dumps(given).decode()
        forms.append((param, "json", schema_text))
    if len(forms) > 1:
        raise RequestError("Use `response_format` or `structured_outputs`, not both.", param="response_format")
    return forms[0] if forms else None
