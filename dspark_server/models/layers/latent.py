"""DeepSeek-V4's attention: one row for key and value, a window, compressed entries behind it, an indexer that chooses.

A query sees the rows of the last W tokens, and entries that stand for `ratio` tokens each: all of them ("heavily
compressed", 128 tokens), or those that the indexer scores highest ("compressed sparse", 4 tokens). Entry w is visible
from position (w + 1) * ratio - 1 on, whose run writes it: a rejected draft leaves nothing that is ever read.

Shapes: N tokens of R runs, D the model's width, H query heads (of this rank), d head size, of which the last r channels
are rotated; G groups of heads in the output; M entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dspark_server.models.layers.attention import AttentionConfig
from dspark_server.models.layers.parts import Parts
from dspark_server.models.layers.streams import normed
from dspark_server.runtime.batch import Batch, Paging
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
    """Attention of one layer, without the norm before it."""

    def __init__(self, parts: Parts, config: LatentConfig, prefix: str) -> None:
        """Read this rank's share of the weights under `prefix`, such as "layers.3.attn."."""
        group, kernels, width = parts.group, parts.kernels, config.head_dim
        own = group.share(config.heads * width)
        groups = config.groups * config.output_rank
        self.config = config.shared_by(group.size)
        self._group, self._kernels, self._eps = group, kernels, parts.eps
        self._narrow = Linear(parts.matrix(f"{prefix}wq_a", config.query_rank), None, kernels)
        self._query_norm = parts.norm(f"{prefix}q_norm", config.query_rank)
        reader = parts.reader
        queries = reader.take(f"{prefix}wq_b.weight", (config.heads * width, config.query_rank), own)
        self._queries = Linear(queries, None, kernels)
        self._row = Linear(parts.matrix(f"{prefix}wkv", width), None, kernels)
        self._row_norm = parts.norm(f"{prefix}kv_norm", width)
        shape = (groups, config.heads * width // config.groups)
        outputs = reader.take(f"{prefix}wo_a.weight", shape, group.share(groups))
        self._outputs = [Linear(each.clone(), None, kernels) for each in outputs.split(config.output_rank)]
        self._joined = Linear(parts.summed(f"{prefix}wo_b", groups, group.share(groups), bias=False)[0], None, kernels)
        heads = group.share(config.heads)
        self._sinks = reader.take(f"{prefix}attn_sink", (config.heads,), heads, dtype=torch.float32)
        self._table = parts.rotary_table(config.rope, config.rotated)
        self._compressor = self._indexer = None
        if config.ratio:
            self._compressor = Compressor(parts, config, width, self._table, f"{prefix}compressor.")
        if config.index is not None:
            self._indexer = Indexer(parts, config, config.index, self._table, f"{prefix}indexer.")

    def caches(self, length: int) -> list[CacheRows]:
        """Rows of tokens; entries and the rows that become entries; the indexer's."""
        config, parts = self.config, (self._compressor, self._indexer)
        assert config.window is not None
        rows = [CacheRows(1, config.head_dim, _reach(config.window, length), values=False)]
        return [*rows, *(each for part in parts if part is not None for each in part.caches(length))]

    @property
    def products(self) -> list[Linear]:
        """Its matrix products, in order."""
        own = [self._narrow, self._queries, self._row]
        more = [each for part in (self._compressor, self._indexer) if part is not None for each in part.products]
        return [*own, *more, *self._outputs, self._joined]

    def forward(self, x: Tensor, batch: Batch, caches: Sequence[LayerCache], causal: bool = True) -> Tensor:
        """Attend from x [N, D] over the caches, which get the batch's rows, -> [N, D], the sum of all ranks.

        With causal=False runs are draft blocks of one width: each token sees the window before its block and the whole
        block, whose rows are not kept.
        """
        config, positions = self.config, batch.positions.long()
        narrow = self._kernels.rms_norm(self._narrow(x), self._query_norm, self._eps)
        q = self._queries(narrow, out_float32=True).unflatten(1, (-1, config.head_dim))
        q = rotate(normed(q, self._eps), self._table[positions])
        own, *others = caches
        mine, places, window = self.row(x, positions), Places(batch), config.window or 0
        if not causal:
            rows, seen = places.before_and_among(own, window, mine)
            return self.output(self.attend(q, rows, seen), positions)
        write(own, batch, mine)
        rows, seen = places.window(own, window)
        if config.first_key:
            seen = seen & (positions.unsqueeze(1) + torch.arange(1 - window, 1, device=x.device) >= config.first_key)
        if self._compressor is not None:
            entries, raw, *index = others
            self._compressor.forward(x, places, entries, raw)
            visible = places.visible(entries, config.ratio)
            chosen = None
            if self._indexer is not None:
                chosen = self._indexer.forward(x, narrow, places, visible, *index)
            entry_rows, entry_seen = places.entries(entries, visible, chosen)
            rows, seen = torch.cat([rows, entry_rows], 1), torch.cat([seen, entry_seen], 1)
        return self.output(self.attend(q, rows, seen), positions)

    def row(self, x: Tensor, positions: Tensor) -> Tensor:
        """The row [N, d] of each token at `positions` [N], key and value in one, from x [N, D]."""
        rows = self._kernels.rms_norm(self._row(x), self._row_norm, self._eps)
        return rotate(rows.unsqueeze(1), self._table[positions]).squeeze(1)

    def attend(self, q: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
        """Queries [N, H, d] over rows [N, S, d], of which each sees some [N, S] bool, and the sinks -> [N, H, d]."""
        rows = rows.float()
        scores = (torch.einsum("nhd,nsd->nhs", q.float(), rows) * self.config.head_dim**-0.5).masked_fill(
            ~seen.unsqueeze(1), -torch.inf
        )
        sinks = self._sinks.view(1, -1, 1).expand(len(q), -1, 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        return torch.einsum("nhs,nsd->nhd", weights, rows)

    def output(self, attended: Tensor, positions: Tensor) -> Tensor:
        """The outputs of heads [N, H, d] float32, rotated back, to the model's width: the sum of all ranks [N, D]."""
        attended = rotate(attended, self._table[positions], backwards=True).to(self._query_norm.dtype)
        grouped = attended.unflatten(1, (self.config.groups, -1)).flatten(2)
        inner = torch.cat([each(grouped[:, i].contiguous()) for i, each in enumerate(self._outputs)], dim=1)
        return self._group.all_reduce(self._joined(inner))


class Compressor:
    """Entries of `width` channels from windows of `ratio` tokens, each channel by a softmax of its own over the tokens.

    With two spans the first half of a token's columns goes into the entry of the window after its own.
    """

    def __init__(self, parts: Parts, config: LatentConfig, width: int, table: Tensor, prefix: str) -> None:
        self.width, self.ratio, self.spans = width, config.ratio, config.spans
        self._table, self._kernels, self._eps = table, parts.kernels, parts.eps
        columns = self.spans * width
        self._values = Linear(parts.matrix(f"{prefix}wkv", columns), None, parts.kernels)
        self._gates = Linear(parts.matrix(f"{prefix}wgate", columns), None, parts.kernels)
        self._places = parts.reader.take(f"{prefix}ape", (config.ratio, columns), dtype=torch.float32)
        self._norm = parts.norm(f"{prefix}norm", width)

    @property
    def products(self) -> list[Linear]:
        """Its matrix products."""
        return [self._values, self._gates]

    def caches(self, length: int) -> list[CacheRows]:
        """Entries, and what a token brings to those of windows that are still open."""
        reach = _reach(self.spans * self.ratio, length)
        raw = CacheRows(1, 2 * self.spans * self.width, reach, values=False, dtype=torch.float32)
        return [CacheRows(1, self.width, values=False, every=self.ratio), raw]

    def forward(self, x: Tensor, places: "Places", entries: LayerCache, raw: LayerCache) -> None:
        """Write what the tokens x [N, D] bring, and the entries of windows that they close."""
        batch, ratio, width = places.batch, self.ratio, self.width
        positions = batch.positions.long()
        gates = self._gates(x, out_float32=True) + self._places[positions % ratio]
        write(raw, batch, torch.cat([self._values(x, out_float32=True), gates], dim=1))
        closing = ((positions + 1) % ratio == 0).nonzero().squeeze(1)
        if not len(closing):
            return
        rows, known = places.window(raw, self.spans * ratio, closing)
        values, gates = rows.chunk(2, dim=-1)
        if self.spans == 2:  # of the window before the first columns, of its own the last
            values, gates = (
                torch.cat([each[:, :ratio, :width], each[:, ratio:, width:]], dim=1) for each in (values, gates)
            )
        weights = gates.masked_fill(~known.unsqueeze(2), -torch.inf).softmax(1)
        made = (weights * values).sum(1)
        made = normed(made, self._eps) * self._norm.float()
        start = positions[closing] + 1 - ratio
        made = rotate(made.unsqueeze(1), self._table[start]).squeeze(1)
        places.write_entries(entries, closing, start // ratio, made)


class Indexer:
    """Scores a query's entries by small keys of their own."""

    def __init__(self, parts: Parts, config: LatentConfig, index: IndexConfig, table: Tensor, prefix: str) -> None:
        """Read the weights under `prefix`, whole on every rank: sums over ranks would break ties differently."""
        self._index, self._table = index, table
        shape = (index.heads * index.head_dim, config.query_rank)
        self._queries = Linear(parts.reader.take(f"{prefix}wq_b.weight", shape), None, parts.kernels)
        self._weights = Linear(parts.matrix(f"{prefix}weights_proj", index.heads), None, parts.kernels)
        self._keys = Compressor(parts, config, index.head_dim, table, f"{prefix}compressor.")

    @property
    def products(self) -> list[Linear]:
        """Its matrix products."""
        return [self._queries, self._weights, *self._keys.products]

    def caches(self, length: int) -> list[CacheRows]:
        """Keys of entries, and what a token brings to those of open windows."""
        return self._keys.caches(length)

    def forward(
        self, x: Tensor, narrow: Tensor, places: "Places", visible: Tensor, keys: LayerCache, raw: LayerCache
    ) -> Tensor:
        """The entries [N, K] that each token of x [N, D] chooses among its first `visible` [N], best first.

        Of equal scores the lower entry is chosen. Where fewer are visible, the last of the K are not.
        """
        index = self._index
        self._keys.forward(x, places, keys, raw)
        q = torch.unflatten(self._queries(narrow, out_float32=True), 1, (index.heads, index.head_dim))
        q = rotate(q, self._table[places.batch.positions.long()])
        weights = self._weights(x, out_float32=True) * (index.heads * index.head_dim) ** -0.5
        rows, seen = places.entries(keys, visible, None)
        products = torch.einsum("nhd,nmd->nhm", q, rows.float()).relu()
        scores = (weights.unsqueeze(-1) * products).sum(1).masked_fill(~seen, -torch.inf)
        return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, : index.chosen]


class Places:
    """Finds rows of earlier tokens, and entries, for the tokens of a batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        tokens = torch.arange(len(batch.tokens), device=batch.tokens.device)
        starts = batch.query_start.long()
        self._run = torch.searchsorted(starts[1:], tokens, right=True).clamp(max=len(starts) - 2)  # [N]
        self._offset = tokens - starts[self._run]

    def window(self, cache: LayerCache, count: int, of: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The rows [N, count, d] of the last `count` tokens up to each, and whether there is such a token [N, count].

        `of` picks some of the tokens.
        """
        run, offset, positions = self._run, self._offset, self.batch.positions.long()
        if of is not None:
            run, offset, positions = run[of], offset[of], positions[of]
        paging = self.batch.paging[cache.group]
        back = torch.arange(1 - count, 1, device=run.device)
        known = positions.unsqueeze(1) + back >= 0
        place = (paging.context_len.long()[run] + offset).unsqueeze(1) + back
        return self._rows(cache, paging, run, place.clamp(min=0)), known

    def before_and_among(self, cache: LayerCache, count: int, own: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [N, count + W, d] before blocks of W tokens, and their `own` [N, d]; whether there is such a row."""
        starts = self.batch.query_start[:-1].long().clamp(max=len(own) - 1)
        paging, runs = self.batch.paging[cache.group], torch.arange(len(starts), device=own.device)
        back = torch.arange(-count, 0, device=own.device)
        known = self.batch.positions.long()[starts].unsqueeze(1) + back >= 0
        place = paging.context_len.long().unsqueeze(1) + back
        width = len(own) // len(starts)
        blocks = own.unflatten(0, (-1, width))
        rows = torch.cat([self._rows(cache, paging, runs, place.clamp(min=0)), blocks.to(cache.keys.dtype)], dim=1)
        seen = torch.cat([known, known.new_ones(len(starts), width)], dim=1)
        return rows.repeat_interleave(width, 0), seen.repeat_interleave(width, 0)

    def visible(self, entries: LayerCache, ratio: int) -> Tensor:
        """The number [N] of entries that each token sees."""
        return (self.batch.positions.long() + 1) // ratio

    def entries(self, cache: LayerCache, visible: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Entries [N, M, d], all or the `chosen` [N, M], and whether each token sees them [N, M]."""
        paging = self.batch.paging[cache.group]
        if chosen is None:
            most = max(1, int(visible.max()))
            chosen = torch.arange(most, device=visible.device).expand(len(visible), -1)
        seen = chosen < visible.unsqueeze(1)
        return self._rows(cache, paging, self._run, torch.where(seen, chosen, 0)), seen

    def write_entries(self, cache: LayerCache, of: Tensor, numbers: Tensor, rows: Tensor) -> None:
        """Write entries `numbers` [n], rows [n, d], of the runs of the tokens `of` [n]."""
        block, at = self._find(cache, self.batch.paging[cache.group], self._run[of], numbers)
        cache.keys[block, at, 0] = rows.to(cache.keys.dtype)

    def _rows(self, cache: LayerCache, paging: Paging, run: Tensor, place: Tensor) -> Tensor:
        block, at = self._find(cache, paging, run.unsqueeze(1), place)
        return cache.keys[block, at, 0]

    def _find(self, cache: LayerCache, paging: Paging, run: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        size = cache.keys.shape[1]
        block = paging.block_tables[run, (place // size).clamp(max=paging.block_tables.shape[1] - 1)]
        return block.long(), place % size


def write(cache: LayerCache, batch: Batch, rows: Tensor) -> None:
    """Write a row [N, d] of each token of the batch."""
    slots, size = batch.paging[cache.group].slots.long(), cache.keys.shape[1]
    cache.keys[slots // size, slots % size, 0] = rows.to(cache.keys.dtype)


def rotate(x: Tensor, cos_sin: Tensor, *, backwards: bool = False) -> Tensor:
    """Rotate pairs (2i, 2i + 1) of the last r channels of x [N, H, d] by cos_sin [N, r]."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    sin = -sin if backwards else sin
    size = cos_sin.shape[-1]
    still, turned = x[..., :-size], x[..., -size:].float().unflatten(-1, (-1, 2))
    even, odd = turned.unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([still, turned.to(x.dtype)], dim=-1)


def _reach(tokens: int, length: int) -> int | None:
    return None if tokens >= length else tokens
