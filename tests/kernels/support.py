"""What the tests of every kernel set need: runs over a paged cache, and how near two kernel sets must be."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

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
    runs: list[tuple[int, int]],
    *,
    groups: int,
    kv_heads: int,
    size: int,
    block: int,
    dtype: torch.dtype,
    cache: torch.dtype | None = None,
) -> Paged:
    """`runs` are (query tokens, context tokens); `cache` is the rows' dtype, where it is another than `dtype`."""
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
        keys=torch.randn(slots, kv_heads, size).to(cache or dtype),
        values=torch.randn(slots, kv_heads, size).to(cache or dtype),
        query_start=torch.tensor([0, *torch.tensor([q for q, _ in runs]).cumsum(0).tolist()], dtype=torch.int32),
        context_len=torch.tensor([c for _, c in runs], dtype=torch.int32),
        tables=tables,
        block_size=block,
    )


class OnDevice:
    """A kernel set that is given CPU tensors and runs on copies of them on `device`; what it changes comes back."""

    def __init__(self, kernels: dspark_kernels.Kernels, device: str) -> None:
        self._kernels = kernels
        self._device = device

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._kernels, name)
        return self._moving(value) if callable(value) else value

    def _moving(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            changed: list[tuple[Tensor, Tensor]] = []

            def move(tensor: Tensor) -> Tensor:
                if 0 in tensor.stride():  # expanded: nobody writes to it
                    return tensor.to(self._device)
                copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device)
                changed.append((tensor, copy.copy_(tensor)))
                return copy

            result = method(*_each(arguments, move))
            for tensor, copy in changed:
                tensor.copy_(copy)
            return _each(result, Tensor.cpu)

        return call


def triton_kernels() -> dspark_kernels.Kernels:
    """Triton's kernels on the GPU where there is one, else in the interpreter; either way given CPU tensors."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return cast(dspark_kernels.Kernels, OnDevice(dspark_kernels.load("triton"), device))


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_each(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _each(getattr(value, field.name), change) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value
