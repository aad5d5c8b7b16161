"""The drafter that copies: composed with another one, of which it makes the rows that need no model (see `copying`)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import KVPool
from dspark_server.runtime.paging import CacheRows
from dspark_server.speculation.copying import ALONE_WEIGHT, WIDTH, ContextIndex, CopyTables, Match
from dspark_server.speculation.draft_block import DraftBlock, DraftRequest, Source
from dspark_server.speculation.drafter import Drafter
from dspark_server.speculation.history import SurvivalHistory
from dspark_server.speculation.noise import Streams
from dspark_server.speculation.sampling import SamplingBatch

INDEXED_TOKENS = 4096  # of all requests, indexed in one step: about 4 ms


class Copying:
    """Drafts rows of Source.COPY from each request's own text, and leaves the others to `inner`.

    Shapes: R requests, gamma slots: the longer of a copy and of a block of `inner`.
    """

    def __init__(self, inner: Drafter, tables: CopyTables) -> None:
        self.inner = inner
        self.method = inner.method if inner.gamma else "ngram"
        self.gamma = max(inner.gamma, WIDTH)
        self.block = inner.block
        self.taps = inner.taps
        self.identity = inner.identity
        self._tables = tables
        self._may_index = INDEXED_TOKENS  # tokens left to index in this step

    @property
    def caches(self) -> list[CacheRows]:
        """The layers of `inner`."""
        return self.inner.caches

    @property
    def reads(self) -> Mapping[int, int]:
        """Those of `inner`."""
        return self.inner.reads

    def begin_step(self) -> None:
        """Allow INDEXED_TOKENS more tokens to be indexed."""
        self._may_index = INDEXED_TOKENS

    def index(self, context: ContextIndex, tokens: Sequence[int]) -> None:
        """Index a request's tokens, as many as this step has left."""
        self._may_index -= context.enter(tokens, self._may_index)

    def match(self, context: ContextIndex, tokens: Sequence[int]) -> Match | None:
        """Earlier occurrence of the end of a request's tokens, as far as they are indexed."""
        self.index(context, tokens)
        return context.match(tokens, self.gamma)

    def rate(self, match: Match, copied: SurvivalHistory) -> float:
        """Estimated probability that the first token of a copy is accepted, as in the block's survival."""
        return copied.rate(self._tables.chance_alone(match.length, 1)[0], ALONE_WEIGHT)

    def propose(
        self, requests: Sequence[DraftRequest], sampling: SamplingBatch, streams: Streams, pool: KVPool
    ) -> DraftBlock:
        """One block per request, copies last; `sampling` has a row for each of the others."""
        own = by_drafter(requests)
        block = self.inner.propose(own, sampling, streams, pool) if own else None
        return self.complete(block, requests)

    def observe(self, taps: list[Tensor], batch: Batch, pool: KVPool) -> None:
        """Write the context of `inner`."""
        self.inner.observe(taps, batch, pool)

    def complete(self, block: DraftBlock | None, requests: Sequence[DraftRequest]) -> DraftBlock:
        """The block of `inner` for its rows (None: it has none), widened to gamma slots, and the copies below it.

        Survival of copies comes from the tables and from each request's own record.
        """
        copies = requests[0 if block is None else len(block.tokens) :]
        if block is not None:
            missing = self.gamma - block.tokens.shape[1]
            survival = None if block.survival is None else F.pad(block.survival, (0, missing))
            block = replace(block, tokens=F.pad(block.tokens, (0, missing)), survival=survival, requests=requests)
            if not copies:
                return block
        rows: list[list[int]] = []
        chances: list[list[float]] = []
        for request in copies:
            assert request.match is not None, "a copy needs an earlier occurrence"
            rows.append(request.match.tokens)
            table = self._tables.chance_alone(request.match.length, self.gamma)
            chances.append([request.copied.rate(chance, ALONE_WEIGHT) for chance in table])
        tokens, survival = torch.tensor(rows), torch.tensor(chances).cumprod(dim=1)
        usable = torch.full((len(copies),), self.gamma)
        if block is None:
            return DraftBlock(tokens, usable, survival=survival, requests=requests)
        above = torch.full(block.tokens.shape, torch.nan) if block.survival is None else block.survival
        return replace(
            block,
            tokens=torch.cat([block.tokens, tokens]),
            survival=torch.cat([above, survival]),
            usable=torch.cat([block.usable, usable]),
        )


def by_drafter(requests: Sequence[DraftRequest]) -> Sequence[DraftRequest]:
    """The requests whose rows a drafter's model makes: the first ones."""
    return [request for request in requests if request.source is Source.DRAFTER]
