"""Paged attention over runs of any length, causal or not: decode steps, verification, draft blocks and prefill chunks.

A program takes a tile of one run's queries for all the query heads that share a key/value head (rows are query-major:
row i is query i // group), so keys and values are read once for the group. The run of a tile is found on the device:
run r's tiles start at query_start[r] // TILE + r, an upper bound that needs nothing from the device's memory on the
host. If there are fewer programs than the GPU holds, the visible keys are split between several of them
(flash-decoding), which leave unnormalised sums that a second kernel combines.

Scores, softmax and sums are float32; both products are of the queries' dtype, to which the softmax's numerators are
rounded for the second, as tensor cores need, and the rows of an e4m3 cache are widened.

A key that a query does not see gets a numerator of 0, and 0 times NaN is NaN: in tiles of which some query sees only a
part, values that are not finite are taken out, and the queries that do see them get a NaN for a numerator.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from dspark_kernels.triton.fp8 import by_hand, for_launch, widened
from dspark_kernels.triton.launch import Gpu, Launch, power_of_two
from dspark_kernels.triton.tiles import owner_of
from torch import Tensor

MOST_SPLITS = 32
LEAST_KEYS = 256  # least keys of a split: fewer do not pay for the second kernel


@dataclass(frozen=True)
class Tiles:
    """Rows (queries * group) and keys of a tile, and the numbers of warps and load stages for it."""

    rows: int
    keys: int
    warps: int
    stages: int


def tiles(queries: int, group: int, head_dim: int, dtype: torch.dtype, capability: int) -> Tiles:
    """Tiles for runs of about `queries` tokens whose `group` query heads share a key/value head.

    16 rows are the least that tensor cores multiply; a verification of 8 tokens with a group of 4 fills 32. Bounded by
    registers (docs/kernels.md): sm_80 holds both operands of a product there, later ones leave them in shared memory.
    """
    if dtype == torch.float32:
        return Tiles(max(16, power_of_two(group)), 32, 4, 1)
    most = 128 if head_dim <= 128 else 64 if head_dim <= 256 else 16
    rows = max(min(power_of_two(queries * group), most), power_of_two(group), 16)
    wide = head_dim <= 64 or (head_dim <= 128 and (rows <= 32 or capability >= 90))
    return Tiles(rows, 64 if wide else 32, 8 if rows == most >= 64 or head_dim > 256 else 4, 2)


def splits(programs: int, keys: int, processors: int) -> int:
    """Number of parts to split `keys` keys into, if `programs` programs would run on `processors` processors."""
    wanted = min(2 * processors // max(programs, 1), keys // LEAST_KEYS, MOST_SPLITS)
    return power_of_two(wanted + 1) // 2 if wanted > 1 else 1  # the power of two below


@triton.jit(do_not_specialize=["runs", "tokens", "table_stride"])
def attend(
    queries, keys, values, out, peaks, masses, query_start, context_len, block_tables, scale, softcap, runs,
    tokens, query_stride, table_stride, block_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FIRST_KEY: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, KV_HEADS, SPLITS). With one split `out` is [N, Hq, d]; else [SPLITS, N, Hq, d] float32, unnormalised
    with each row's greatest score and sum of numerators in `peaks` and `masses` [SPLITS, N, Hq].

    WIDEN multiplies bfloat16 values as float32, the same numbers: Triton's interpreter takes bfloat16 for integers.
    BITS is that of `widened`.
    """
    TYPE: tl.constexpr = queries.dtype.element_ty
    TILE: tl.constexpr = ROWS // GROUP
    head = tl.program_id(1)
    split = tl.program_id(2)
    run, first_tile = owner_of(query_start, tl.program_id(0), runs, TILE)
    first_token = tl.load(query_start + run)
    run_queries = tl.load(query_start + run + 1) - first_token
    first = (tl.program_id(0) - first_tile) * TILE
    if first >= run_queries:
        return
    context = tl.load(context_len + run)

    row = tl.arange(0, ROWS)
    query = first + row // GROUP
    depth = tl.arange(0, DEPTH)
    present = (row < TILE * GROUP) & (query < run_queries)
    token = (first_token + query).to(tl.int64)
    q_head = head * GROUP + row % GROUP
    q = tl.load(
        queries + token[:, None] * query_stride + (q_head * HEAD_DIM)[:, None] + depth[None, :],
        mask=present[:, None] & (depth < HEAD_DIM)[None, :],
        other=0.0,
    )
    if WIDEN:
        q = q.to(tl.float32)

    position = context + query
    end = context + run_queries
    shared_begin = FIRST_KEY  # all queries see the keys from here
    if WINDOW > 0:
        shared_begin = tl.maximum(shared_begin, context + tl.minimum(first + TILE, run_queries) - WINDOW)
    shared_end = end  # up to here
    if CAUSAL:
        shared_end = context + first + 1
        end = tl.minimum(end, context + first + TILE)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(context + first - WINDOW + 1, 0) // KEYS * KEYS
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end - begin, KEYS), SPLITS) * KEYS
        begin += split * share
        end = tl.minimum(end, begin + share)

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, DEPTH], tl.float32)
    table = block_tables + run.to(tl.int64) * table_stride
    for start in range(begin, end, KEYS):
        column = start + tl.arange(0, KEYS)
        inside = column < end
        block = tl.load(table + column // BLOCK_SIZE, mask=inside, other=0)
        at = block.to(tl.int64) * block_stride + (column % BLOCK_SIZE * KV_HEADS + head) * HEAD_DIM
        key = tl.load(
            keys + at[None, :] + depth[:, None], mask=inside[None, :] & (depth < HEAD_DIM)[:, None], other=0.0
        )
        key = widened(key, TYPE, BITS)
        if WIDEN:
            key = key.to(tl.float32)
        score = tl.dot(q, key, input_precision=PRECISION) * scale
        if SOFTCAP:
            score = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * score / softcap)))  # softcap * tanh(score / softcap)
        visible = inside[None, :]
        if CAUSAL:
            visible = visible & (column[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (column[None, :] > position[:, None] - WINDOW)
        if FIRST_KEY > 0:
            visible = visible & (column[None, :] >= FIRST_KEY)
        score = tl.where(visible, score * 1.4426950408889634, float("-inf"))  # exp2 from here on
        risen = tl.maximum(peak, tl.max(score, 1))
        level = tl.where(risen == float("-inf"), 0.0, risen)  # a row that has seen no key yet
        numerator = tl.exp2(score - level[:, None])
        shrink = tl.exp2(peak - level)
        mass = mass * shrink + tl.sum(numerator, 1)
        value = tl.load(
            values + at[:, None] + depth[None, :], mask=inside[:, None] & (depth < HEAD_DIM)[None, :], other=0.0
        )
        value = widened(value, TYPE, BITS)
        weight = numerator.to(TYPE)
        if WIDEN:
            weight = weight.to(tl.float32)
            value = value.to(tl.float32)
        if CAUSAL or WINDOW > 0 or FIRST_KEY > 0:
            if (start < shared_begin) | (tl.minimum(start + KEYS, end) > shared_end):
                whole = tl.min((tl.abs(value.to(tl.float32)) < float("inf")).to(tl.int32), 1) == 1
                value = tl.where(whole[:, None], value, 0.0).to(value.dtype)
                weight = tl.where(visible & (whole[None, :] == 0), float("nan"), weight).to(weight.dtype)
        total = total * shrink[:, None] + tl.dot(weight, value, input_precision=PRECISION)
        peak = risen

    to = token * (KV_HEADS * GROUP) + q_head
    if SPLITS > 1:
        to += split.to(tl.int64) * tokens * (KV_HEADS * GROUP)
        tl.store(peaks + to, peak, mask=present)
        tl.store(masses + to, mass, mask=present)
    else:
        total = total / mass[:, None]
    tl.store(
        out + to[:, None] * HEAD_DIM + depth[None, :],
        total.to(out.dtype.element_ty),
        mask=present[:, None] & (depth < HEAD_DIM)[None, :],
    )


@triton.jit(do_not_specialize=["tokens"])
def combine(
    partial, peaks, masses, out, tokens, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (N, HEADS): the softmax over all splits' keys from each split's sums. One without keys weighs nothing."""
    row = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    depth = tl.arange(0, DEPTH)
    at = split.to(tl.int64) * tokens * HEADS + row
    peak = tl.load(peaks + at)
    weight = tl.where(peak == float("-inf"), 0.0, tl.exp2(peak - tl.max(peak, 0)))
    mass = tl.sum(weight * tl.load(masses + at), 0)
    part = tl.load(partial + at[:, None] * HEAD_DIM + depth[None, :], mask=(depth < HEAD_DIM)[None, :], other=0.0)
    total = tl.sum(part * weight[:, None], 0) / mass
    tl.store(out + row * HEAD_DIM + depth, total.to(out.dtype.element_ty), mask=depth < HEAD_DIM)


def launches(
    qkv: Tensor,
    num_q_heads: int,
    keys: Tensor,
    values: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    block_tables: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    first_key: int,
    out: Tensor,
    gpu: Gpu,
) -> Iterator[Launch]:
    """The one or two launches of `Kernels.paged_attention` into `out` [N, Hq * d]; nothing is read from the device."""
    tokens, (_, block_size, kv_heads, head_dim), (runs, width) = qkv.shape[0], keys.shape, block_tables.shape
    group = num_q_heads // kv_heads
    tile = tiles(-(-tokens // max(runs, 1)), group, head_dim, qkv.dtype, gpu.capability)
    grid = tokens // (tile.rows // group) + runs
    longest = width * block_size if window is None else min(width * block_size, window + tokens)
    parts = splits(grid * kv_heads, longest, gpu.processors)
    peaks = masses = None
    into = out
    if parts > 1:
        into = torch.empty(parts, tokens, num_q_heads * head_dim, dtype=torch.float32, device=qkv.device)
        peaks, masses = torch.empty(2, parts, tokens, num_q_heads, dtype=torch.float32, device=qkv.device)
    depth = max(power_of_two(head_dim), 16)
    yield Launch(
        attend,
        (grid if tokens else 0, kv_heads, parts),
        dict(
            queries=qkv, keys=for_launch(keys), values=for_launch(values), out=into, peaks=peaks, masses=masses,
            query_start=query_start, context_len=context_len, block_tables=block_tables, scale=float(scale),
            softcap=float(softcap or 0.0), runs=runs, tokens=tokens, query_stride=qkv.stride(0),
            table_stride=block_tables.stride(0), block_stride=keys.stride(0),
        ),
        tile.warps,
        tile.stages,
        255 if tile.rows <= 32 else None,
        dict(
            KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, CAUSAL=causal,
            WINDOW=window or 0, SOFTCAP=softcap is not None, FIRST_KEY=first_key, SPLITS=parts, ROWS=tile.rows,
            KEYS=tile.keys, DEPTH=depth, PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
            WIDEN=triton.knobs.runtime.interpret and qkv.dtype == torch.bfloat16, BITS=by_hand(keys),
        ),
    )  # fmt: skip
    if parts > 1:
        yield Launch(
            combine,
            (tokens, num_q_heads),
            dict(partial=into, peaks=peaks, masses=masses, out=out, tokens=tokens),
            num_warps=max(1, min(4, parts * depth // 1024)),
            constants=dict(HEADS=num_q_heads, HEAD_DIM=head_dim, SPLITS=parts, DEPTH=depth),
        )
