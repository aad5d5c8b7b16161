"""A drafter with a model: parallel (one pass gives a whole block) or autoregressive (a pass for each token).

Shapes: R drafting requests, gamma draft tokens each, n slots that a pass gives, D hidden size, C draft tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_server.runtime.batch import Batch, Run
from dspark_server.runtime.kv import KVPool
from dspark_server.runtime.paging import CacheRows
from dspark_server.speculation.copying import CopyBias, CopyTables
from dspark_server.speculation.draft_block import DraftBlock, DraftRequest
from dspark_server.speculation.noise import Streams
from dspark_server.speculation.sampling import SamplingBatch
from dspark_server.speculation.sequential import BlockSampler, Drawing, Draws


class Slots(NamedTuple):
    """The outputs of a pass: hidden [R, n, D] and base logits [R, n, C] float32 of the next slots, a state [R, .]."""

    hidden: Tensor
    base: Tensor
    state: Tensor | None = None


class ModelDrafter(ABC):
    """Drafts by its model's passes, each for the next slots of all blocks, and `sampler`, which draws their tokens.

    Its rows are owner 1 of the KV pool. Row i may depend on tokens up to i alone, so that a block of the pool has what
    its own tokens say: then prefix hits, preemption and rollback by length are the same as the target's.
    """

    method: str  # see `Drafter`
    passes: int  # of a draft: 1 if parallel, gamma if autoregressive
    width: int  # tokens of a block's passes, the anchor included; gamma, or gamma and the anchor
    mask_token: int = 0  # stands for the tokens of a block that its pass does not know yet

    def __init__(
        self, gamma: int, taps: tuple[int, ...], identity: str, sampler: BlockSampler, copying: CopyTables | None
    ) -> None:
        self.gamma = self.block = self.width = gamma
        self.taps = taps
        self.identity = identity
        self.sampler = sampler
        self.copying = copying

    @property
    @abstractmethod
    def caches(self) -> list[CacheRows]:
        """The rows that each of its layers keeps."""

    @property
    def reads(self) -> dict[int, int]:
        """See `Drafter.reads`."""
        return {}

    @abstractmethod
    def observe(self, taps: list[Tensor], batch: Batch, pool: KVPool) -> None:
        """See `Drafter.observe`."""

    @abstractmethod
    def forward(self, number: int, blocks: Batch, previous: Tensor, state: Tensor | None, pool: KVPool) -> Slots:
        """Run pass `number` of a draft; reads nothing on the host.

        `blocks` holds R runs of `width` tokens, the anchor and then `mask_token`. previous [R] int64 are the tokens
        before the slots of this pass, `state` is what the pass before gave.
        """

    def propose(
        self, requests: Sequence[DraftRequest], sampling: SamplingBatch, streams: Streams, pool: KVPool
    ) -> DraftBlock:
        """See `Drafter.propose`. Runs no pass for slots that no request can have verified."""
        mask = [self.mask_token] * (self.width - 1)
        runs = [Run([r.anchor, *mask], r.position, r.tables, self.width) for r in requests]
        anchors = torch.tensor([r.anchor for r in requests])
        blocks = Batch.of(runs, pool.groups)
        wanted = max(1, max(request.limit for request in requests))
        drawing = Drawing(self.sampler, anchors, sampling, streams, self.copies(requests, sampling))
        self.run(blocks, drawing, pool, wanted)
        return replace(drawing.block(self.gamma), requests=requests)

    def run(self, blocks: Batch, drawing: Draws, pool: KVPool, slots: int) -> None:
        """Run the passes for the first `slots` slots of `blocks`, and draw their tokens."""
        state = None
        for number in range(-(-slots * self.passes // self.gamma)):
            hidden, base, state = self.forward(number, blocks, drawing.previous, state, pool)
            drawing.draw(hidden, base)

    def copies(self, requests: Sequence[DraftRequest], sampling: SamplingBatch) -> CopyBias | None:
        """Copies from the requests' own texts that bias the draft; None: none."""
        if self.copying is None or all(request.match is None for request in requests):
            return None
        return CopyBias([r.match for r in requests], self.gamma, sampling.temperature, self.copying)
