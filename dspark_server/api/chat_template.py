"""Renders a conversation to a prompt: the checkpoint's chat template, run in Jinja's sandbox as transformers runs it.

A template comes with a checkpoint or from the operator (`--chat-template`), never from a request.
"""

import asyncio
import json
import logging
import secrets
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dspark_server.api.chat_schema import Conversation
from dspark_server.errors import ConfigError, RequestError

logger = logging.getLogger(__name__)

MAX_PROMPT = 32 << 20  # characters
LONGEST_REASON = 300  # characters of a template's own error message shown to a client

NO_TEMPLATE = (
    "This model has no chat template. Use /v1/completions, or start the server with one: --chat-template FILE (Jinja)."
)


class ChatTemplate:
    """The chat template of one model: one text, or one per purpose ("default", "tool_use"). Thread-safe."""

    def __init__(self, source: str | dict[str, str] | None, special_tokens: dict[str, str] | None = None) -> None:
        """Raises jinja2.TemplateSyntaxError."""
        named = {"default": source} if isinstance(source, str) else source or {}
        self._templates = {name: _Template(text) for name, text in named.items()}
        self._special_tokens = special_tokens or {}  # bos_token and the like, by name

    @classmethod
    def load(cls, tokenizer: Any, path: str | None) -> "ChatTemplate":
        """Load the template from a file, or else the tokenizer's.

        Raises ConfigError if the file cannot be used. An unusable template of a checkpoint is logged and left out: the
        model works without one.
        """
        special_tokens = dict(tokenizer.special_tokens_map)
        if path is not None:
            try:
                return cls(Path(path).read_text(encoding="utf-8"), special_tokens)
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"--chat-template: {path} cannot be read: {error}") from None
            except TemplateSyntaxError as error:
                raise ConfigError(f"--chat-template: {path}, line {error.lineno}: {error.message}") from None
        try:
            return cls(tokenizer.chat_template, special_tokens)
        except TemplateSyntaxError as error:
            logger.error("the model's chat template cannot be used: line %d: %s", error.lineno, error.message)
            return cls(None, special_tokens)

    @property
    def exists(self) -> bool:
        """Whether there is a template for plain messages."""
        return "default" in self._templates

    async def render(self, conversation: Conversation) -> str:
        """Render a conversation's prompt, off the event loop. Raises RequestError with the template's own message."""
        return await asyncio.to_thread(self.render_now, conversation)

    def render_now(self, conversation: Conversation) -> str:
        """Render the prompt on the calling thread."""
        turns, tools = conversation.turns(), conversation.shown_tools
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
            raise RequestError(NO_TEMPLATE, param="messages", code="no_chat_template")
        template.warn_unused([*conversation.chat_template_kwargs, *(["tools"] if tools else [])])
        if not template.knows_developers:
            turns = [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in turns]
        mark = ""
        if conversation.continue_final_message:
            mark = secrets.token_hex(16) + " "
            turns[-1]["content"] += mark
        prompt = template.render(
            {
                **self._special_tokens,
                **conversation.chat_template_kwargs,
                "messages": turns,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": conversation.opens_answer,
            }
        )
        return _cut_at(mark, prompt) if mark else prompt


class _Template:
    """One compiled template."""

    def __init__(self, source: str) -> None:
        environment = _environment()
        self._variables = meta.find_undeclared_variables(environment.parse(source))
        self._template = environment.from_string(source)
        self.knows_developers = "developer" in source  # else developer messages become OpenAI's older "system"

    def warn_unused(self, given: list[str]) -> None:
        """Log the variables of a request that the template does not use."""
        unused = [name for name in given if name not in self._variables]
        if unused:
            shown = ", ".join(repr(name[:40]) for name in unused[:8])
            logger.warning("the chat template does not use %s", shown)

    def render(self, variables: dict[str, Any]) -> str:
        """Return the rendered text. Raises RequestError if the template refuses, fails, or writes too much."""
        pieces, size = [], 0
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_PROMPT:
                    break
        except Exception as error:  # a template may raise anything on data it was not written for
            reason = str(error)[:LONGEST_REASON] or type(error).__name__
            raise RequestError(
                f"The chat template cannot render these messages: {reason}",
                param="messages",
                code="chat_template_error",
            ) from None
        if size > MAX_PROMPT:
            raise RequestError(
                f"The conversation is too long: over {MAX_PROMPT} characters.",
                param="messages",
                code="context_length_exceeded",
            )
        return "".join(pieces)


def _cut_at(mark: str, prompt: str) -> str:
    """Return the prompt up to the mark, and without the space before it if the template strips messages."""
    place = prompt.rfind(mark.strip())
    if place < 0:
        raise RequestError(
            "The chat template leaves the last message out or changes it; it cannot be continued.",
            param="continue_final_message",
        )
    kept = prompt[:place]
    return kept if prompt.startswith(mark, place) else kept.rstrip()


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's own text for trainers; here it is ordinary text."""

    tags = {"generation"}  # noqa: RUF012 (as in the base)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the Jinja environment that checkpoints' templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
