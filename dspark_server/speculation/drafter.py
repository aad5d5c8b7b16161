"""The drafter interface of the engine. `none` is a drafter too.

Shapes: R drafting requests, gamma draft tokens each, V vocabulary, D hidden size, N tokens of a target pass.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import KVPool
from dspark_server.runtime.paging import CacheRows
from dspark_server.speculation.draft_block import DraftBlock, DraftRequest
from dspark_server.speculation.noise import Streams
from dspark_server.speculation.sampling import SamplingBatch


class Drafter(Protocol):
    """Proposes blocks, and keeps its context from the outputs of target passes."""

    method: str  # its name in `--speculative-config`
    gamma: int  # most draft tokens of a block; 0 for none
    block: int  # most draft tokens of a block from its model; longer ones are copies
    taps: tuple[int, ...]  # target layers whose outputs `observe` takes
    identity: str  # part of the prefix hash: the rows of one drafter are useless to another

    @property
    def caches(self) -> list[CacheRows]:
        """The rows that each of its layers keeps; owner 1 of the KV pool."""

    @property
    def reads(self) -> Mapping[int, int]:
        """Target layers with a window whose rows it reads, too, and the reach that it needs of each."""

    def propose(
        self, requests: Sequence[DraftRequest], sampling: SamplingBatch, streams: Streams, pool: KVPool
    ) -> DraftBlock:
        """Draft one block per request, row i of `sampling` belonging to requests[i]."""

    def observe(self, taps: list[Tensor], batch: Batch, pool: KVPool) -> None:
        """Write context rows for every token of a target pass; taps are [N, D], one per entry of `self.taps`."""


class NoDrafter:
    """No drafter model."""

    method = "none"
    gamma = 0
    block = 0
    taps: tuple[int, ...] = ()
    identity = "none"
    reads: Mapping[int, int] = {}

    @property
    def caches(self) -> list[CacheRows]:
        """No layers."""
        return []

    def propose(
        self, requests: Sequence[DraftRequest], sampling: SamplingBatch, streams: Streams, pool: KVPool
    ) -> DraftBlock:
        raise AssertionError("the engine must not draft without a drafter")

    def observe(self, taps: list[Tensor], batch: Batch, pool: KVPool) -> None:
        return None
