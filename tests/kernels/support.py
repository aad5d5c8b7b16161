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
    first_key: int = 0

    def attend(
        self, kernels: dspark_kernels.Kernels, causal: bool, window: int | None, softcap: float | None = None
    ) -> Tensor:
        where = (self.query_start, self.context_len, self.tables)
        return kernels.paged_attention(
            self.qkv, self.heads, self.keys, self.values, *where, 0.2, causal, window, softcap, self.first_key
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
    tokens = sum(q for q, _ in runs)
    heads = groups * kv_heads
    # As in a pool: other layers' rows lie between one block and the next.
    caches = torch.randn(len(order), 3, block, kv_heads, size).to(cache or dtype)
    return Paged(
        qkv=torch.randn(tokens, (heads + 2 * kv_heads) * size).to(dtype),
        heads=heads,
        keys=caches[:, 0],
        values=caches[:, 1],
        query_start=torch.tensor([0, *torch.tensor([q for q, _ in runs]).cumsum(0).tolist()], dtype=torch.int32),
        context_len=torch.tensor([c for _, c in runs], dtype=torch.int32),
        tables=tables,
    )


@dataclass
class Mixture:
    """Tokens and their experts; expert 1 has no token, as far as there are others."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    chosen: Tensor
    shares: Tensor

    def packed(
        self, kernels: dspark_kernels.Kernels, first: int = 0, last: int | None = None
    ) -> dspark_kernels.PackedExperts:
        """Experts first .. last."""
        own = self.gate_up[first:last], self.down[first:last]
        return kernels.pack_experts(len(own[0]), zip(*own, strict=True))

    def run(self, kernels: dspark_kernels.Kernels, limit: float | None = None) -> Tensor:
        return kernels.experts(
            self.x,
            self.packed(kernels),
            self.chosen,
            self.shares,
            limit,
        )


def mixture(tokens: int, experts: int, each: int, hidden: int, features: int, dtype: torch.dtype) -> Mixture:
    noise = torch.Generator().manual_seed(tokens * experts + each)
    odds = torch.rand(tokens, experts, generator=noise)
    if experts > each:
        odds[:, 1] = -1.0
    return Mixture(
        torch.randn(tokens, hidden + 8, generator=noise).to(dtype)[:, :hidden],  # strided rows
        (torch.randn(experts, 2 * features, hidden, generator=noise) * hidden**-0.5).to(dtype),
        (torch.randn(experts, hidden, features, generator=noise) * features**-0.5).to(dtype),
        odds.topk(each).indices.int(),
        torch.rand(tokens, each, generator=noise),
    )


def check_hidden_rows_stay_hidden(
    kernels: dspark_kernels.Kernels, case: Paged, causal: bool, window: int | None, value: float
) -> None:
    """`value` in one head of a run's key or value rows, one position at a time: who does not see it, sees no change.

    Bit for bit. Who sees a value that is not finite is not finite, and a NaN among the keys breaks as a NaN does.
    """
    clean, (_, block_size, kv_heads, size) = case.attend(kernels, causal, window), case.keys.shape
    for run, context in enumerate(case.context_len.tolist()):
        first, last = case.query_start[run : run + 2].tolist()
        queries, edge = context + torch.arange(last - first), context - (window or 0)
        mine = torch.zeros(len(clean), dtype=torch.bool)
        mine[first:last] = True
        at = {0, 1, context // 2, edge - 1, edge, edge + 1, context - 1, context, *queries.tolist()}
        for position in sorted(at & set(range(context + last - first))):
            seen = torch.ones_like(queries, dtype=torch.bool)
            if causal:
                seen &= position <= queries
            if window is not None:
                seen &= position > queries - window
            seen &= position >= case.first_key
            sees = mine.clone()
            sees[first:last] = seen
            block, within = int(case.tables[run, position // block_size]), position % block_size
            for cache in (case.keys, case.values):
                kept = cache[block, within, -1, size // 2].clone()
                cache[block, within, -1, size // 2] = value
                heads = case.attend(kernels, causal, window).unflatten(1, (kv_heads, -1))
                cache[block, within, -1, size // 2] = kept
                assert torch.equal(heads[:, :-1], clean.unflatten(1, (kv_heads, -1))[:, :-1]), "another head"
                assert torch.equal(heads[~sees, -1], clean.unflatten(1, (kv_heads, -1))[~sees, -1]), (position, seen)
                if cache is case.values or value != value:
                    groups = heads[sees, -1].unflatten(1, (-1, size))  # [seeing, G, d]
                    assert not groups.isfinite().all(-1).any(), (position, seen)


class OnDevice:
    """A kernel set that is given CPU tensors and runs on copies of them on `device`; what it changes comes back."""

    def __init__(self, kernels: dspark_kernels.Kernels, device: str) -> None:
        self._kernels = kernels
        self._device = device

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._kernels, name)
        return self._moving(value) if callable(value) else value

    def _moving(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            changed: list[tuple[Tensor, Tensor]] = []

            def move(tensor: Tensor) -> Tensor:
                if 0 in tensor.stride():  # expanded: nobody writes to it
                    return tensor.to(self._device)
                copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device)
                changed.append((tensor, copy.copy_(tensor)))
                return copy

            result = method(*_each(arguments, move), **{name: _each(each, move) for name, each in named.items()})
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
