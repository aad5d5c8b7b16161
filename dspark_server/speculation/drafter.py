"""What a drafter is to the engine. `none` is one too.

Shapes: R drafting requests, gamma draft tokens each, V vocabulary, D hidden size, N tokens of a target pass.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import KVPool, LayerGroup
from dspark_server.speculation.noise import Streams
from dspark_server.speculation.sampling import SamplingBatch


@dataclass(frozen=True)
class DraftRequest:
    """Where a block starts: the anchor, its 0-based position, and blocks that reach gamma tokens past it."""

    anchor: int
    position: int
    block_table: list[int]


@dataclass(frozen=True)
class DraftBlock:
    """gamma drafted tokens of each of R requests.

    tokens [R, gamma] int64; q [R, gamma, C] the law each token was really drawn from (read for ratio rows only), None
    where no row follows the ratio rule; columns [R, gamma, C] int64 which token each column of q is, None where column
    v is token v and C = V; confidence [R, gamma] float32 logits of c_k, None without a confidence head; survival
    [R, gamma] float32 the calibrated chance a_k that the prefix up to k survives, None without a head; usable [R]
    int64, how many leading slots came from finite numbers. hidden [R, gamma, D], base_logits and logits [R, gamma, V]
    are kept only for conformance.
    """

    tokens: Tensor
    q: Tensor | None
    columns: Tensor | None
    confidence: Tensor | None
    survival: Tensor | None
    usable: Tensor
    hidden: Tensor | None = None
    base_logits: Tensor | None = None
    logits: Tensor | None = None


class Drafter(Protocol):
    """Proposes blocks, and keeps its context from what the target computes anyway."""

    gamma: int  # draft tokens per block; 0 for none
    taps: tuple[int, ...]  # target layers whose outputs `observe` wants
    identity: str  # part of the prefix hash: rows of one drafter are garbage to another

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
    """Plain decoding: one token a step, nothing to remember."""

    gamma = 0
    taps: tuple[int, ...] = ()
    identity = "none"

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
