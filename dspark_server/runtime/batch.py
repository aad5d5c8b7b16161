"""The one batch shape: runs of query tokens over paged context, flattened, nothing padded.

Shapes: N query tokens in the step, R runs, W widest block table, M rows whose logits are wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dspark_server.runtime.paging import BlockTable, CacheGroup


class Run(NamedTuple):
    """One request's share of a pass: a prefill chunk, a decode step, or a draft block to verify.

    `context_len` tokens have their rows already; `tokens` follow them. `tables` has one table for each group of caches.
    Logits are wanted for the last `logits_rows` of the tokens.
    """

    tokens: list[int]
    context_len: int
    tables: Sequence[BlockTable]
    logits_rows: int


@dataclass(frozen=True)
class Paging:
    """Places of the runs' rows in one group of caches.

    slots [N] int32, the place of each token's row (block * block_size + offset); block_tables [R, W] int32; context_len
    [R] int32: the rows before each run that its table has. Counted from the table's first row, positions differ by the
    same number for queries and keys, so that attention sees no difference.
    """

    slots: Tensor
    context_len: Tensor
    block_tables: Tensor


@dataclass(frozen=True)
class Batch:
    """A step's tokens and their place in the KV cache.

    tokens [N] int64, positions [N] int32, query_start [R+1] int32, logits_index [M] int64 into the N tokens, row_start
    [R+1]: logits rows of run r are row_start[r] .. row_start[r+1]-1. `paging` has an entry for each group of caches.
    """

    tokens: Tensor
    positions: Tensor
    query_start: Tensor
    paging: tuple[Paging, ...]
    logits_index: Tensor
    row_start: list[int]

    @classmethod
    def of(cls, runs: list[Run], groups: Sequence[CacheGroup]) -> "Batch":
        """Lay out `runs` in order. Every run has at least one token, and blocks for all its tokens in every group."""
        # numpy: torch would run a parallel region for some of these small arrays, which costs more than all of them.
        lengths = np.array([len(run.tokens) for run in runs], dtype=np.int32)
        context = np.array([run.context_len for run in runs], dtype=np.int32)
        rows = np.array([run.logits_rows for run in runs], dtype=np.int32)
        query_start = np.zeros(len(runs) + 1, dtype=np.int32)
        lengths.cumsum(out=query_start[1:])
        run_of = np.arange(len(runs)).repeat(lengths)
        offset = np.arange(query_start[-1], dtype=np.int32) - query_start[:-1][run_of]

        def paging(index: int, group: CacheGroup) -> Paging:
            own = [run.tables[index] for run in runs]
            width = max(len(table.blocks) for table in own)
            tables = np.array([table.blocks + [0] * (width - len(table.blocks)) for table in own], dtype=np.int32)
            kept = context if group.reach is None else context - np.array([t.first for t in own], dtype=np.int32)
            place, size = kept[run_of] + offset, np.int32(group.block_size)
            slots = tables[run_of, place // size] * size + place % size
            return Paging(torch.from_numpy(slots), torch.from_numpy(kept), torch.from_numpy(tables))

        return cls(
            tokens=torch.tensor([token for run in runs for token in run.tokens], dtype=torch.int64),
            positions=torch.from_numpy(context[run_of] + offset),
            query_start=torch.from_numpy(query_start),
            paging=tuple(paging(index, group) for index, group in enumerate(groups)),
            logits_index=torch.from_numpy((offset >= (lengths - rows)[run_of]).nonzero()[0]),
            row_start=[0, *rows.cumsum().tolist()],
        )

    def slot(self, slot: int, width: int, tokens: Tensor) -> "Batch":
        """Of runs of `width` tokens, the one at `slot` of each, [R] int64 `tokens` in its place: a run of its own.

        The tokens of a run before it have their rows.
        """

        def ahead(paging: Paging) -> Paging:
            return replace(paging, slots=paging.slots[slot::width].contiguous(), context_len=paging.context_len + slot)

        return replace(
            self,
            tokens=tokens,
            positions=self.positions[slot::width].contiguous(),
            query_start=self.query_start // width,
            paging=tuple(map(ahead, self.paging)),
            logits_index=self.logits_index[:0],
            row_start=[],
        )
