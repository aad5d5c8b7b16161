"""Changes that a request makes to its logits before temperature: grammar, masks, biases and penalties.

The rules see the committed tokens and the draft tokens before a position, and nothing after them. They are applied to
the target's logits and to the draft's alike, so that a draft never proposes a token that the target may not take, and
drafting stays lossless under any rules: p and q of a position are distributions given the same prefix (DSPARK.md,
"Filters").

Order and formulas are vLLM's (v1/sample/sampler.py): grammar, allowed tokens, bad words, minimum length, bias, then
repetition, frequency and presence penalties.

Shapes: C columns of a row of logits, V vocabulary.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Control(Protocol):
    """Rules of one request."""

    def prepare(self, drafted: Sequence[int]) -> None:
        """Begin elsewhere what `apply` will need after `drafted`, if it takes long."""

    def ready(self, drafted: Sequence[int], deadline: float) -> bool:
        """Wait for what `prepare` began, at most until `deadline` (of `time.monotonic`): whether it is there."""

    def apply(self, logits: Tensor, drafted: Sequence[int], position: int, columns: Tensor | None) -> None:
        """Change logits [C] of the token at absolute `position` in place; `drafted` are the draft tokens before it.

        columns [C] i64: the token of each column; None: column v is token v.
        """


@dataclass(frozen=True)
class Forbidden:
    """`tokens` (ids) may not appear before absolute position `until` (min_tokens, for end-of-sequence ids)."""

    tokens: tuple[int, ...]
    until: int

    def prepare(self, drafted: Sequence[int]) -> None:
        """See `Control.prepare`: nothing."""

    def ready(self, drafted: Sequence[int], deadline: float) -> bool:
        """See `Control.ready`: always."""
        return True

    def apply(self, logits: Tensor, drafted: Sequence[int], position: int, columns: Tensor | None) -> None:
        """See `Control.apply`."""
        if position >= self.until:
            return
        if columns is None:
            logits[list(self.tokens)] = -torch.inf
        else:
            logits[torch.isin(columns, torch.tensor(self.tokens).to(columns.device))] = -torch.inf


class Grammar(Protocol):
    """A compiled grammar that an answer must match, and its state after the committed tokens."""

    @property
    def failure(self) -> str | None:
        """The reason why no token may follow, if it is the grammar's cost; a line for the client."""

    @property
    def complete(self) -> bool:
        """The committed tokens are a whole answer that nothing but an end can follow."""

    def prepare(self, drafted: Sequence[int]) -> None:
        """Begin to compute the mask after the committed tokens and `drafted`, on another thread."""

    def ready(self, drafted: Sequence[int], deadline: float) -> bool:
        """Wait for that mask, at most until `deadline` (of `time.monotonic`): whether it is there."""

    def mask(self, drafted: Sequence[int]) -> Tensor:
        """The tokens [V] bool that may follow the committed ones and `drafted`; all False if these cannot follow."""

    def commit(self, tokens: Sequence[int]) -> None:
        """Add `tokens` to the answer."""

    def over(self, drafted: Sequence[int] = ()) -> bool:
        """Whether only an end token can follow the committed tokens and `drafted`."""


@dataclass(frozen=True)
class Penalties:
    """Off: repetition 1, the others 0."""

    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0

    @property
    def any(self) -> bool:
        """Whether they change any logit."""
        return self != Penalties()


