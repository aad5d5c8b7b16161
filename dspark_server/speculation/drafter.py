"""What a drafter is to the engine. `none` is one too.

Shapes: R drafting requests, gamma draft tokens each, V vocabulary, D hidden size, N tokens of a target pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    """Where a block starts: the anchor, its 0-based position, and blocks that reach gamma tokens past it.

    `match` says where the text stood before, if it did; `alone`: the block is copied from there, the drafter not asked;
    `copied` is what came of the request's earlier copies.
    """

    anchor: int
    position: int
    block_table: list[int]
    match: Match | None = None
    alone: bool = False
    copied: SurvivalHistory = field(default_factory=SurvivalHistory)


@dataclass(frozen=True)
class DraftBlock:
    """gamma drafted tokens of each of R requests.

    tokens [R, gamma] int64; q [R, gamma, C] the law each token was really drawn from (read for ratio rows only), None
    where no row follows the ratio rule; columns [R, gamma, C] int64 which token each column of q is, None where column
    v is token v and C = V; confidence [R, gamma] float32 logits of c_k, None without a confidence head; survival
    [R, gamma] float32 the calibrated chance a_k that the prefix up to k survives, None without a head; usable [R]
    int64, how many leading slots came from finite numbers; copies: what was favoured. hidden [R, gamma, D], base_logits
    and logits [R, gamma, V] are kept only for conformance.

    Rows that were copied alone stand last (`with_copies`): alone [A] int64 has the lengths of their matches, and q,
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

    @property
    def told(self) -> bool:
        """How likely its prefixes are to survive, the drafter says of every block."""
        return self.survival is not None and not bool(self.survival[:, 0].isnan().any())


def with_copies(
    block: DraftBlock | None,
    matches: Sequence[Match],
    records: Sequence[SurvivalHistory],
    gamma: int,
    tables: CopyTables,
) -> DraftBlock:
    """The drafter's block, widened to `gamma` slots, and below it one row for each match that is drafted alone.

    How likely copies are to survive the tables say, and each request's own record beside them.
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
    """Proposes blocks, and keeps its context from what the target computes anyway."""

    gamma: int  # draft tokens per block; 0 for none
    taps: tuple[int, ...]  # target layers whose outputs `observe` wants
    identity: str  # part of the prefix hash: rows of one drafter are garbage to another
    copying: CopyTables | None  # how far it may copy from the context; None: not at all

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
    """No model drafts. With `copying`, greedy requests still copy what followed the same tokens in their own text."""

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
