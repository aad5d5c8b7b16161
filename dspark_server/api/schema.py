"""Request bodies: every field, its type, its range, and the unsupported fields.

Types are strict (a bool or a string is not a number), NaN and infinities are refused, null means absent everywhere, and
every list and string has a cap. A field that would change the output but has no effect here is refused, not ignored.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dspark_server.engine.request import SamplingParams
from dspark_server.errors import RequestError

logger = logging.getLogger(__name__)

LARGEST_COUNT = 2**31 - 1
LARGEST_SEED = 2**64 - 1
NO_SEED = -1  # as in vLLM
MAX_CHOICES = 128
MAX_STOPS = 32
MAX_STOP_LENGTH = 256  # characters
MAX_STOP_TOKENS = 256

MAX_LOGPROBS = 20  # alternatives per token
MAX_BIASES = 1024
MAX_ALLOWED = 65536
MAX_BAD_WORDS = 128
MAX_CONTAINERS = 1 << 18  # brackets and braces of a body, also in texts: so many lists block the event loop for 0.1 s
MAX_GRAMMAR = 64 << 10  # bytes of a schema, a regular expression or a list of choices

# Values of unsupported fields that have no effect: with them the output is the same as without the field.
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
    "guided_json_object": (False,),
    "structural_tag": (),
}
# Old names in vLLM, and the names served here.
RENAMED = {
    "guided_json": '`structured_outputs: {"json": …}`',
    "guided_regex": '`structured_outputs: {"regex": …}`',
    "guided_choice": '`structured_outputs: {"choice": […]}`',
    "guided_grammar": '`structured_outputs: {"grammar": …}`',
    "guided_json_object": '`response_format: {"type": "json_object"}`',
}

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(BaseModel):
    """Strict types; null is the same as absent."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}  # fields that are refused except with these values
    parts: ClassVar[dict[str, frozenset[str]]] = {}  # known fields of objects in list fields checked elsewhere

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values

    def check(self) -> None:
        """Check the rules that concern several fields. Raises RequestError."""


Valid = TypeVar("Valid", bound=Body)


class StreamOptions(Body):
    """Fields of a stream besides the text."""

    include_usage: bool = False
    """The stream ends with a chunk that has `usage` and no choices."""
    continuous_usage_stats: bool = False
    """Every chunk has the usage of its choice so far; together with `include_usage` only."""


class Speculation(Body):
    """Speculation of one request; its output is the same with any of these values."""

    enabled: bool = True
    """False: decode without drafts."""
    max_draft_tokens: int | None = Field(None, ge=0, le=LARGEST_COUNT)
    """Most tokens drafted at once; absent: as the server likes."""


class StructuredOutputs(Body):
    """The form an answer must have: exactly one of json, json_object, regex, choice, grammar."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "structural_tag": (),
        "whitespace_pattern": (),
    }

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    """A JSON schema, as an object or as text."""
    json_object: bool | None = None
    """Any JSON object."""
    regex: str | None = Field(None, min_length=1, max_length=MAX_GRAMMAR)
    """A regular expression (ECMA-262) for the whole answer; `\\d`, `\\w` and `\\s` are ASCII."""
    grammar: str | None = Field(None, min_length=1, max_length=MAX_GRAMMAR)
    """A context-free grammar, in GBNF (`root ::= …`) or in the Lark of llguidance (`start: …`)."""
    choice: Annotated[list[str], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    """The answer is one of these."""
    disable_any_whitespace: bool | None = None
    """For JSON: false lets white space stand between its tokens; absent: the server's setting."""
    disable_additional_properties: bool | None = None
    """For JSON: objects that name their properties have no others; absent: the server's setting."""


