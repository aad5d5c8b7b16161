"""The one batch shape: runs of query tokens over paged context, flattened, nothing padded.

Shapes: N query tokens in the step, R runs, W widest block table, M rows whose logits are wanted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
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
        width = max(len(run.block_table) for run in runs)
        lengths = torch.tensor([len(run.tokens) for run in runs], dtype=torch.int32)
        context = torch.tensor([run.context_len for run in runs], dtype=torch.int32)
        rows = torch.tensor([run.logits_rows for run in runs], dtype=torch.int32)
        tables = torch.tensor(
            [run.block_table + [0] * (width - len(run.block_table)) for run in runs], dtype=torch.int32
        )
        query_start = torch.zeros(len(runs) + 1, dtype=torch.int32)
        query_start[1:] = lengths.cumsum(0)
        run_of = torch.repeat_interleave(torch.arange(len(runs)), lengths)
        offset = torch.arange(int(query_start[-1]), dtype=torch.int32) - query_start[:-1][run_of]
        positions = context[run_of] + offset
        block = tables[run_of, (positions // block_size).long()]
        return cls(
            tokens=torch.tensor([token for run in runs for token in run.tokens], dtype=torch.int64),
            positions=positions,
            slots=block * block_size + positions % block_size,
            query_start=query_start,
            context_len=context,
            block_tables=tables,
            block_size=block_size,
            logits_index=torch.nonzero(offset >= (lengths - rows)[run_of]).squeeze(1),
            row_start=[0, *rows.cumsum(0).tolist()],
        )