class Controls:
    """All rules of one request. The step thread passes the committed tokens to `commit`.

    bias: (token, number added to its logit); allowed: no other token may appear; bad_words: token sequences that may
    not appear in the answer. As in vLLM none begins in the prompt; only repetition penalties look at the prompt.
    """

    def __init__(
        self,
        vocabulary: int,
        prompt: Sequence[int],
        *,
        penalties: Penalties | None = None,
        bias: Sequence[tuple[int, float]] = (),
        allowed: Sequence[int] | None = None,
        bad_words: Sequence[tuple[int, ...]] = (),
        early: Forbidden | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        self._penalties = penalties or Penalties()
        self._early = early
        self.grammar = grammar
        self._bad_words = tuple(bad_words)
        self._tail: list[int] = []  # last tokens of the answer: possible beginnings of a bad word
        self._bias = _dense(vocabulary, bias)
        self._allowed: Tensor | None = None
        if allowed is not None:
            self._allowed = torch.zeros(vocabulary, dtype=torch.bool)
            self._allowed[list(allowed)] = True
        self._prompt_seen: Tensor | None = None  # [V] bool, of the prompt's tokens; the choices of a prompt share it
        if self._penalties.any:
            self._prompt_seen = torch.zeros(vocabulary, dtype=torch.bool)
            self._prompt_seen[list(set(prompt))] = True
        self._counts: Tensor | None = None  # [V] f32, counts of the answer's tokens; None before the first
        self._seen = self._prompt_seen  # tokens of the prompt and the answer

    def again(self, grammar: Grammar | None) -> "Controls":
        """The same rules for another answer to the same prompt, from its beginning.

        All constant data is shared. May be called while the step thread commits tokens of this one.
        """
        made = copy(self)
        made.grammar = grammar
        made._tail, made._seen, made._counts = [], self._prompt_seen, None
        return made

    def commit(self, tokens: Sequence[int]) -> None:
        """Add `tokens` to the answer."""
        if self._seen is not None:
            if self._counts is None:
                self._counts, self._seen = torch.zeros(len(self._seen)), self._seen.clone()
            self._counts.index_add_(0, torch.tensor(tokens), torch.ones(len(tokens)))
            self._seen[list(tokens)] = True
        if self._bad_words:
            self._tail = (self._tail + list(tokens))[-_longest(self._bad_words) :]
        if self.grammar is not None:
            self.grammar.commit(tokens)

    def prepare(self, drafted: Sequence[int]) -> None:
        """See `Control.prepare`: the grammar's mask."""
        if self.grammar is not None:
            self.grammar.prepare(drafted)

    def ready(self, drafted: Sequence[int], deadline: float) -> bool:
        """See `Control.ready`: the grammar's mask."""
        return self.grammar is None or self.grammar.ready(drafted, deadline)

    def apply(self, logits: Tensor, drafted: Sequence[int], position: int, columns: Tensor | None) -> None:
        """See `Control.apply`. If a grammar permits only an end token, no other mask applies."""

        def of(values: Tensor) -> Tensor:
            values = values.to(logits.device)
            return values if columns is None else values[columns]

        if self.grammar is not None:
            logits.masked_fill_(~of(self.grammar.mask(drafted)), -torch.inf)
        if self.grammar is None or not self.grammar.over(drafted):
            if self._allowed is not None:
                logits.masked_fill_(~of(self._allowed), -torch.inf)
            if self._bad_words:
                self._ban(logits, drafted, columns)
            if self._early is not None:
                self._early.apply(logits, drafted, position, columns)
        if self._bias is not None:
            logits += of(self._bias)
        if self._seen is not None:
            self._penalize(logits, drafted, of)

    def _ban(self, logits: Tensor, drafted: Sequence[int], columns: Tensor | None) -> None:
        """Forbid the last token of every bad word whose other tokens come just before."""
        tail = [*self._tail, *drafted]
        banned = [word[-1] for word in self._bad_words if len(word) == 1 or tail[-(len(word) - 1) :] == list(word[:-1])]
        if banned:
            Forbidden(tuple(banned), until=1).apply(logits, drafted, 0, columns)

    def _penalize(self, logits: Tensor, drafted: Sequence[int], of: Callable[[Tensor], Tensor]) -> None:
        """`of` gives the columns' values from those of all tokens."""
        seen, rule = self._seen, self._penalties
        assert seen is not None, "penalties need what was seen"
        more = torch.tensor(drafted) if drafted else None
        if rule.repetition != 1.0:
            here = of(seen if more is None else seen.index_fill(0, more, True))
            scaled = torch.where(logits > 0, logits / rule.repetition, logits * rule.repetition)
            torch.where(here, scaled, logits, out=logits)
        if rule.frequency or rule.presence:
            counts = torch.zeros(len(seen)) if self._counts is None else self._counts
            counts = of(counts if more is None else counts.index_add(0, more, torch.ones(len(drafted))))
            penalty = rule.frequency * counts
            logits -= penalty + rule.presence * (counts > 0) if rule.presence else penalty


def _longest(bad_words: Sequence[tuple[int, ...]]) -> int:
    """Number of last tokens needed to know that a bad word is nearly complete; at least one."""
    return max(1, max(map(len, bad_words)) - 1)


def _dense(vocabulary: int, bias: Sequence[tuple[int, float]]) -> Tensor | None:
    if not bias:
        return None
    dense = torch.zeros(vocabulary)
    for token, value in bias:
        dense[token] = value
    return dense
