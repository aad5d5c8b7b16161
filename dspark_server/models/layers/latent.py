"""DeepSeek-V4's attention: one row for key and value, a window, compressed entries behind it, an indexer that chooses.

A query sees the rows of the last W tokens, and entries that stand for `ratio` tokens each: all of them ("heavily
compressed", 128 tokens), or those that the indexer scores highest ("compressed sparse", 4 tokens). Entry w is visible
from position (w + 1) * ratio - 1 on, whose run writes it: a rejected draft leaves nothing that is ever read.

Shapes: N tokens of R runs, D the model's width, H query heads (of this rank), d head size, of which the last r channels
are rotated; G groups of heads in the output; M entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dspark_server.models.layers.attention import AttentionConfig
from dspark_server.models.layers.parts import Parts
from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import LayerCache
from dspark_server.runtime.linear import Linear
from dspark_server.runtime.paging import CacheRows


@dataclass(frozen=True)
class IndexConfig:
    """An indexer of `heads` heads of `head_dim` channels, which chooses `chosen` entries."""

    heads: int
    head_dim: int
    chosen: int


@dataclass(frozen=True)
class LatentConfig(AttentionConfig):
    """One layer's. `window` tokens are seen as they are, and entries of `ratio` tokens each, 0: none.

    The last `rotated` channels of a head are rotated. Queries pass through `query_rank` channels, outputs through
    `output_rank` for each of `groups`.
    """

    rotated: int = 0
    ratio: int = 0
    query_rank: int = 0
    groups: int = 1
    output_rank: int = 0
    index: IndexConfig | None = None

    @property
    def spans(self) -> int:
        """The number of windows of `ratio` tokens that an entry is made of: its own, with an indexer the one before."""
        return 2 if self.index else 1

    @property
    def parts(self) -> int:
        """Ranks share whole groups."""
        return self.groups

    def shared_by(self, size: int) -> "LatentConfig":
        """Return the share of one of `size` ranks: heads, with their groups. Rows and entries are on every rank."""
        return replace(self, heads=self.heads // size, groups=self.groups // size)


class LatentAttention:
    """Attention of one layer, without the norm before it.

    All projections of its input are one product, and so are those of the narrow queries.
    """

    def __init__(self, parts: Parts, config: LatentConfig, prefix: str) -> None:
        """Read this rank's share of the weights under `prefix`, such as "layers.3.attn."."""
        group, kernels, width, reader = parts.group, parts.kernels, config.head_dim, parts.reader
        groups = config.groups * config.output_rank
        self.config = config.shared_by(group.size)
        self._group, self._kernels, self._eps = group, kernels, parts.eps
        self._query_norm = parts.norm(f"{prefix}q_norm", config.query_rank)
        self._row_norm = parts.norm(f"{prefix}kv_norm", width)
        self._table = parts.rotary_table(config.rope, config.rotated)
        self._compressor = self._indexer = None
        into = [parts.matrix(f"{prefix}wq_a", config.query_rank), parts.matrix(f"{prefix}wkv", width)]
        own = group.share(config.heads * width)
        queries = [reader.take(f"{prefix}wq_b.weight", (config.heads * width, config.query_rank), own)]
        if config.ratio:
            self._compressor = Compressor(parts, config, width, self._table, f"{prefix}compressor.")
            into += self._compressor.take()
        if config.index is not None:
            self._indexer = Indexer(parts, config, config.index, self._table, f"{prefix}indexer.")
            into += self._indexer.keys.take()
            into.append(parts.matrix(f"{prefix}indexer.weights_proj", config.index.heads))
            shape = (config.index.heads * config.index.head_dim, config.query_rank)
            queries.append(reader.take(f"{prefix}indexer.wq_b.weight", shape))
        self._into = Linear(torch.cat(into), None, kernels)
        self._parts = [len(each) for each in into]
        self._queries = Linear(torch.cat(queries), None, kernels)
        shape = (groups, config.heads * width // config.groups)
        outputs = reader.take(f"{prefix}wo_a.weight", shape, group.share(groups))
        self._outputs = [Linear(each.clone(), None, kernels) for each in outputs.split(config.output_rank)]
        self._joined = Linear(parts.summed(f"{prefix}wo_b", groups, group.share(groups), bias=False)[0], None, kernels)
        heads = group.share(config.heads)
        self._sinks = reader.take(f"{prefix}attn_sink", (config.heads,), heads, dtype=torch.float32)

    def caches(self, length: int) -> list[CacheRows]:
        """Rows of tokens; entries and the rows that become entries; the indexer's."""
        config, parts = self.config, (self._compressor, self._indexer.keys if self._indexer else None)
        assert config.window is not None
        rows = [CacheRows(1, config.head_dim, _reach(config.window, length), values=False)]
        return [*rows, *(each for part in parts if part is not None for each in part.caches(length))]

    @property
    def products(self) -> list[Linear]:
        """Its matrix products, in order."""
        return [self._into, self._queries, *self._outputs, self._joined]

    def forward(self, x: Tensor, batch: Batch, caches: Sequence[LayerCache], causal: bool = True) -> Tensor:
        """Attend from x [N, D] over the caches, which get the batch's rows, -> [N, D], the sum of all ranks.

        With causal=False runs are draft blocks of one width: each token sees the window before its block and the whole
        block, whose rows are not kept.
        """
        config, kernels, eps = self.config, self._kernels, self._eps
        narrow, row, *others = self._into(x, out_float32=True).split(self._parts, dim=1)
        narrow = kernels.rms_norm(narrow.to(x.dtype), self._query_norm, eps)
        queries = self._queries(narrow, out_float32=True)
        window, *compressed = caches
        paging, positions, starts = batch.paging[window.group], batch.positions, batch.query_start
        own = None
        if causal:
            kernels.latent_rows(row, self._row_norm, positions, self._table, eps, window.keys, paging.slots)
        else:
            own = kernels.latent_rows(row, self._row_norm, positions, self._table, eps)
        seen: dict[str, Any] = {}
        if self._compressor is not None:
            entries, raw, *index = compressed
            self._compressor.write(others[0], others[1], batch, entries, raw)
            tables = batch.paging[entries.group].block_tables
            seen = {"entries": entries.keys, "entry_tables": tables, "ratio": config.ratio}
            if self._indexer is not None:
                self._indexer.keys.write(others[2], others[3], batch, *index)
                seen["chosen"] = self._indexer.choose(queries, others[4], batch, index[0])
        attended = kernels.latent_attention(
            queries[:, : config.queries],
            positions,
            starts,
            self._table,
            self._sinks,
            window.keys,
            paging.block_tables,
            paging.context_len,
            config.window or 0,
            config.head_dim**-0.5,
            eps,
            config.first_key,
            own,
            **seen,
        )
        grouped = attended.unflatten(1, (config.groups, -1))
        inner = torch.cat([each(grouped[:, i].contiguous()) for i, each in enumerate(self._outputs)], dim=1)
        return self._group.all_reduce(self._joined(inner))


class LatentContext:
    """Rows of attention alone, for context that does not pass the layer."""

    def __init__(self, parts: Parts, config: LatentConfig, prefix: str) -> None:
        """Read the weights under `prefix`, such as "mtp.0.attn."."""
        self._project = Linear(parts.matrix(f"{prefix}wkv", config.head_dim), None, parts.kernels)
        self._norm = parts.norm(f"{prefix}kv_norm", config.head_dim)
        self._table = parts.rotary_table(config.rope, config.rotated)
        self._kernels, self._eps = parts.kernels, parts.eps

    def write(self, x: Tensor, batch: Batch, cache: LayerCache) -> None:
        """Write each token's row, from x [N, D]."""
        row, slots = self._project(x, out_float32=True), batch.paging[cache.group].slots
        self._kernels.latent_rows(row, self._norm, batch.positions, self._table, self._eps, cache.keys, slots)


class Compressor:
    """Entries of `width` channels from windows of `ratio` tokens: see `Kernels.compress`."""

    def __init__(self, parts: Parts, config: LatentConfig, width: int, table: Tensor, prefix: str) -> None:
        """Read the weights under `prefix`, such as "layers.3.attn.compressor."."""
        self.width, self.ratio, self.spans = width, config.ratio, config.spans
        self._table, self._kernels, self._eps = table, parts.kernels, parts.eps
        self._parts, self._prefix, columns = parts, prefix, self.spans * width
        self._places = parts.reader.take(f"{prefix}ape", (config.ratio, columns), dtype=torch.float32)
        self._norm = parts.norm(f"{prefix}norm", width)

    def take(self) -> list[Tensor]:
        """The projections of a token to values and to gates."""
        return [self._parts.matrix(f"{self._prefix}{name}", self.spans * self.width) for name in ("wkv", "wgate")]

    def caches(self, length: int) -> list[CacheRows]:
        """Entries, and what a token brings to those of windows that are still open."""
        reach = _reach(self.spans * self.ratio, length)
        raw = CacheRows(1, 2 * self.spans * self.width, reach, values=False, dtype=torch.float32)
        return [CacheRows(1, self.width, values=False, every=self.ratio), raw]

    def write(self, values: Tensor, gates: Tensor, batch: Batch, entries: LayerCache, raw: LayerCache) -> None:
        """Write what the tokens bring, values and gates [N, spans * width], and the entries of windows they close."""
        open_windows, tables = batch.paging[raw.group], batch.paging[entries.group].block_tables
        self._kernels.compress(
            values,
            gates,
            self._places,
            batch.positions,
            batch.query_start,
            open_windows.slots,
            raw.keys,
            open_windows.block_tables,
            open_windows.context_len,
            entries.keys,
            tables,
            self._norm,
            self._table,
            self._eps,
        )


class Indexer:
    """Chooses a query's entries by small keys of their own.

    It is whole on every rank: sums over ranks would break ties in other ways.
    """

    def __init__(self, parts: Parts, config: LatentConfig, index: IndexConfig, table: Tensor, prefix: str) -> None:
        """Read the weights under `prefix`, such as "layers.3.attn.indexer."."""
        self._index, self._table, self._kernels = index, table, parts.kernels
        self.keys = Compressor(parts, config, index.head_dim, table, f"{prefix}compressor.")

    def choose(self, queries: Tensor, weights: Tensor, batch: Batch, keys: LayerCache) -> Tensor:
        """The entries [N, K] of tokens whose last `queries` [N, .] and `weights` [N, H] are the indexer's."""
        index = self._index
        return self._kernels.choose_entries(
            queries[:, -index.heads * index.head_dim :],
            weights,
            batch.positions,
            batch.query_start,
            keys.keys,
            batch.paging[keys.group].block_tables,
            self._table,
            self.keys.ratio,
            index.chosen,
            (index.heads * index.head_dim) ** -0.5,
        )


def _reach(tokens: int, length: int) -> int | None:
    return None if tokens >= length else tokens
