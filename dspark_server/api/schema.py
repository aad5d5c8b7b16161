"""The body of POST /v1/completions: every field, its type, its range, and what is not served.

Types are strict (a bool or a string is no number), NaN and infinities are refused, null means absent everywhere, and
every list and string has a cap. A field that would change the output but has no effect here is refused, not ignored.
"""

import logging
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dspark_server.engine.request import SamplingParams
from dspark_server.errors import RequestError

logger = logging.getLogger(__name__)

LARGEST_COUNT = 2**31 - 1
LARGEST_SEED = 2**64 - 1
MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_STOPS = 32
MAX_STOP_LENGTH = 256  # characters
MAX_STOP_TOKENS = 256

# Values that ask for nothing, of fields that are not supported: with them the output is what it would be without.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "logprobs": (),
    "prompt_logprobs": (),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "priority": (0,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]


class Body(BaseModel):
    """Strict types; null is the same as absent."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class StreamOptions(Body):
    """What a stream says besides the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class CompletionRequest(Body):
    """A completion request. `prompt` is checked by `prompts_of`, which is fast on long lists of token ids."""

    model: str | None = Field(None, max_length=1024)
    prompt: Any = Field(
        None,
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        },
    )
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int = Field(16, ge=0, le=LARGEST_COUNT)
    min_tokens: int = Field(0, ge=0, le=LARGEST_COUNT)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=LARGEST_COUNT)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] = []
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    cache_salt: str = Field("", max_length=256)
    user: str | None = Field(None, max_length=1024)
    request_id: str | None = Field(None, max_length=256)

    @property
    def stops(self) -> list[str]:
        """The stop strings, in the order given."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk carries usage; as in vLLM only together with `include_usage`."""
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def sampling(self) -> SamplingParams:
        """The engine's parameters, the same for all choices."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            seed=self.seed,
            stop_token_ids=frozenset(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
        )


def parse(body: bytes) -> CompletionRequest:
    """Read and check a request body, all but the prompt.

    Raises RequestError (400) naming the field to blame.
    """
    try:
        values = orjson.loads(body)  # refuses NaN, 1e309, lone surrogates, a BOM and deep nesting by itself
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body is not valid JSON: {error.msg} (at byte {error.pos}).") from None
    if not isinstance(values, dict):
        raise RequestError("The body must be a JSON object.")
    _refuse_unsupported(values)
    _warn_unknown(values)
    try:
        request = CompletionRequest.model_validate(values)
    except ValidationError as error:
        raise _as_request_error(error) from None
    _check_together(request)
    return request


def prompts_of(request: CompletionRequest, *, vocab_size: int, max_model_len: int) -> list[str | list[int]]:
    """The prompts of a request, each a text or token ids.

    Raises RequestError for an empty prompt, a mixed list, a token id outside the vocabulary, and more token ids than
    the context holds (before it looks at each).
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


def completion_json_schema() -> dict[str, Any]:
    """JSON schema of the body for /openapi.json; every field may be null."""
    schema = CompletionRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    options = StreamOptions.model_json_schema()
    schema["properties"]["stream_options"] = options
    for properties in (schema["properties"], options["properties"]):
        for name, value in properties.items():
            if name != "prompt":
                properties[name] = {"anyOf": [value, {"type": "null"}]}
    schema["required"] = ["prompt"]
    return schema


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


def _refuse_unsupported(values: dict[str, Any]) -> None:
    for name, harmless in UNSUPPORTED.items():
        value = values.get(name)
        if value is None or any(
            value == same and isinstance(value, bool) == isinstance(same, bool) for same in harmless
        ):
            continue
        raise RequestError(
            f"`{name}` is not supported by this server yet; leave it out.", param=name, code="unsupported"
        )


def _warn_unknown(values: dict[str, Any]) -> None:
    unknown = [name for name in values if name not in CompletionRequest.model_fields and name not in UNSUPPORTED]
    if unknown:
        shown = ", ".join(repr(name[:40]) for name in unknown[:8])
        logger.warning("ignoring %d unknown request field(s): %s", len(unknown), shown)


def _check_together(request: CompletionRequest) -> None:
    """Rules that more than one field takes part in."""
    if request.best_of is not None and request.best_of != request.n:
        raise RequestError("`best_of` is supported only when it equals `n`.", param="best_of", code="unsupported")
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("`max_tokens` must be at least 1 (0 is for `echo` only).", param="max_tokens")
    if request.min_tokens > request.max_tokens:
        raise RequestError("`min_tokens` must not exceed `max_tokens`.", param="min_tokens")
    if request.stream_options is not None and not request.stream:
        raise RequestError("`stream_options` is for `stream: true` only.", param="stream_options")


def _as_request_error(error: ValidationError) -> RequestError:
    """The first problem, in words that hold nothing of the body but the names of our own fields."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = [str(part) for part in first["loc"] if not str(part).startswith(("constrained-", "list[", "function-"))]
    name = ".".join(place)
    return RequestError(f"`{name}`: {first['msg']}.", param=place[0] if place else None)
