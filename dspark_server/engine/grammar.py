"""Structured output: grammars compiled by llguidance, with one matcher per choice.

Drafting and verification ask for a mask at every position of a block, given the draft tokens before it; the matcher
is advanced by these and rolled back, so that only committed tokens move it (`speculation.controls.Grammar`).

No mask is computed on the step thread. The masks of all requests are computed side by side on threads of the compiler,
from when their tokens are known: the first when the request is made, the one after committed tokens at their commit,
those of a verification before the target's pass. A draft ends at a slot whose mask is late.
"""

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Lock
from time import monotonic, thread_time
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from dspark_server.engine import gbnf
from dspark_server.engine.json_schema import prepared
from dspark_server.engine.regex import to_rust
from dspark_server.runtime import processors

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

COMPACT: "JsonCompileOptions" = {"whitespace_flexible": False}
# A small model can repeat white space endlessly, so only a little is allowed between two tokens of JSON.
FLEXIBLE: "JsonCompileOptions" = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\t]{1,16}"}

# A step may have to wait for a mask, so the operations of llguidance for each are limited: to about 5 ms of one core. A
# grammar that needs more for one mask fails. Some operations are not counted, and a matcher is slower before its first
# tokens: so masks may take longer than MASK_SECONDS, and the request ends at the SLOW_MASKS-th of these.
LIMITS = LLParserLimits(step_lexer_fuel=30_000, step_max_items=4_000, verbose_errors=False)
MASK_SECONDS = 0.005  # of one core
SLOW_MASKS = 16
FAILED = "The form (`response_format` or `structured_outputs`) cannot be followed further: {}. Use a simpler one."


class FormError(ValueError):
    """A grammar that cannot be compiled; the message says why."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer. `vocabulary`: V of the target's logits, padded rows included.

    `threads`: number of masks computed at once; None: the number of usable processors.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, threads: int | None = None) -> None:
        self._tokenizer: LLTokenizer = from_tokenizer(tokenizer)
        self._vocabulary = vocabulary
        self._threads = ThreadPoolExecutor(threads or processors.usable(), thread_name_prefix="mask")

    def json_schema(self, schema: str, *, compact: bool = True, closed: bool = True) -> "CompiledForm":
        """Compile a JSON schema (as text). Raises FormError.

        `compact`: no white space between tokens of JSON; else a little. `closed`: objects that name their properties
        and say nothing of others have no others.
        """
        style = COMPACT if compact else FLEXIBLE
        return self._compile(
            lambda: LLMatcher.grammar_from_json_schema(prepared(schema, closed=closed), overrides=style)
        )

    def regex(self, pattern: str) -> "CompiledForm":
        """Compile a regular expression (see `engine.regex`) for the whole answer. Raises FormError."""
        return self._compile(lambda: LLMatcher.grammar_from_regex(to_rust(pattern)))

    def grammar(self, grammar: str) -> "CompiledForm":
        """Compile a context-free grammar, given in llguidance's Lark or in GBNF. Raises FormError."""
        return self._compile(lambda: LLMatcher.grammar_from_lark(_as_lark(grammar)))

    def choice(self, texts: Sequence[str]) -> "CompiledForm":
        """Compile a choice between texts. Raises FormError."""
        options = " | ".join(json.dumps(text) for text in texts)
        return self._compile(lambda: LLMatcher.grammar_from_lark(f"start: {options}"))

    def _compile(self, make: Callable[[], str]) -> "CompiledForm":
        try:
            grammar = make()
            # Silent: its messages are for the client, not for the log.
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        except RecursionError:
            raise FormError("it is nested too deeply") from None
        except ValueError as error:
            raise FormError(str(error)) from None
        if matcher.is_error():
            raise FormError(matcher.get_error())
        matcher.compute_bitmask()  # the first mask is the most expensive: its copies have most of it done
        if matcher.is_error():
            raise FormError(f"it is too complex: {_first_line(matcher.get_error())}")
        return CompiledForm(matcher, self._tokenizer, self._vocabulary, self._threads)


class CompiledForm:
    """See `engine.request.CompiledGrammar`. Masks are computed by `threads`."""

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer, vocabulary: int, threads: Executor) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._threads = threads

    def start(self, stop_ids: frozenset[int], clock: Callable[[], float] = thread_time) -> "FormMatcher":
        """A matcher at the beginning of an answer that any of `stop_ids` may end."""
        return FormMatcher(self._matcher.deep_copy(), self._tokenizer, stop_ids, self._vocabulary, self._threads, clock)


@dataclass(frozen=True)
class _Mask:
    permitted: Tensor  # [V] bool
    over: bool  # only an end can follow


