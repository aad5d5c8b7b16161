"""Sampling of each request of a step: its parameters as a struct of arrays, and the rule they imply.

Shapes: R requests, N rows of logits (one row predicts one token).
Three rules (DSPARK.md, "Losslessness"), chosen per request:

- greedy: temperature below `GREEDY_BELOW`; the distribution is one-hot.
- ratio: sampled, unseeded; tokens are drawn by inverse CDF, drafts are tested with min(1, p/q).
- coupled: sampled, seeded; a token is argmax(log p + Gumbel noise), the noise shared by draft and target.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

import torch
from dspark_kernels import Filters, Ruled
from torch import Tensor

from dspark_server.speculation.controls import Control

GREEDY_BELOW = 1e-5  # vLLM's _SAMPLING_EPS: below it, dividing by the temperature only overflows


class Rule(Enum):
    """The rule by which a request's tokens are drawn and its drafts accepted."""

    GREEDY = "greedy"
    RATIO = "ratio"
    COUPLED = "coupled"


@dataclass(frozen=True)
class Traits:
    """Properties that rows of a batch may have: decided once, in Python, so that steps take fast paths without syncs.

    A subset of a batch inherits the traits, so True means "perhaps", False means "certainly not".
    """

    rules: frozenset[Rule]
    tempered: bool  # a sampled row whose temperature is not 1
    top_k: bool
    top_p: bool
    min_p: bool


