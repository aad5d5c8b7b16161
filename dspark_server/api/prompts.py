"""The prompts of a completion request: texts or token ids, one or many. Not checked by pydantic: lists may be long."""

from typing import Any

from dspark_server.api.schema import CompletionRequest
from dspark_server.errors import RequestError

MAX_PROMPTS = 1024


def prompts_of(request: CompletionRequest, *, vocab_size: int, max_model_len: int) -> list[str | list[int]]:
    """Return the prompts of a request, each a text or token ids.

    Raises RequestError for an empty prompt, a mixed list, a token id outside the vocabulary, and more token ids than
    the context holds (checked before the ids).
    """
    prompt = request.prompt
    if isinstance(prompt, str):
        return [_text(prompt)]
    if not isinstance(prompt, list):
        raise RequestError(
            "`prompt` must be a string, a list of strings, or one or more lists of token ids.", param="prompt"
        )
    if not prompt:
        raise RequestError("`prompt` must not be empty.", param="prompt")
    if type(prompt[0]) is int:
        return [_tokens(prompt, vocab_size, max_model_len)]
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(f"A request may have at most {MAX_PROMPTS} prompts.", param="prompt")
    kinds = set(map(type, prompt))
    if kinds == {str}:
        return [_text(text) for text in prompt]
    if kinds == {list}:
        return [_tokens(tokens, vocab_size, max_model_len) for tokens in prompt]
    raise RequestError("`prompt` must hold only strings, only token ids, or only lists of token ids.", param="prompt")


def _text(prompt: str) -> str:
    if not prompt:
        raise RequestError("The prompt is empty: at least one token is needed.", param="prompt")
    return prompt


def _tokens(prompt: list[Any], vocab_size: int, max_model_len: int) -> list[int]:
    if not prompt:
        raise RequestError("The prompt is empty: at least one token is needed.", param="prompt")
    if len(prompt) > max_model_len:
        message = f"This model's maximum context length is {max_model_len} tokens, but the prompt has {len(prompt)}."
        raise RequestError(message, param="prompt", code="context_length_exceeded")
    if set(map(type, prompt)) != {int}:
        raise RequestError("A prompt given as token ids must hold integers only.", param="prompt")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        message = f"A token id in the prompt is outside the vocabulary (0 to {vocab_size - 1})."
        raise RequestError(message, param="prompt")
    return prompt
