"""Changes that a request makes to its logits before temperature: grammar, masks, biases and penalties.

The rules see the committed tokens and the draft tokens before a position, and nothing after them. They are applied to
the target's logits and to the draft's alike, so that a draft never proposes a token that the target may not take, and
drafting stays lossless under any rules: p and q of a position are distributions given the same prefix (DSPARK.md,
"Filters").

Order and formulas are vLLM's (v1/sample/sampler.py): grammar, allowed tokens, bad words, minimum length, bias, then
repetition, frequency and presence penalties.

Shapes: C columns of a row of logits, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from dspark_kernels import Rules
from torch import Tensor


class Control(Protocol):
    """Rules of one request."""

    @property
    def rules(self) -> Rules | None:
        """The same after the committed tokens as data, for `Kernels.apply_rules`; None: only `apply` can say them.

        Its tensors may be written by `commit`.
        """

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

    @cached_property
    def rules(self) -> Rules | None:
        """See `Control.rules`."""
        return Rules(early=torch.tensor(self.tokens), until=self.until)

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
        self._words = torch.tensor([part for word in bad_words for part in (len(word), *word)]) if bad_words else None
        self._tail: list[int] = []  # last tokens of the answer: possible beginnings of a bad word
        self._bias = _dense(vocabulary, bias)
        self._allowed: Tensor | None = None
        if allowed is not None:
            self._allowed = torch.zeros(vocabulary, dtype=torch.bool)
            self._allowed[list(allowed)] = True
        self._prompt_seen: Tensor | None = None  # [V] bool, of the prompt's tokens; the choices of a prompt share it
        touched = {token for token, _ in bias}
        if self._penalties.any:
            self._prompt_seen = torch.zeros(vocabulary, dtype=torch.bool)
            self._prompt_seen[list(set(prompt))] = True
            touched |= set(prompt)
        self._first = _Tokens(touched)  # that bias or penalties may change, before the answer
        self._counts: Tensor | None = None  # [V] f32, counts of the answer's tokens; None before the first
        self._seen = self._prompt_seen  # tokens of the prompt and the answer
        self._touched = self._first
        self._rules: Rules | None = None  # after the committed tokens; made when asked for

    def again(self, grammar: Grammar | None) -> "Controls":
        """The same rules for another answer to the same prompt, from its beginning.

        All constant data is shared. May be called while the step thread commits tokens of this one.
        """
        made = copy(self)
        made.grammar = grammar
        made._tail, made._seen, made._counts = [], self._prompt_seen, None
        made._touched, made._rules = self._first, None
        return made

    @property
    def rules(self) -> Rules | None:
        """See `Control.rules`: not of a grammar."""
        if self.grammar is not None:
            return None
        if self._rules is None:
            self._rules = Rules(
                allowed=self._allowed,
                words=self._words,
                tail=torch.tensor(self._tail, dtype=torch.int64) if self._bad_words else None,
                early=None if self._early is None else torch.tensor(self._early.tokens),
                until=0 if self._early is None else self._early.until,
                bias=self._bias,
                touched=self._touched.tensor,
                seen=self._seen,
                counts=self._counts,
                repetition=self._penalties.repetition,
                frequency=self._penalties.frequency,
                presence=self._penalties.presence,
            )
        return self._rules

    def commit(self, tokens: Sequence[int]) -> None:
        """Add `tokens` to the answer."""
        self._rules = None
        if self._seen is not None:
            if self._counts is None:
                self._counts = torch.zeros(len(self._seen), dtype=torch.float32)
                self._seen = self._seen.clone()
                self._touched = self._first.copy()
            counts, seen = self._counts.numpy(), self._seen.numpy()  # numpy writes single numbers faster
            for token in tokens:
                counts[token] += 1.0
                seen[token] = True
            self._touched.add(tokens)
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
            logits += of(self._bias).to(logits.dtype)
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
            counts = self._counts
            if counts is None:
                counts = torch.zeros(len(seen), dtype=torch.float32)
            if more is not None:
                counts = counts.index_add(0, more, torch.ones(len(drafted), dtype=torch.float32))
            counts = of(counts).to(logits.dtype)
            penalty = rule.frequency * counts
            logits -= penalty + rule.presence * (counts > 0) if rule.presence else penalty


class _Tokens:
    """A set of tokens, and the same as a tensor [S] i64 that grows at its end."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._known = set(tokens)
        self._all = torch.tensor(sorted(self._known), dtype=torch.int64)

    @property
    def tensor(self) -> Tensor:
        """The tokens, each once. Later ones are written behind its end."""
        return self._all[: len(self._known)]

    def add(self, tokens: Iterable[int]) -> None:
        """Add those that are not there yet."""
        new = set(tokens) - self._known
        if not new:
            return
        size = len(self._known)
        self._known |= new
        if len(self._known) > len(self._all):
            self._all = torch.cat([self._all[:size], self._all.new_empty(size + 64)])
        self._all[size : len(self._known)] = torch.tensor(list(new))

    def copy(self) -> "_Tokens":
        """A set of its own with the same tokens."""
        return _Tokens(self._known)


def _longest(bad_words: Sequence[tuple[int, ...]]) -> int:
    """Number of last tokens needed to know that a bad word is nearly complete; at least one."""
    return max(1, max(map(len, bad_words)) - 1)


def _dense(vocabulary: int, bias: Sequence[tuple[int, float]]) -> Tensor | None:
    if not bias:
        return None
    dense = torch.zeros(vocabulary, dtype=torch.float32)
    for token, value in bias:
        dense[token] = value
    return dense