@dataclass(frozen=True, eq=False)
class SamplingBatch:
    """Sampling parameters, a struct of arrays, one row per request (or per row of logits, after `select`).

    temperature [R] f32 (0 = greedy), top_k [R] i64 (0 = off), top_p [R] f32 (1 = off), min_p [R] f32 (0 = off), coupled
    [R] bool, key [R] i64 (the user's seed if coupled, else a private random nonce of this choice), choice [R] i64
    (index among n), position [R] i64 (absolute position of the first token this step may produce: the anchor's + 1),
    draft_number [R] i64 (counts every draft of the request, discarded ones too). controls: the rules of each row, or
    empty if no row has any; drafted: the draft tokens before each row, kept only where there are rules.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    coupled: Tensor
    key: Tensor
    choice: Tensor
    position: Tensor
    draft_number: Tensor
    traits: Traits
    controls: tuple[Control | None, ...] = ()
    drafted: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(
        cls,
        *,
        position: Sequence[int],
        key: Sequence[int],
        temperature: Sequence[float] | None = None,
        top_k: Sequence[int] | None = None,
        top_p: Sequence[float] | None = None,
        min_p: Sequence[float] | None = None,
        coupled: Sequence[bool] | None = None,
        choice: Sequence[int] | None = None,
        draft_number: Sequence[int] | None = None,
        controls: Sequence[Control | None] | None = None,
        device: torch.device | str = "cpu",
    ) -> "SamplingBatch":
        """Build from one Python number per request; parameters left out are off (temperature 1, choice 0, draft 0)."""
        size = len(position)
        temperature = temperature or [1.0] * size
        coupled = coupled or [False] * size
        top_k, top_p, min_p = top_k or [0] * size, top_p or [1.0] * size, min_p or [0.0] * size
        rules = [_rule(t, c) for t, c in zip(temperature, coupled, strict=True)]
        traits = Traits(
            rules=frozenset(rules),
            tempered=any(t != 1.0 and rule is not Rule.GREEDY for t, rule in zip(temperature, rules, strict=True)),
            top_k=any(k > 0 for k in top_k),
            top_p=any(p < 1 for p in top_p),
            min_p=any(p > 0 for p in min_p),
        )

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            assert len(values) == size, f"{len(values)} values for {size} requests"
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            # Exactly 0, so that the tensor and the traits cannot disagree about a row at the edge.
            temperature=column([0.0 if t < GREEDY_BELOW else t for t in temperature], torch.float32),
            top_k=column(top_k, torch.int64),
            top_p=column(top_p, torch.float32),
            min_p=column(min_p, torch.float32),
            coupled=column(coupled, torch.bool),
            key=column([_signed(k) for k in key], torch.int64),
            choice=column(choice or [0] * size, torch.int64),
            position=column(position, torch.int64),
            draft_number=column(draft_number or [0] * size, torch.int64),
            traits=traits,
            controls=tuple(controls) if controls and any(controls) else (),
            drafted=((),) * size if controls and any(controls) else (),
        )

    def __len__(self) -> int:
        return self.temperature.shape[0]

    @property
    def all_greedy(self) -> bool:
        return self.traits.rules == {Rule.GREEDY}

    def filters(self, rows: Tensor) -> Filters:
        """Filters of rows [n]."""
        return Filters(self.top_k[rows], self.top_p[rows], self.min_p[rows])

    @property
    def filtered(self) -> bool:
        """Some row may have a top-k, top-p or min-p."""
        return self.traits.top_k or self.traits.top_p or self.traits.min_p

    @property
    def at_once(self) -> bool:
        """Every row is greedy, or drawn by inverse CDF under its filters alone: blocks are drawn and accepted whole."""
        return Rule.COUPLED not in self.traits.rules and not self.controls

    def to(self, device: torch.device) -> "SamplingBatch":
        """The same with tensors on `device`."""
        return replace(
            self,
            temperature=self.temperature.to(device),
            top_k=self.top_k.to(device),
            top_p=self.top_p.to(device),
            min_p=self.min_p.to(device),
            coupled=self.coupled.to(device),
            key=self.key.to(device),
            choice=self.choice.to(device),
            position=self.position.to(device),
            draft_number=self.draft_number.to(device),
        )

    @cached_property
    def greedy(self) -> Tensor:
        """[R] bool."""
        return self.temperature == 0

    def select(
        self, indices: Tensor, offset: int | Tensor = 0, drafted: Callable[[], Iterable[Sequence[int]]] | None = None
    ) -> "SamplingBatch":
        """Rows `indices` [N] i64, `offset` (scalar or [N]) positions further on, after the draft tokens `drafted()`."""
        controls: tuple[Control | None, ...] = ()
        before: tuple[tuple[int, ...], ...] = ()
        if self.controls:
            rows = indices.tolist()
            controls = tuple(self.controls[i] for i in rows)
            before = tuple(map(tuple, drafted())) if drafted is not None else tuple(self.drafted[i] for i in rows)
        return SamplingBatch(
            temperature=self.temperature[indices],
            top_k=self.top_k[indices],
            top_p=self.top_p[indices],
            min_p=self.min_p[indices],
            coupled=self.coupled[indices],
            key=self.key[indices],
            choice=self.choice[indices],
            position=self.position[indices] + offset,
            draft_number=self.draft_number[indices],
            traits=self.traits,
            controls=controls,
            drafted=before,
        )

    def ahead(self, offset: int, drafted: Sequence[Tensor] = ()) -> "SamplingBatch":
        """The same requests, `offset` positions further on: the sampling of slot `offset` of a draft.

        `drafted` holds the tokens [R] of each slot since then, for the rules that look at them.
        """
        if offset == 0:
            return self
        before = self.drafted
        if self.controls and drafted:
            further = zip(*(tokens.tolist() for tokens in drafted), strict=True)
            before = tuple((*own, *more) for own, more in zip(self.drafted, further, strict=True))
        return replace(self, position=self.position + offset, drafted=before)

    def ruled(self) -> Ruled | None:
        """The rules of its rows as data, of rows that have them; None if no row has."""
        rules = [None if control is None else control.rules for control in self.controls]
        if not any(rules):
            return None
        return Ruled(rules, self.position, torch.tensor(self.drafted, dtype=torch.int64).view(len(self), -1))

    def without_rules(self) -> "SamplingBatch":
        """The same rows once `ruled` has been applied to the logits: other controls stay."""
        left = tuple(None if control is None or control.rules else control for control in self.controls)
        return replace(self, controls=left) if any(left) else self.without_controls()

    def without_controls(self) -> "SamplingBatch":
        """The same rows once their rules have been applied to the logits."""
        return replace(self, controls=(), drafted=()) if self.controls else self

    @cached_property
    def parts(self) -> "list[tuple[Rule, Tensor | None, SamplingBatch]]":
        """The batch cut by rule, rows with controls apart: (rule, indices [n] or None for all rows, the rows).

        One request's controls then cost the others nothing.
        """
        if len(self.traits.rules) == 1 and (not self.controls or all(self.controls)):
            return [(rule, None, self) for rule in self.traits.rules]
        masks = {
            Rule.GREEDY: self.greedy,
            Rule.RATIO: ~self.greedy & ~self.coupled,
            Rule.COUPLED: ~self.greedy & self.coupled,
        }
        controlled = torch.tensor([bool(control) for control in self.controls] or [False] * len(self))
        controlled = controlled.to(self.key.device)
        cut: list[tuple[Rule, Tensor | None, SamplingBatch]] = []
        for rule in Rule:
            for mask in (masks[rule] & ~controlled, masks[rule] & controlled):
                indices = mask.nonzero().squeeze(1)
                if len(indices):
                    cut.append((rule, indices, self._part(indices, rule)))
        return cut

    def _part(self, indices: Tensor, rule: Rule) -> "SamplingBatch":
        """Rows that follow one rule, and have controls or not."""
        part = self.select(indices)
        part = part if any(part.controls) else part.without_controls()
        return replace(part, traits=replace(self.traits, rules=frozenset({rule})))


def _rule(temperature: float, coupled: bool) -> Rule:
    if temperature < GREEDY_BELOW:
        return Rule.GREEDY
    return Rule.COUPLED if coupled else Rule.RATIO


def _signed(key: int) -> int:
    """The low 64 bits of `key` as a signed int64."""
    return ((key + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)
