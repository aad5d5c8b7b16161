"""POST /tokenize and POST /detokenize, in vLLM's shapes.

They have their own thread and tokenizer: a long text delays neither the event loop nor the prompts of completions,
whose tokens are the same.
"""

import asyncio
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import orjson
from fastapi import Request, Response
from pydantic import Field

from dspark_server.api.chat_schema import Conversation
from dspark_server.api.chat_template import ChatTemplate
from dspark_server.api.intake import Intake
from dspark_server.api.messages_schema import MessagesRequest
from dspark_server.api.schema import Body, TokenId, parse, read_object, validated
from dspark_server.errors import CapacityError, RequestError

MAX_TEXT = 1 << 20  # characters
MAX_TOKENS = 1 << 20
MAX_WAITING = 64  # texts at once


class TokenizeRequest(Body):
    """A text to tokenize."""

    model: str | None = Field(None, max_length=1024)
    """Name of the model, as in /v1/models; absent: the one that is served."""
    prompt: str = Field(max_length=MAX_TEXT)
    """The text."""
    add_special_tokens: bool = True
    """Add the tokenizer's special tokens, as a completion would."""
    return_token_strs: bool = False
    """Also say how the vocabulary writes each token, in `token_strs`."""


class TokenizeChatRequest(Conversation):
    """A conversation to tokenize, with what the chat template puts around it."""

    model: str | None = Field(None, max_length=1024)
    """Name of the model, as in /v1/models; absent: the one that is served."""
    return_token_strs: bool = False
    """Also say how the vocabulary writes each token, in `token_strs`."""


class DetokenizeRequest(Body):
    """Tokens to turn into text, special ones included."""

    model: str | None = Field(None, max_length=1024)
    """Name of the model, as in /v1/models; absent: the one that is served."""
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]
    """The token ids."""


class Tokens:
    """Both endpoints of one engine."""

    def __init__(self, intake: Intake, template: ChatTemplate) -> None:
        self._intake = intake
        self._template = template
        self._engine = intake.engine
        self._tokenizer = copy.deepcopy(intake.engine.tokenizer)  # a tokenizer serves one thread
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._waiting = 0

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text as /v1/completions would see it, or of messages as /v1/chat/completions would.

        Raises RequestError, and CapacityError when too many texts are waiting.
        """
        return await self._answer(request, self._tokenize)

    async def count(self, request: Request) -> Response:
        """Number of tokens of a prompt of /v1/messages. Raises as `tokenize` does."""
        return await self._answer(request, self._count)

    async def detokenize(self, request: Request) -> Response:
        """Text of token ids. Raises as `tokenize` does."""
        return await self._answer(request, self._detokenize)

    async def _answer(self, request: Request, work: Callable[[bytes], dict[str, Any]]) -> Response:
        body = await self._intake.read(request)
        if self._waiting >= MAX_WAITING:
            raise CapacityError("Too many texts are waiting to be tokenized. Try again later.")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            content = await loop.run_in_executor(self._thread, lambda: orjson.dumps(work(body)))
        finally:
            self._waiting -= 1
        return Response(content, media_type="application/json")

    def _tokenize(self, body: bytes) -> dict[str, Any]:
        values = read_object(body)
        is_chat = values.get("messages") is not None
        if is_chat and values.get("prompt") is not None:
            raise RequestError("`prompt` and `messages` exclude each other.", param="messages")
        asked = validated(TokenizeChatRequest, values) if is_chat else validated(TokenizeRequest, values)
        self._intake.check_model(asked.model)
        text = self._render(asked) if isinstance(asked, TokenizeChatRequest) else asked.prompt
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=asked.add_special_tokens)
        return {
            "count": len(tokens),
            "max_model_len": self._engine.max_model_len,
            "tokens": tokens,
            "token_strs": self._tokenizer.convert_ids_to_tokens(tokens) if asked.return_token_strs else None,
        }

    def _count(self, body: bytes) -> dict[str, Any]:
        asked = parse(body, MessagesRequest).as_chat()
        self._intake.check_model(asked.model)
        text = self._render(asked)
        return {"input_tokens": len(self._tokenizer.encode(text, add_special_tokens=asked.add_special_tokens))}

    def _render(self, asked: Conversation) -> str:
        """Return the prompt of a conversation, as for /v1/chat/completions."""
        asked.check_conversation()
        text = self._template.render_now(asked)
        if len(text) > MAX_TEXT:
            message = f"The conversation is too long: over {MAX_TEXT} characters."
            raise RequestError(message, param="messages", code="context_length_exceeded")
        return text

    def _detokenize(self, body: bytes) -> dict[str, Any]:
        asked = validated(DetokenizeRequest, read_object(body))
        self._intake.check_model(asked.model)
        if max(asked.tokens, default=0) >= self._engine.vocab_size:
            message = f"A token id is outside the vocabulary (0 to {self._engine.vocab_size - 1})."
            raise RequestError(message, param="tokens")
        # The backend's decode: transformers' may change spaces, so that the text would give other tokens. As a batch,
        # because only that lets other threads run meanwhile.
        (text,) = self._tokenizer.backend_tokenizer.decode_batch([asked.tokens], skip_special_tokens=False)
        return {"prompt": text}