class ResponseFormat(Body):
    """OpenAI's way to say the same: text, json_object or json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    """What the answer is: free text, any JSON object, or JSON after a schema."""
    json_schema: dict[str, Any] | None = None
    """`{"name": …, "schema": {…}}`; `name` and `strict` change nothing: the schema is always kept to."""


class GenerationRequest(Body):
    """Fields that completions and chat completions share: all but the prompt."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = UNSUPPORTED

    model: str | None = Field(None, max_length=1024)
    """Name of the model, as in /v1/models; absent: the one that is served."""
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    """Answers to each prompt; they share its KV blocks."""
    min_tokens: int = Field(0, ge=0, le=LARGEST_COUNT)
    """Tokens before which neither end of sequence nor a stop ends the answer."""
    temperature: float = Field(1.0, ge=0, le=2)
    """0 is greedy: always the likeliest token. The model's generation_config.json may set another default."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = Field(0, ge=-1, le=LARGEST_COUNT)
    """Sample from so many of the likeliest tokens; 0 and -1: from all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Leave out tokens less likely than this share of the likeliest."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """Lowers a token's logit by this for each time the answer has it."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Lowers the logits of tokens that the answer has by this."""
    repetition_penalty: float = Field(1.0, gt=0, le=1000)
    """Divides positive logits (multiplies negative ones) of tokens in prompt and answer; 1: off."""
    logit_bias: dict[str, Bias] = Field({}, max_length=MAX_BIASES)
    """Adds to the logits of tokens: `{"1234": -100}`, keys are token ids."""
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED, fail_fast=True)] | None = (
        None
    )
    """Sample from these tokens only."""
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] = []
    """Texts that must not come up in the answer."""
    seed: int | None = Field(None, ge=NO_SEED, le=LARGEST_SEED)
    """The same seed gives the same answer, drafted or not; absent or -1: a random one."""
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] = []
    """Ends the answer where one of these comes up; `stop_reason` says which."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)] = []
    """Tokens that end the answer."""
    ignore_eos: bool = False
    """Go on after end of sequence; without effect where the answer has a form."""
    include_stop_str_in_output: bool = False
    """Keep what ended the answer in its text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    spaces_between_special_tokens: bool = True
    """Matters to slow tokenizers only, of which none is served."""
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=LARGEST_COUNT)
    """Keep so many tokens of the prompt's end; -1: as many as leave room for the answer."""
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """Log-probabilities of the prompt's tokens, with so many alternatives each; not in streams."""
    return_token_ids: bool = False
    """Add `token_ids` and `prompt_token_ids`."""
    return_tokens_as_token_ids: bool = False
    """Log-probabilities name tokens `token_id:1234` in place of their text."""
    response_format: ResponseFormat | None = None
    """OpenAI's way to ask for an answer of a given form."""
    structured_outputs: StructuredOutputs | None = None
    """vLLM's way to ask for an answer of a given form; exactly one of its fields."""
    speculation: Speculation | None = None
    """How this request is drafted for; what comes out is the same."""
    priority: int = Field(0, ge=-LARGEST_COUNT, le=LARGEST_COUNT)
    """Requests with less are admitted first, and when memory runs out the one with the most gives way first."""
    stream: bool = False
    """Send server-sent events, one for each step that gave text."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    cache_salt: str = Field("", max_length=256)
    """Prefixes are shared in the cache only among requests with the same salt."""
    user: str | None = Field(None, max_length=1024)
    """Accepted for OpenAI's clients; without effect."""
    request_id: str | None = Field(None, max_length=256)
    """The answer's `id` ends with it; absent: with the X-Request-Id."""

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
        """Alternatives reported for each token of the answer; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """The same for the prompt's tokens."""
        return self.prompt_logprobs

    def check(self) -> None:
        """Check the rules that concern several fields. Raises RequestError."""
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("`prompt_logprobs` cannot be streamed.", param="prompt_logprobs")
        if self.stream_options is not None and not self.stream:
            raise RequestError("`stream_options` is for `stream: true` only.", param="stream_options")

    @property
    def max_draft_tokens(self) -> int | None:
        """Maximum number of draft tokens in a block of this request; None: the server's."""
        if self.speculation is None:
            return None
        return self.speculation.max_draft_tokens if self.speculation.enabled else 0

    def sampling(self, max_tokens: int, defaults: Mapping[str, float | int]) -> SamplingParams:
        """The engine's parameters, equal for all choices; without what needs the tokenizer (bad words, grammar).

        `defaults` hold for fields that the request leaves out.
        """
        left_out: dict[str, Any] = {k: value for k, value in defaults.items() if k not in self.model_fields_set}
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            seed=None if self.seed == NO_SEED else self.seed,
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
        return replace(params, **left_out) if left_out else params


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
    """One prompt or several, as text or token ids."""
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    """Answers generated for each prompt, of which the `n` likeliest per token are returned; not in streams."""
    max_tokens: int = Field(16, ge=0, le=LARGEST_COUNT)
    """Most tokens of an answer. 0, with `echo`, scores the prompt."""
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """Log-probabilities of the answer's tokens, with so many alternatives each."""
    echo: bool = False
    """The text begins with the prompt; with `logprobs` so do they."""
    add_special_tokens: bool = True
    """Add the tokenizer's special tokens to prompts that are text."""

    @property
    def wanted_logprobs(self) -> int | None:
        """As requested; `best_of` ranks its choices by them."""
        if self.logprobs is None and self.candidates > self.n:
            return 0
        return self.logprobs

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """As requested; `echo` shows the prompt's tokens among the answer's."""
        if self.echo and self.logprobs is not None:
            return max(self.logprobs, self.prompt_logprobs or 0)
        return self.prompt_logprobs

    @property
    def candidates(self) -> int:
        """Number of choices generated per prompt, of which the `n` best are returned."""
        return self.best_of or self.n

    def check(self) -> None:
        """See the base class."""
        super().check()
        if self.candidates < self.n:
            raise RequestError("`best_of` must not be less than `n`.", param="best_of")
        if self.candidates > self.n and self.stream:
            raise RequestError("`best_of` above `n` cannot be streamed: the best is known at the end.", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("`max_tokens` must be at least 1 (0 is for `echo` only).", param="max_tokens")
        if self.min_tokens > self.max_tokens:
            raise RequestError("`min_tokens` must not exceed `max_tokens`.", param="min_tokens")


Kind = TypeVar("Kind", bound=Body)


def parse(body: bytes, kind: type[Kind]) -> Kind:
    """Read and check a request body, except the prompt.

    Raises RequestError (400) naming the field at fault.
    """
    values = read_object(body)
    _refuse_unsupported(values, kind)
    request = validated(kind, values)
    request.check()
    return request


def read_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body. Raises RequestError (400) for anything else."""
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
        raise RequestError(f"The body has over {MAX_CONTAINERS} brackets and braces.", code="body_too_complex")
    try:
        values = orjson.loads(body)  # refuses NaN, 1e309, lone surrogates, a BOM and deep nesting by itself
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body is not valid JSON: {error.msg} (at byte {error.pos}).") from None
    if not isinstance(values, dict):
        raise RequestError("The body must be a JSON object.")
    return values


def validated(kind: type[Valid], values: dict[str, Any]) -> Valid:
    """Check fields one by one; unknown ones are ignored with one warning. Raises RequestError (400)."""
    try:
        body = kind.model_validate(values)
    except ValidationError as error:
        raise _as_request_error(error) from None
    unknown = _unknown(values, kind)
    for name, part in body:
        if isinstance(part, Body):
            unknown |= _unknown(values[name], type(part), within=f"{name}.")
            _refuse_unsupported(values[name], type(part), within=f"{name}.")
        elif isinstance(part, list) and part and isinstance(part[0], Body):
            for each in values[name]:
                unknown |= _unknown(each, type(part[0]), within=f"{name}[].")
    if unknown:
        shown = ", ".join(repr(name[:40]) for name in list(unknown)[:8])
        logger.warning("ignoring %d unknown request field(s): %s", len(unknown), shown)
    return body


def _refuse_unsupported(values: dict[str, Any], kind: type[Body], *, within: str = "") -> None:
    for name, harmless in kind.unsupported.items():
        value = values.get(name)
        if value is None or any(
            value == same and isinstance(value, bool) == isinstance(same, bool) for same in harmless
        ):
            continue
        instead = f"use {RENAMED[name]}" if name in RENAMED else "leave it out"
        message = f"`{within}{name}` is not supported by this server; {instead}."
        raise RequestError(message, param=within.rstrip(".") or name, code="unsupported")


def _unknown(values: dict[str, Any], kind: type[Body], *, within: str = "") -> dict[str, None]:
    """Return the fields that `kind` does not know, in order; null is the same as absent, here too."""
    known = {field.alias or name for name, field in kind.model_fields.items()} | kind.unsupported.keys()
    found = dict.fromkeys(within + name for name, value in values.items() if value is not None and name not in known)
    for name, inner in kind.parts.items():
        parts = values.get(name)
        for part in parts if isinstance(parts, list) else ():
            fields = part.items() if isinstance(part, dict) else ()
            found |= {
                f"{within}{name}[].{key}": None for key, value in fields if value is not None and key not in inner
            }
    return found


def _biases(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """Convert logit biases: OpenAI's form has token ids as strings."""
    try:
        return tuple((int(token), value) for token, value in given.items())
    except ValueError:
        raise RequestError("`logit_bias` maps token ids (as strings) to numbers.", param="logit_bias") from None


def _as_request_error(error: ValidationError) -> RequestError:
    """Describe the first invalid field, with nothing of the body but the names of our own fields.

    Of a union's alternatives, the one that got furthest is described: it is the one that was meant.
    """
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    same_field = (each for each in problems if each["loc"][:1] == problems[0]["loc"][:1])
    first = max(same_field, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    place = [str(part) for part in first["loc"] if not str(part).startswith(("constrained-", "list[", "function-"))]
    name = ".".join(place)
    is_object = first["type"] in ("model_type", "dict_type")  # pydantic's message names Python types
    message = "Input should be an object" if is_object else first["msg"]
    return RequestError(f"`{name}`: {message}.", param=place[0] if place else None)
