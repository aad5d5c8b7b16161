"""DeepSeek-V4's indexer: scores of compressed entries by small heads, and the choice of the greatest.

The least score that is chosen is found by bisection between the scores as ordered integers, so it is exact, and of
entries that tie there the lower are chosen. Nothing is sorted: entries are written in the order in which they are
counted.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from dspark_kernels.triton.latent import angles
from dspark_kernels.triton.launch import Launch, power_of_two
from dspark_kernels.triton.tiles import run_of
from torch import Tensor

SPAN = 256  # entries that a program scores
COUNTED = 1024  # scores of a step of the choice
SCRATCH = 1 << 26  # scores at once, at most: 256 MiB


@triton.jit(do_not_specialize=["first", "runs", "width", "longest"])
def score(
    queries, weights, positions, query_start, keys, tables, cos_sin, scores, first, runs, width, longest,
    query_stride, weight_stride, block_stride, scale, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr, BLOCK_SIZE: tl.constexpr, RATIO: tl.constexpr, MOST: tl.constexpr, SPAN: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (n, longest / SPAN): scores [n, longest] of tokens from `first` on; none where all entries are chosen."""
    token = first + tl.program_id(0)
    position = tl.load(positions + token)
    visible = (position + 1) // RATIO
    begin = tl.program_id(1) * SPAN
    if (visible <= MOST) | (begin >= visible):
        return
    run = run_of(query_start, token, runs).to(tl.int64)
    head = tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    inside = depth < HEAD_DIM
    mask = (head < HEADS)[:, None] & inside[None, :]
    cosine, sine, paired = angles(cos_sin + position.to(tl.int64) * ROTATED, depth, HEAD_DIM, ROTATED)
    row = queries + token.to(tl.int64) * query_stride + head[:, None] * HEAD_DIM
    q = tl.load(row + depth[None, :], mask=mask, other=0.0) * cosine[None, :]
    q += tl.load(row + paired[None, :], mask=mask, other=0.0) * sine[None, :]
    weight = tl.load(weights + token.to(tl.int64) * weight_stride + head, mask=head < HEADS, other=0.0)
    to = scores + tl.program_id(0).to(tl.int64) * longest
    for start in range(begin, tl.minimum(begin + SPAN, visible), KEYS):
        number = start + tl.arange(0, KEYS)
        seen = number < visible
        block = tl.load(tables + run * width + number // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        at = block * block_stride + number % BLOCK_SIZE * HEAD_DIM
        key = tl.load(keys + at[:, None] + depth[None, :], mask=seen[:, None] & inside[None, :], other=0.0)
        product = tl.dot(key.to(tl.float32), tl.trans(q), input_precision=PRECISION)
        total = tl.sum(tl.where(product > 0.0, product, 0.0) * weight[None, :], 1) * scale
        tl.store(to + number, total, mask=seen)


@triton.jit
def _ordered(scores, number, visible):
    """Scores as int32 in their order, of equals the same."""
    value = tl.load(scores + number, mask=number < visible, other=0.0)
    value = tl.where(value == 0.0, 0.0, value)  # -0 is 0
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["first", "longest"])
def choose(
    scores, positions, chosen, first, longest, RATIO: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (n): chosen [N, MOST] of tokens from `first` on, ascending, -1 behind the last."""
    token = first + tl.program_id(0)
    visible = (tl.load(positions + token) + 1) // RATIO
    to = chosen + token.to(tl.int64) * MOST
    lane = tl.arange(0, BLOCK)
    if visible <= MOST:
        for begin in range(0, MOST, BLOCK):
            number = begin + lane
            tl.store(to + number, tl.where(number < visible, number, -1), mask=number < MOST)
        return
    own = scores + tl.program_id(0).to(tl.int64) * longest
    low = tl.full([], -0x80000000, tl.int64)  # at least MOST scores are at or above it
    high = tl.full([], 0x80000000, tl.int64)  # fewer are
    while high - low > 1:
        middle = (low + high) >> 1
        reached = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, visible, BLOCK):
            number = begin + lane
            rank = _ordered(own, number, visible).to(tl.int64)
            reached += ((rank >= middle) & (number < visible)).to(tl.int32)
        enough = tl.sum(reached, 0) >= MOST
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    above = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, visible, BLOCK):
        number = begin + lane
        above += ((_ordered(own, number, visible).to(tl.int64) > low) & (number < visible)).to(tl.int32)
    ties = MOST - tl.sum(above, 0)
    taken = ties * 0
    tied = ties * 0
    for begin in range(0, visible, BLOCK):
        number = begin + lane
        rank = _ordered(own, number, visible).to(tl.int64)
        equal = ((rank == low) & (number < visible)).to(tl.int32)
        lower = tied + tl.cumsum(equal, 0) <= ties
        take = (number < visible) & ((rank > low) | ((equal == 1) & lower))
        tl.store(to + taken + tl.cumsum(take.to(tl.int32), 0) - 1, number, mask=take)
        taken += tl.sum(take.to(tl.int32), 0)
        tied += tl.sum(equal, 0)


def launches(
    queries: Tensor,
    weights: Tensor,
    positions: Tensor,
    query_start: Tensor,
    keys: Tensor,
    tables: Tensor,
    cos_sin: Tensor,
    ratio: int,
    most: int,
    scale: float,
    chosen: Tensor,
) -> Iterator[Launch]:
    """`Kernels.choose_entries` into `chosen` [N, most]. Scores lie in memory, of so many tokens at once as bounded."""
    (tokens, heads), (_, size, _, width) = weights.shape, keys.shape
    longest = tables.shape[1] * size
    scored = longest > most  # else no token sees more than it may choose
    step = max(1, SCRATCH // longest) if scored else max(tokens, 1)
    scores = torch.empty((min(step, tokens), longest if scored else 0), dtype=torch.float32, device=weights.device)
    rows, depth = max(power_of_two(heads), 16), max(power_of_two(width), 16)
    for first in range(0, tokens, step):
        count = min(step, tokens - first)
        if scored:
            yield Launch(
                score,
                (count, -(-longest // SPAN)),
                dict(
                    queries=queries, weights=weights, positions=positions, query_start=query_start, keys=keys,
                    tables=tables, cos_sin=cos_sin, scores=scores, first=first, runs=tables.shape[0],
                    width=tables.stride(0), longest=longest, query_stride=queries.stride(0),
                    weight_stride=weights.stride(0), block_stride=keys.stride(0), scale=float(scale),
                ),
                8,
                1,
                255,
                dict(
                    HEADS=heads, HEAD_DIM=width, ROTATED=cos_sin.shape[1], BLOCK_SIZE=size, RATIO=ratio, MOST=most,
                    SPAN=SPAN, KEYS=32, ROWS=rows, DEPTH=depth,
                    PRECISION="ieee" if keys.dtype == torch.float32 else "tf32x3",  # as exact as float32
                ),
            )  # fmt: skip
        yield Launch(
            choose,
            (count,),
            dict(scores=scores, positions=positions, chosen=chosen, first=first, longest=longest),
            constants=dict(RATIO=ratio, MOST=most, BLOCK=COUNTED),
        )
