"""Request bodies: every field, its type, its range, and what is not served.

Types are strict (a bool or a string is no number), NaN and infinities are refused, null means absent everywhere, and
every list and string has a cap. A field that would change the output but has no effect here is refused, not ignored.
"""

import logging
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dspark_server.engine.request import SamplingParams
from dspark_server.errors import RequestError

logger = logging.getLogger(__name__)

LARGEST_COUNT = 2**31 - 1
LARGEST_SEED = 2**64 - 1
MAX_CHOICES = 128
MAX_STOPS = 32
MAX_STOP_LENGTH = 256  # characters
MAX_STOP_TOKENS = 256

MAX_LOGPROBS = 20  # alternatives per token
MAX_BIASES = 1024
MAX_ALLOWED = 65536
MAX_BAD_WORDS = 128
MAX_GRAMMAR = 64 << 10  # bytes of a schema, a regular expression or a list of choices

# Values that ask for nothing, of fields that are not supported: with them the output is what it would be without.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(BaseModel):
    """Strict types; null is the same as absent."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}  # fields that are refused but for these values

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


Valid = TypeVar("Valid", bound=Body)


class StreamOptions(Body):
    """What a stream says besides the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Speculation(Body):
    """How one request speculates; its output is the same with any of this."""

    enabled: bool = True
    max_draft_tokens: int | None = Field(None, ge=0, le=LARGEST_COUNT)


class StructuredOutputs(Body):
    """The form an answer must have: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")  # a JSON schema
    json_object: bool | None = None
    regex: str | None = Field(None, min_length=1, max_length=MAX_GRAMMAR)
    choice: Annotated[list[str], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None


class ResponseFormat(Body):
    """OpenAI's way to say the same: text, json_object or json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class GenerationRequest(Body):
    """What completions and chat completions have in common: everything but the prompt."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = UNSUPPORTED

    model: str | None = Field(None, max_length=1024)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    min_tokens: int = Field(0, ge=0, le=LARGEST_COUNT)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=LARGEST_COUNT)
    min_p: float = Field(0.0, ge=0, le=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=1000)
    logit_bias: dict[str, Bias] = Field({}, max_length=MAX_BIASES)
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED, fail_fast=True)] | None = (
        None
    )
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] = []
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] = []
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True  # matters to slow tokenizers only, of which none is served
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=LARGEST_COUNT)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    speculation: Speculation | None = None
    priority: int = Field(0, ge=-LARGEST_COUNT, le=LARGEST_COUNT)
    stream: bool = False
    stream_options: StreamOptions | None = None
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

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives reported for each token of the answer; None: no log-probabilities at all."""
        raise NotImplementedError

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """The same for the prompt's tokens."""
        return self.prompt_logprobs

    def check(self) -> None:
        """Rules that more than one field takes part in. Raises RequestError."""
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("`prompt_logprobs` cannot be streamed.", param="prompt_logprobs")
        if self.stream_options is not None and not self.stream:
            raise RequestError("`stream_options` is for `stream: true` only.", param="stream_options")

    @property
    def max_draft_tokens(self) -> int | None:
        """Most tokens drafted at once for this request; None: as many as the server likes."""
        if self.speculation is None:
            return None
        return self.speculation.max_draft_tokens if self.speculation.enabled else 0

    def sampling(self, max_tokens: int) -> SamplingParams:
        """The engine's parameters, the same for all choices; without what needs the tokenizer (bad words, grammar)."""
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            seed=self.seed,
            stop_token_ids=frozenset(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_biases(self.logit_bias),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            logprobs=self.wanted_logprobs,
            prompt_logprobs=self.wanted_prompt_logprobs,
            max_draft_tokens=self.max_draft_tokens,
            priority=self.priority,
        )