class FormMatcher:
    """See `speculation.controls.Grammar`. The mask of a prefix is kept, as draft and target both ask for it.

    A mask is computed by one of `threads`; the caller waits for it only where it needs it. The matcher and the count of
    slow masks are used under `_lock`, or when no mask is being computed; all else belongs to the calling thread.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        tokenizer: LLTokenizer,
        stop_ids: frozenset[int],
        vocabulary: int,
        threads: Executor,
        clock: Callable[[], float] = thread_time,
    ) -> None:
        self._matcher = matcher
        self._threads = threads
        self._clock = clock
        self._lock = Lock()
        self._slow = 0  # masks that took too long
        self._size = tokenizer.vocab_size  # tokens that the matcher knows
        self._end = end = tokenizer.eos_token
        self._may_stop = bool(stop_ids)
        # An end follows a complete answer even if `stop_ids` is empty.
        self._end_ids = stop_ids or frozenset({end})
        self._ends = np.zeros(vocabulary, dtype=np.bool_)
        self._ends[list(self._end_ids)] = True
        self._ended = False  # an end is among the committed tokens
        self.complete = False
        self._masks: dict[tuple[int, ...], Future[_Mask]] = {}  # by prefix
        self.prepare(())

    @property
    def failure(self) -> str | None:
        """Reason why no token may follow, if masks became too expensive or the matcher failed; else None."""
        with self._lock:
            return self._failure()

    def prepare(self, drafted: Sequence[int]) -> None:
        """Begin to compute the mask after `drafted`, unless it is known."""
        prefix = tuple(drafted)
        if prefix not in self._masks:
            self._masks[prefix] = self._threads.submit(self._compute, prefix)

    def ready(self, drafted: Sequence[int], deadline: float) -> bool:
        """Wait for the mask after `drafted`, at most until `deadline` (of `monotonic`): whether it is known."""
        self.prepare(drafted)
        mask = self._masks[tuple(drafted)]
        wait([mask], max(0.0, deadline - monotonic()))
        return mask.done()

    def mask(self, drafted: Sequence[int]) -> Tensor:
        """The tokens [V] bool that may follow `drafted`; none if it breaks the grammar; only ends after an end."""
        return self._look(drafted).permitted

    def over(self, drafted: Sequence[int] = ()) -> bool:
        """Whether only an end can follow."""
        return self._look(drafted).over

    def _look(self, drafted: Sequence[int]) -> _Mask:
        self.prepare(drafted)
        return self._masks[tuple(drafted)].result()

    def _failure(self) -> str | None:
        if self._slow >= SLOW_MASKS:
            return FAILED.format(f"{SLOW_MASKS} masks took over {MASK_SECONDS * 1000:.0f} ms each")
        return FAILED.format(_first_line(self._matcher.get_error())) if self._matcher.is_error() else None

    def _compute(self, prefix: tuple[int, ...]) -> _Mask:
        """On one of `threads`: with numpy, as torch would start threads of its own for each of them."""
        with self._lock:
            mask = self._permitted(prefix)
        return _Mask(torch.from_numpy(mask), bool(mask.any()) and not bool((mask & ~self._ends).any()))

    def _permitted(self, prefix: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        mask = np.zeros_like(self._ends)
        if self._failure() is not None:
            return mask
        if self._ended or not self._end_ids.isdisjoint(prefix):
            return self._ends
        # A row of the padded embedding is not a token of the matcher, which would fail permanently.
        if any(token >= self._size for token in prefix):
            return mask
        taken = self._matcher.try_consume_tokens(list(prefix)) if prefix else 0
        try:
            if taken < len(prefix):
                return mask
            if self._matcher.is_stopped():
                return self._ends
            accepting = self._matcher.is_accepting()
            began = self._clock()
            packed = self._matcher.compute_bitmask()
            self._slow += self._clock() - began > MASK_SECONDS
            if self._matcher.is_error():
                return mask
            mask[:] = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little", count=len(mask))
            mask[self._end] = False
            return mask | self._ends if accepting and (self._may_stop or not mask.any()) else mask
        finally:
            if taken and not self._matcher.is_error():
                self._matcher.rollback(taken)

    def commit(self, tokens: Sequence[int]) -> None:
        """Advance by the committed `tokens`; an end among them is the last."""
        said = tuple(tokens)
        wait([mask for mask in self._masks.values() if not mask.cancel()])  # one that is being computed has the matcher
        self._ended = self._ended or not self._end_ids.isdisjoint(said)
        inside = [token for token in tokens if token not in self._end_ids]
        if inside and not self._matcher.is_stopped():
            self._matcher.consume_tokens(inside)
        # A failed matcher reports that it is stopped, but its answer is not complete.
        self.complete = self._failure() is None and (self._ended or self._matcher.is_stopped())
        # The mask of a prefix is the same whether the prefix is drafted or committed.
        self._masks = {
            prefix[len(said) :]: mask
            for prefix, mask in self._masks.items()
            if prefix[: len(said)] == said and not mask.cancelled()
        }
        if not self.complete:
            self.prepare(())


def _as_lark(grammar: str) -> str:
    if gbnf.is_gbnf(grammar):
        return gbnf.to_lark(grammar)
    # Rolling a matcher back over such a limit does not restore its state.
    if re.search(r"\bmax_tokens\s*=", grammar):
        raise ValueError("`max_tokens` of a rule is not supported; say the length by a pattern")
    return grammar


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0].removesuffix(".")
