"""A step's draft: what each request asks for, and the one block of draft tokens from there to acceptance.

Shapes: R drafting requests, gamma draft tokens each, C columns of draft distributions, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor

from dspark_server.runtime.paging import BlockTable
from dspark_server.speculation.copying import CopyBias, Match
from dspark_server.speculation.history import SurvivalHistory


class Source(Enum):
    """Origin of a row of a block."""

    DRAFTER = "drafter"
    COPY = "copy"  # copied from the request's own text, without the drafter


@dataclass(frozen=True)
class DraftRequest:
    """A block to draft: it continues run `run` of the pass after the anchor, its last token, at 0-based `position`.

    The block tables reach gamma tokens past the anchor; at most `limit` draft tokens can be verified. `match`: an
    earlier occurrence of the last tokens, if there is one, which a row of Source.COPY needs; `copied` is the record of
    the request's earlier copies.
    """

    run: int
    anchor: int
    position: int
    tables: Sequence[BlockTable]
    limit: int
    match: Match | None = None
    source: Source = Source.DRAFTER
    copied: SurvivalHistory = field(default_factory=SurvivalHistory)


@dataclass(frozen=True)
class DraftBlock:
    """gamma draft tokens of each of R requests, in one row order from draft to acceptance.

    tokens [R, gamma] int64. usable [R] int64: number of leading slots that can be verified; those after it came from
    numbers that are not finite, or the request's rules allow no token there. q [R, gamma, C] the distribution from
    which each token was drawn, after temperature, filters and any shortlist (read for sampled rows without a seed
    only); None: every draft was greedy, q is one-hot at the token. columns [R, gamma, C] int64 the token of each column
    of q (a token with two columns has its mass in one of them); None: column v is token v and C = V. Rows of the
    drafter come first, copies last; q and columns may end before the copies.

    survival [R, gamma] float32 the estimated probability a_k that the prefix up to k survives, from the confidence head
    and its calibration if the drafter `has_confidence`, else from earlier drafts; None until the estimate is made. In
    the end it is corrected by outcomes (`estimates`); `stated` [R, gamma] is what it was before that.
    requests [R] asked for the rows; lengths [R] is the number of tokens of each that the target verifies, empty until
    it is selected.

    confidence [R, gamma] float32 logits of c_k, None without a confidence head; copies: the biased tokens. hidden
    [R, gamma, D], base_logits and logits [R, gamma, V] are kept only for conformance.
    """

    tokens: Tensor
    usable: Tensor
    q: Tensor | None = None
    columns: Tensor | None = None
    survival: Tensor | None = None
    has_confidence: bool = False
    requests: Sequence[DraftRequest] = ()
    lengths: Sequence[int] = ()
    stated: Tensor | None = None
    confidence: Tensor | None = None
    copies: CopyBias | None = None
    hidden: Tensor | None = None
    base_logits: Tensor | None = None
    logits: Tensor | None = None

    @classmethod
    def of(cls, tokens: Tensor, q: Tensor | None = None, columns: Tensor | None = None) -> "DraftBlock":
        """A block of tokens [R, gamma] that can all be verified."""
        return cls(tokens, torch.full((len(tokens),), tokens.shape[1]), q, columns)

    @property
    def by_drafter(self) -> int:
        """Number of rows that the drafter made; the others are copies."""
        return sum(request.source is Source.DRAFTER for request in self.requests)

    @property
    def slots(self) -> int:
        """Number of draft tokens that could have been verified, as known before the draft."""
        return sum(request.limit for request in self.requests)

    @cached_property
    def limits(self) -> list[int]:
        """Number of tokens of each row that can be verified.

        A NaN at slot k cuts the prefix to k - 1, never shorter: earlier tokens were sampled independently of it.
        """
        return [min(request.limit, most) for request, most in zip(self.requests, self.usable.tolist(), strict=True)]

    @cached_property
    def prefixes(self) -> dict[int, list[int]]:
        """The draft tokens to verify, by the run that they continue."""
        rows = zip(self.requests, self.tokens.tolist(), self.lengths, strict=True)
        return {request.run: tokens[:length] for request, tokens, length in rows}

    def rows_of(self, runs: Sequence[int]) -> list[int]:
        """The row that continues each of `runs`; -1: none."""
        row_of = {request.run: row for row, request in enumerate(self.requests)}
        return [row_of.get(run, -1) for run in runs]

    def q_of(self, row: Tensor, slot: int, token: Tensor) -> Tensor | float:
        """q of `token` [n] at a slot of rows `row` [n], as [n] float64."""
        if self.q is None:
            return 1.0
        q = self.q[row, slot]
        if self.columns is None:
            return q.gather(1, token.unsqueeze(1)).squeeze(1).double()
        return (q * (self.columns[row, slot] == token.unsqueeze(1))).sum(1).double()