class CompletionRequest(GenerationRequest):
    """A completion request. `prompt` is checked by `prompts_of`, which is fast on long lists of token ids."""

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
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int = Field(16, ge=0, le=LARGEST_COUNT)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    add_special_tokens: bool = True

    @property
    def wanted_logprobs(self) -> int | None:
        """As asked for; `best_of` ranks its choices by them."""
        if self.logprobs is None and self.candidates > self.n:
            return 0
        return self.logprobs

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """As asked for; `echo` shows the prompt's tokens among the answer's."""
        if self.echo and self.logprobs is not None:
            return max(self.logprobs, self.prompt_logprobs or 0)
        return self.prompt_logprobs

    @property
    def candidates(self) -> int:
        """Choices generated per prompt, of which the `n` best are returned."""
        return self.best_of or self.n

    def check(self) -> None:
        """See the base."""
        super().check()
        if self.candidates < self.n:
            raise RequestError("`best_of` must not be less than `n`.", param="best_of")
        if self.candidates > self.n and self.stream:
            raise RequestError("`best_of` above `n` cannot be streamed: the best is known at the end.", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("`max_tokens` must be at least 1 (0 is for `echo` only).", param="max_tokens")
        if self.min_tokens > self.max_tokens:
            raise RequestError("`min_tokens` must not exceed `max_tokens`.", param="min_tokens")


Kind = TypeVar("Kind", bound=GenerationRequest)


def parse(body: bytes, kind: type[Kind]) -> Kind:
    """Read and check a request body, all but the prompt.

    Raises RequestError (400) naming the field to blame.
    """
    values = read_object(body)
    _refuse_unsupported(values, kind)
    request = validated(kind, values)
    request.check()
    return request


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object a body is. Raises RequestError (400) for anything else."""
    try:
        values = orjson.loads(body)  # refuses NaN, 1e309, lone surrogates, a BOM and deep nesting by itself
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body is not valid JSON: {error.msg} (at byte {error.pos}).") from None
    if not isinstance(values, dict):
        raise RequestError("The body must be a JSON object.")
    return values


def validated(kind: type[Valid], values: dict[str, Any]) -> Valid:
    """Check fields one by one; unknown ones are ignored with a warning. Raises RequestError (400)."""
    _warn_unknown(values, kind)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _as_request_error(error) from None


def json_schema(kind: type[Body], required: str) -> dict[str, Any]:
    """JSON schema of a body for /openapi.json; every field but `required` may be null."""
    schema = kind.model_json_schema(ref_template="#/$defs/{model}")
    definitions = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolve(definitions[value["$ref"].rsplit("/", 1)[1]])
            return {name: resolve(inner) for name, inner in value.items()}
        return [resolve(inner) for inner in value] if isinstance(value, list) else value

    schema = resolve(schema)
    _allow_null(schema, except_for=required)
    schema["required"] = [required]
    return dict(schema)


def _allow_null(schema: dict[str, Any], *, except_for: str | None = None) -> None:
    for name, value in schema.get("properties", {}).items():
        for part in (value, *value.get("anyOf", ())):
            _allow_null(part)
        if name != except_for:
            schema["properties"][name] = {"anyOf": [value, {"type": "null"}]}


def _refuse_unsupported(values: dict[str, Any], kind: type[GenerationRequest]) -> None:
    for name, harmless in kind.unsupported.items():
        value = values.get(name)
        if value is None or any(
            value == same and isinstance(value, bool) == isinstance(same, bool) for same in harmless
        ):
            continue
        raise RequestError(
            f"`{name}` is not supported by this server yet; leave it out.", param=name, code="unsupported"
        )


def _warn_unknown(values: dict[str, Any], kind: type[Body]) -> None:
    unknown = [name for name in values if name not in kind.model_fields and name not in kind.unsupported]
    if unknown:
        shown = ", ".join(repr(name[:40]) for name in unknown[:8])
        logger.warning("ignoring %d unknown request field(s): %s", len(unknown), shown)


def _biases(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """OpenAI's form has token ids as strings."""
    try:
        return tuple((int(token), value) for token, value in given.items())
    except ValueError:
        raise RequestError("`logit_bias` maps token ids (as strings) to numbers.", param="logit_bias") from None


def _as_request_error(error: ValidationError) -> RequestError:
    """The first problem, in words that hold nothing of the body but the names of our own fields."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = [str(part) for part in first["loc"] if not str(part).startswith(("constrained-", "list[", "function-"))]
    name = ".".join(place)
    return RequestError(f"`{name}`: {first['msg']}.", param=place[0] if place else None)
