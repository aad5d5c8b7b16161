"""What the tests of every kernel set need: runs over a paged cache, and how near two kernel sets must be."""

from dataclasses import dataclass

import dspark_kernels
import torch
from torch import Tensor

# One rounding to the dtype of numbers of magnitude ~4, and float32 sums in another order.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE[ours.dtype], rtol=TOLERANCE[ours.dtype])


@dataclass
class Paged:
    """Runs over scrambled blocks, their rows already in the cache."""

    qkv: Tensor
    heads: int
    keys: Tensor
    values: Tensor
    query_start: Tensor
    context_len: Tensor
    tables: Tensor
    block_size: int

    def attend(
        self, kernels: dspark_kernels.Kernels, causal: bool, window: int | None, softcap: float | None = None
    ) -> Tensor:
        where = (self.query_start, self.context_len, self.tables, self.block_size)
        return kernels.paged_attention(
            self.qkv, self.heads, self.keys, self.values, *where, 0.2, causal, window, softcap
        )


def paged(
    runs: list[tuple[int, int]], *, groups: int, kv_heads: int, size: int, block: int, dtype: torch.dtype
) -> Paged:
    """`runs` are (query tokens, context tokens)."""
    torch.manual_seed(len(runs) + size)
    need = [-(-(q + c) // block) for q, c in runs]
    order = torch.randperm(sum(need) + 3)
    tables = torch.zeros(len(runs), max(need), dtype=torch.int32)
    start = 0
    for row, count in enumerate(need):
        tables[row, :count] = order[start : start + count]
        start += count
    slots = len(order) * block
    tokens = sum(q for q, _ in runs)
    heads = groups * kv_heads
    return Paged(
        qkv=torch.randn(tokens, (heads + 2 * kv_heads) * size).to(dtype),
        heads=heads,
        keys=torch.randn(slots, kv_heads, size).to(dtype),
        values=torch.randn(slots, kv_heads, size).to(dtype),
        query_start=torch.tensor([0, *torch.tensor([q for q, _ in runs]).cumsum(0).tolist()], dtype=torch.int32),
        context_len=torch.tensor([c for _, c in runs], dtype=torch.int32),
        tables=tables,
        block_size=block,
    )
