"""The drafter interface of the engine. `none` is a drafter too.

Shapes: R drafting requests, gamma draft tokens each, V vocabulary, D hidden size, N tokens of a target pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import KVPool, LayerGroup
from dspark_server.speculation.copying import ALONE_WEIGHT, CopyBias, CopyTables, Match
from dspark_server.speculation.history import SurvivalHistory
from dspark_server.speculation.noise import Streams
from dspark_server.speculation.sampling import SamplingBatch


@dataclass(frozen=True)
class DraftRequest:
    """The start of a block: the anchor, its 0-based position, and a block table that reaches gamma tokens past it.

    `match`: an earlier occurrence of the last tokens, if there is one; `alone`: the block is copied from there, without
    the drafter; `copied` is the record of the request's earlier copies.
    """

    anchor: int
    position: int
    block_table: list[int]
    match: Match | None = None
    alone: bool = False
    copied: SurvivalHistory = field(default_factory=SurvivalHistory)


@dataclass(frozen=True)
class DraftBlock:
    """gamma draft tokens of each of R requests.

    tokens [R, gamma] int64; q [R, gamma, C] the distribution from which each token was drawn (read for ratio rows
    only), None where no row follows the ratio rule; columns [R, gamma, C] int64 the token of each column of q, None
    where column v is token v and C = V; confidence [R, gamma] float32 logits of c_k, None without a confidence head;
    survival [R, gamma] float32 the calibrated probability a_k that the prefix up to k survives, None without a head;
    usable [R] int64, the number of leading slots from finite numbers; copies: the biased tokens. hidden [R, gamma, D],
    base_logits and logits [R, gamma, V] are kept only for conformance.

    Rows that were copied alone come last (`with_copies`): alone [A] int64 has the lengths of their matches, and q,
    columns and confidence end before them.
    """

    tokens: Tensor
    q: Tensor | None
    columns: Tensor | None
    confidence: Tensor | None
    survival: Tensor | None
    usable: Tensor
    copies: CopyBias | None = None
    alone: Tensor | None = None
    hidden: Tensor | None = None
    base_logits: Tensor | None = None
    logits: Tensor | None = None

    @cached_property
    def told(self) -> bool:
        """The drafter has confidence: every block has calibrated survival."""
        return self.survival is not None and not bool(self.survival[:, 0].isnan().any())


def with_copies(
    block: DraftBlock | None,
    matches: Sequence[Match],
    records: Sequence[SurvivalHistory],
    gamma: int,
    tables: CopyTables,
) -> DraftBlock:
    """The drafter's block, widened to `gamma` slots, and below it one row for each match that is drafted alone.

    Survival of copies comes from the tables and from each request's own record.
    """
    if block is not None:
        missing = gamma - block.tokens.shape[1]
        survival = None if block.survival is None else F.pad(block.survival, (0, missing))
        block = replace(block, tokens=F.pad(block.tokens, (0, missing)), survival=survival)
        if not matches:
            return block
    tokens = torch.tensor([match.tokens for match in matches], dtype=torch.int64).view(len(matches), gamma)
    alone, usable = torch.tensor([match.length for match in matches], dtype=torch.int64), [gamma] * len(matches)
    chances = [
        [record.rate(chance, ALONE_WEIGHT) for chance in tables.chance_alone(match.length, gamma)]
        for match, record in zip(matches, records, strict=True)
    ]
    survival = torch.tensor(chances).view(len(matches), gamma).cumprod(dim=1)
    if block is None:
        return DraftBlock(tokens, None, None, None, survival, torch.tensor(usable), alone=alone)
    above = torch.full(block.tokens.shape, torch.nan) if block.survival is None else block.survival
    return replace(
        block,
        tokens=torch.cat([block.tokens, tokens]),
        survival=torch.cat([above, survival]),
        usable=torch.cat([block.usable, block.usable.new_tensor(usable)]),
        alone=alone,
    )


class Drafter(Protocol):
    """Proposes blocks, and keeps its context from the outputs of target passes."""

    gamma: int  # draft tokens per block; 0 for none
    taps: tuple[int, ...]  # target layers whose outputs `observe` takes
    identity: str  # part of the prefix hash: the rows of one drafter are useless to another
    copying: CopyTables | None  # tables for copies from the context; None: no copies

    @property
    def kv_group(self) -> LayerGroup | None:
        """Its layers in the KV pool, group 1."""

    def propose(
        self, requests: list[DraftRequest], sampling: SamplingBatch, streams: Streams, pool: KVPool
    ) -> DraftBlock:
        """Draft one block per request, row i of `sampling` belonging to requests[i]."""

    def observe(self, taps: list[Tensor], batch: Batch, pool: KVPool) -> None:
        """Write context rows for every token of a target pass; taps are [N, D], one per entry of `self.taps`."""


class NoDrafter:
    """No drafter model. With `copying`, greedy requests still copy what followed the same tokens in their own text."""

    gamma = 0
    taps: tuple[int, ...] = ()
    identity = "none"

    def __init__(self, copying: CopyTables | None = None) -> None:
        self.copying = copying

    @property
    def kv_group(self) -> LayerGroup | None:
        """No layers."""
        return None

    def propose(
        self, requests: list[DraftRequest], sampling: SamplingBatch, streams: Streams, pool: KVPool
    ) -> DraftBlock:
        raise AssertionError("the engine must not draft without a drafter")

    def observe(self, taps: list[Tensor], batch: Batch, pool: KVPool) -> None:
        return None
