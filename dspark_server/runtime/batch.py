"""The one batch shape: runs of query tokens over paged context, flattened, nothing padded.

Shapes: N query tokens in the step, R runs, W widest block table, M rows whose logits are wanted.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Run(NamedTuple):
    """One request's share of a pass: a prefill chunk, a decode step, or a draft block to verify.

    `context_len` tokens are already in the KV blocks; `tokens` follow them. Logits are wanted for the last
    `logits_rows` of them.
    """

    tokens: list[int]
    context_len: int
    block_table: list[int]
    logits_rows: int


@dataclass(frozen=True)
class Batch:
    """A step's tokens and their place in the KV cache.

    tokens [N] int64, positions [N] int32, slots [N] int32 (block * block_size + offset), query_start [R+1] int32,
    context_len [R] int32, block_tables [R, W] int32, logits_index [M] int64 into the N tokens, row_start [R+1]: logits
    rows of run r are row_start[r] .. row_start[r+1]-1.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    query_start: Tensor
    context_len: Tensor
    block_tables: Tensor
    block_size: int
    logits_index: Tensor
    row_start: list[int]

    @classmethod
    def of(cls, runs: list[Run], block_size: int) -> "Batch":
        """Lay out `runs` in order. Every run has at least one token, and blocks for all its tokens."""
        # numpy: torch would run a parallel region for some of these small arrays, which costs more than all of them.
        width = max(len(run.block_table) for run in runs)
        lengths = np.array([len(run.tokens) for run in runs], dtype=np.int32)
        context = np.array([run.context_len for run in runs], dtype=np.int32)
        rows = np.array([run.logits_rows for run in runs], dtype=np.int32)
        tables = np.array([run.block_table + [0] * (width - len(run.block_table)) for run in runs], dtype=np.int32)
        query_start = np.zeros(len(runs) + 1, dtype=np.int32)
        lengths.cumsum(out=query_start[1:])
        run_of = np.arange(len(runs)).repeat(lengths)
        offset = np.arange(query_start[-1], dtype=np.int32) - query_start[:-1][run_of]
        positions = context[run_of] + offset
        block = tables[run_of, positions // block_size]
        return cls(
            tokens=torch.tensor([token for run in runs for token in run.tokens], dtype=torch.int64),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(block * np.int32(block_size) + positions % np.int32(block_size)),
            query_start=torch.from_numpy(query_start),
            context_len=torch.from_numpy(context),
            block_tables=torch.from_numpy(tables),
            block_size=block_size,
            logits_index=torch.from_numpy((offset >= (lengths - rows)[run_of]).nonzero()[0]),
            row_start=[0, *rows.cumsum().tolist()],
        )
