"""Drafters that run token by token over pairs of a target's features and the next token: Eagle3 and MTP layers.

Pair i is (features of token i, token i + 1) and predicts token i + 2. Its row goes to the place of token i + 1, on
whose pass both are known: then a row depends on tokens up to its own place alone. Rotary embedding sees differences of
positions only, so the place serves for the position. Place 0 has no pair, and no query sees it.

Shapes: R drafting requests, N tokens of a target pass, D the drafter's width, Dt the target's, m taps.
"""

from abc import abstractmethod

from torch import Tensor

from dspark_server.models.layers.embedding import Embedding, Head
from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import KVPool, LayerCache
from dspark_server.runtime.paging import CacheRows
from dspark_server.speculation import features
from dspark_server.speculation.copying import CopyTables
from dspark_server.speculation.model_drafter import ModelDrafter, Slots
from dspark_server.speculation.sequential import BlockSampler


class PairDrafter(ModelDrafter):
    """Drafts a token in each pass. `observe` writes features of the target's tokens, and keys and values of pairs."""

    def __init__(
        self,
        depth: int,
        taps: tuple[int, ...],
        identity: str,
        caches: CacheRows,
        embed: Embedding,
        head: Head,
        sampler: BlockSampler,
        copying: CopyTables | None,
        width: int | None = None,
    ) -> None:
        """`caches` are the rows of its layer, `width` the channels of features (None: the model's)."""
        super().__init__(depth, taps, identity, sampler, copying)
        self.passes = depth
        self._caches = caches
        self._width = width or embed.weight.shape[1]
        self._embed = embed
        self._head = head

    @property
    def caches(self) -> list[CacheRows]:
        """Keys and values of the layer, and the features."""
        return [self._caches, CacheRows(1, self._width, values=False, dtype=self._embed.weight.dtype)]

    @abstractmethod
    def features(self, taps: list[Tensor]) -> Tensor:
        """Features [N, D] of the target's tokens, from taps, m times [N, Dt]."""

    @abstractmethod
    def write(self, embedded: Tensor, before: Tensor, batch: Batch, cache: LayerCache) -> None:
        """Write keys and values of pairs of features `before` [N, D] and tokens' embeddings [N, D]."""

    @abstractmethod
    def step(self, embedded: Tensor, before: Tensor, batch: Batch, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """The layer's outputs [N, D] for pairs: the features of the next pair, and the input of the head."""

    def observe(self, taps: list[Tensor], batch: Batch, pool: KVPool) -> None:
        """Write each token's features, and the row of the pair that ends with it."""
        rows, kept = pool.layers(1)
        before = features.keep(self.features(taps), batch, kept)
        self.write(self._embed(batch.tokens), before, batch, rows)

    def forward(self, number: int, blocks: Batch, previous: Tensor, state: Tensor | None, pool: KVPool) -> Slots:
        """One token more: the pair of the features before it, the target's or the drafter's own, and the last token."""
        rows, kept = pool.layers(1)
        before = features.last(blocks, kept) if state is None else state
        hidden, normed = self.step(self._embed(previous), before, blocks.slot(number, self.gamma, previous), rows)
        return Slots(hidden.unsqueeze(1), self._head(normed).unsqueeze(1), hidden)
