"""A request: its parameters, its committed tokens, and the blocks of its KV rows.

Life: WAITING -> RUNNING -> FINISHED, with RUNNING -> WAITING on preemption. `tokens[:computed]` have KV rows;
the others are still to run. A request is *decoding* when only its last token, the anchor, is left to run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from functools import cached_property
from typing import Protocol

from dspark_server.engine.blocks import PrefixKey, chain
from dspark_server.engine.logprobs import TokenLogprob
from dspark_server.runtime.paging import BlockTable
from dspark_server.speculation.controls import Control, Controls, Forbidden, Grammar, Penalties
from dspark_server.speculation.copying import ContextIndex
from dspark_server.speculation.estimates import Kind
from dspark_server.speculation.history import SurvivalHistory


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one choice. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    `max_tokens` 0 only runs the prompt. `seed` selects the coupled acceptance rule, whose tokens repeat; without it the
    block or the ratio rule runs (DSpark, step 8). Penalties, biases and masks are off at the values below; `bad_words`
    are token sequences, `grammar` is compiled and shared by the choices of a request. `logprobs` and `prompt_logprobs`:
    number of alternatives to report for each token; None: no log-probabilities. `max_draft_tokens` None: only the
    server's limit. The lower `priority` goes first.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: "CompiledGrammar | None" = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    max_draft_tokens: int | None = None
    priority: int = 0

    def controls(
        self, vocabulary: int, prompt: Sequence[int], stop_ids: frozenset[int], sibling: Control | None = None
    ) -> Control | None:
        """Controls of one choice that answers `prompt`; None if there are none.

        `sibling`: controls of another choice for the same prompt, made with the same parameters.
        """
        if isinstance(sibling, Controls):
            return sibling.again(None if self.grammar is None else self.grammar.start(stop_ids))
        early = Forbidden(tuple(stop_ids), len(prompt) + self.min_tokens) if self.min_tokens and stop_ids else None
        penalties = Penalties(self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        masks = self.allowed_token_ids is not None or self.bad_words or self.grammar is not None
        if not (penalties.any or self.logit_bias or masks):
            return early
        return Controls(
            vocabulary,
            prompt,
            penalties=penalties,
            bias=self.logit_bias,
            allowed=self.allowed_token_ids,
            bad_words=self.bad_words,
            early=early,
            grammar=None if self.grammar is None else self.grammar.start(stop_ids),
        )


class CompiledGrammar(Protocol):
    """A grammar that answers must follow; each choice has its own matcher."""

    def start(self, stop_ids: frozenset[int]) -> Grammar:
        """A matcher at the beginning of an answer. Any of `stop_ids` may end a complete answer."""


class FinishReason(StrEnum):
    """Reason for the end of a choice."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Status(Enum):
    """State of a request."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One choice of one user request, owned by the step thread once submitted.

    `tokens` begins as the prompt's own list, which must not change; the first commit makes a copy.
    """

    id: str
    prompt_length: int
    tokens: list[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    chain_root: bytes
    nonce: int
    choice: int = 0
    tenant: str = ""  # owner: tenants take turns, and share no cached prefix
    arrival: float = 0.0  # monotonic seconds
    admitted: float = 0.0  # the same, of the first admission
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    error: str | None = None
    impossible: bool = False  # the error is the request's own fault
    computed: int = 0
    tables: list[BlockTable] = field(default_factory=list)  # one for each group of caches while it runs
    keys: list[PrefixKey] = field(default_factory=list)
    finite: int = 0  # leading tokens whose KV rows are known to hold no NaN: only those segments are published
    published: int = 0  # segments
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache at first admission
    draft_number: int = 0  # number of drafts of the request, discarded ones included; survives preemption
    history: SurvivalHistory = field(default_factory=SurvivalHistory)
    copied: SurvivalHistory = field(default_factory=SurvivalHistory)  # of the blocks it copied from its context
    context: ContextIndex = field(default_factory=ContextIndex)
    controls: Control | None = None  # notified of every committed token
    leader: "Request | None" = None  # an earlier choice for the same prompt, until its keys have been taken
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)  # as far as the prompt has been run

    @cached_property
    def kind(self) -> Kind:
        """The class of requests whose outcomes tell of this one's."""
        return Kind.of(
            self.params.temperature,
            ruled=isinstance(self.controls, Controls),
            grammar=self.grammar is not None,
            seeded=self.params.seed is not None,
        )

    @property
    def max_length(self) -> int:
        """Maximum length of the sequence, in tokens."""
        return self.prompt_length + self.params.max_tokens

    @property
    def remaining(self) -> int:
        """Tokens that may still be committed."""
        return self.prompt_length + self.params.max_tokens - len(self.tokens)

    @property
    def pending(self) -> int:
        """Committed tokens that have no KV rows yet."""
        return len(self.tokens) - self.computed

    @property
    def is_decoding(self) -> bool:
        """Whether only the anchor is left to run."""
        length = len(self.tokens)
        return length == self.computed + 1 and length > self.prompt_length

    @property
    def output(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[self.prompt_length :]

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt were requested and are not all known yet."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_length

    @property
    def reads_raw_logits(self) -> bool:
        """Whether its logits are read after its rules were applied: for log-probabilities, or to say why it failed."""
        if self.controls is None:
            return False
        return self.params.logprobs is not None or self.params.allowed_token_ids is not None

    @property
    def grammar(self) -> Grammar | None:
        """The grammar that the answer must follow; None if there is none."""
        return self.controls.grammar if isinstance(self.controls, Controls) else None

    def prefix_keys(self, segment_size: int, most: int | None = None) -> list[PrefixKey]:
        """Keys of all whole segments of committed tokens, computed once each, and once for the choices of a prompt.

        At most `most` of them are computed in this call (None: all).
        """
        if self.leader is not None:
            self.keys = self.leader.keys[: self.prompt_length // segment_size]
            self.leader = None
        whole = len(self.tokens) // segment_size
        for segment in range(len(self.keys), whole if most is None else min(whole, len(self.keys) + max(most, 0))):
            parent = self.keys[-1].digest if self.keys else self.chain_root
            self.keys.append(chain(parent, self.tokens[segment * segment_size : (segment + 1) * segment_size]))
        return self.keys

    def commit(self, tokens: Sequence[int]) -> list[int]:
        """Append tokens up to the first that ends the request, or completes its grammar; returns those appended."""
        if self.remaining == 0:  # only the prompt was wanted
            self.finish_reason = FinishReason.LENGTH
            return []
        if len(self.tokens) == self.prompt_length:
            self.tokens = list(self.tokens)  # until now the prompt's own list, which other choices read too
        taken: list[int] = []
        controls = self.controls if isinstance(self.controls, Controls) else None
        grammar, left = None if controls is None else controls.grammar, self.remaining
        for token in tokens:
            self.tokens.append(token)
            taken.append(token)
            if controls is not None:
                controls.commit([token])
            # After each token: the end of an answer must not depend on the number of tokens committed at once.
            if token in self.stop_ids or (grammar is not None and grammar.complete):
                self.finish_reason = FinishReason.STOP
                break
            if len(taken) == left:
                self.finish_reason = FinishReason.LENGTH
                break
        return taken
