"""DeepSeek-V4's attention: rows that are key and value in one, the entries made of them, and attention over both.

A program is one token, in attention with up to ROWS of its heads: every row that a token sees is loaded once, for
scores and for sums. All programs of a token see the same rows, so rows that are not seen are never loaded, and what
stands in them does not matter. Grids follow from shapes alone; a token without work returns at once.

Sums are float32; attention's products are of the cache's dtype, to which queries and numerators are rounded.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from dspark_kernels.triton.launch import Launch, power_of_two
from dspark_kernels.triton.tiles import run_of
from torch import Tensor

POOLED = 8  # rows of a step of `close`


@triton.jit
def angles(table, channel, HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr):
    """Cosines and signed sines of the channels, and the channel that each is paired with.

    A rotated channel is x * cosine + paired x * sine; pairs are 2i, 2i + 1 of the last ROTATED, `table` their row.
    """
    place = channel - (HEAD_DIM - ROTATED)
    turned = (place >= 0) & (channel < HEAD_DIM)
    odd = place % 2 == 1
    cosine = tl.load(table + place // 2, mask=turned, other=1.0)
    sine = tl.load(table + ROTATED // 2 + place // 2, mask=turned, other=0.0)
    return cosine, tl.where(odd, sine, -sine), tl.where(turned, tl.where(odd, channel - 1, channel + 1), channel)


@triton.jit
def latent_rows(
    x, norm, positions, cos_sin, slots, out, x_stride, block_stride, eps, HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr, BLOCK_SIZE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (N): a row to its slot of the cache `out`, or without slots to row N of it. No negative slot is written."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, DEPTH)
    inside = channel < HEAD_DIM
    table = cos_sin + tl.load(positions + token).to(tl.int64) * ROTATED
    cosine, sine, paired = angles(table, channel, HEAD_DIM, ROTATED)
    row = x + token * x_stride
    value = tl.load(row + channel, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(value * value, 0) / HEAD_DIM + eps)
    value *= scale * tl.load(norm + channel, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(row + paired, mask=inside, other=0.0)
    other *= scale * tl.load(norm + paired, mask=inside, other=0.0).to(tl.float32)
    at = token * HEAD_DIM
    if slots is not None:
        slot = tl.load(slots + token).to(tl.int64)
        at = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * HEAD_DIM
        inside = inside & (slot + channel * 0 >= 0)
    tl.store(out + at + channel, (value * cosine + other * sine).to(out.dtype.element_ty), mask=inside)


@triton.jit
def keep(
    values, gates, places, positions, slots, raw, value_stride, gate_stride, block_stride, RATIO: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N): a token's values and gates to its slot of `raw`, [COLUMNS] each."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    slot = tl.load(slots + token).to(tl.int64)
    inside = (column < COLUMNS) & (slot + column * 0 >= 0)
    to = raw + slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * (2 * COLUMNS) + column
    tl.store(to, tl.load(values + token * value_stride + column, mask=inside), mask=inside)
    place = places + tl.load(positions + token) % RATIO * COLUMNS
    gate = tl.load(gates + token * gate_stride + column, mask=inside) + tl.load(place + column, mask=inside)
    tl.store(to + COLUMNS, gate, mask=inside)


@triton.jit(do_not_specialize=["runs", "raw_width", "entry_width"])
def close(
    positions, query_start, raw, raw_tables, raw_context, entries, entry_tables, norm, cos_sin, runs, raw_width,
    entry_width, raw_stride, entry_stride, eps, RATIO: tl.constexpr, SPANS: tl.constexpr, WIDTH: tl.constexpr,
    ROTATED: tl.constexpr, RAW_SIZE: tl.constexpr, ENTRY_SIZE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (N): the entry of the window that a token closes, if it does."""
    token = tl.program_id(0)
    position = tl.load(positions + token)
    if (position + 1) % RATIO != 0:
        return
    if token >= tl.load(query_start + runs):
        return
    run = run_of(query_start, token, runs).to(tl.int64)
    place = tl.load(raw_context + run) + token - tl.load(query_start + run)
    COLUMNS: tl.constexpr = SPANS * WIDTH
    SEEN: tl.constexpr = SPANS * RATIO
    channel = tl.arange(0, DEPTH)
    inside = channel < WIDTH
    peak = tl.full([DEPTH], float("-inf"), tl.float32)
    mass = tl.zeros([DEPTH], tl.float32)
    total = tl.zeros([DEPTH], tl.float32)
    for begin in range(0, SEEN, ROWS):
        row = begin + tl.arange(0, ROWS)  # from the oldest on
        back = SEEN - 1 - row
        known = (back >= 0) & (back <= position)
        at = tl.where(known, place - back, 0)
        block = tl.load(raw_tables + run * raw_width + at // RAW_SIZE, mask=known, other=0).to(tl.int64)
        at = block * raw_stride + at % RAW_SIZE * (2 * COLUMNS)
        if SPANS == 2:  # of the window before the first columns, of its own the last
            at += tl.where(row >= RATIO, WIDTH, 0)
        mask = known[:, None] & inside[None, :]
        value = tl.load(raw + at[:, None] + channel[None, :], mask=mask, other=0.0)
        gate = tl.load(raw + COLUMNS + at[:, None] + channel[None, :], mask=mask, other=float("-inf"))
        risen = tl.maximum(peak, tl.max(gate, 0))
        level = tl.where(risen == float("-inf"), 0.0, risen)
        share = tl.exp(gate - level[None, :])
        shrink = tl.exp(peak - level)
        mass = mass * shrink + tl.sum(share, 0)
        total = total * shrink + tl.sum(share * value, 0)
        peak = risen
    made = tl.where(inside, total / mass, 0.0)
    made *= tl.rsqrt(tl.sum(made * made, 0) / WIDTH + eps)
    made *= tl.load(norm + channel, mask=inside, other=0.0).to(tl.float32)
    first = position + 1 - RATIO
    cosine, sine, _ = angles(cos_sin + first.to(tl.int64) * ROTATED, channel, WIDTH, ROTATED)
    even, odd = tl.split(tl.reshape(made, [DEPTH // 2, 2]))
    made = made * cosine + tl.reshape(tl.join(odd, even), [DEPTH]) * sine
    number = first // RATIO
    block = tl.load(entry_tables + run * entry_width + number // ENTRY_SIZE).to(tl.int64)
    to = entries + block * entry_stride + number % ENTRY_SIZE * WIDTH + channel
    tl.store(to, made.to(entries.dtype.element_ty), mask=inside)


@triton.jit
def _see(
    rows, at, seen, q, peak, mass, total, depth, inside, scale, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """The softmax's state after rows [KEYS] at offsets `at`, of which some are `seen`."""
    row = tl.load(rows + at[:, None] + depth[None, :], mask=seen[:, None] & inside[None, :], other=0.0)
    if WIDEN:
        row = row.to(tl.float32)
    score = tl.dot(q, tl.trans(row), input_precision=PRECISION) * (scale * 1.4426950408889634)  # exp2 from here on
    score = tl.where(seen[None, :], score, float("-inf"))
    risen = tl.maximum(peak, tl.max(score, 1))
    level = tl.where(risen == float("-inf"), 0.0, risen)
    numerator = tl.exp2(score - level[:, None])
    shrink = tl.exp2(peak - level)
    mass = mass * shrink + tl.sum(numerator, 1)
    weight = numerator.to(TYPE)
    if WIDEN:
        weight = weight.to(tl.float32)
    total = total * shrink[:, None] + tl.dot(weight, row, input_precision=PRECISION)
    return risen, mass, total


@triton.jit(do_not_specialize=["runs", "width", "entry_width"])
def attend(
    queries, positions, query_start, cos_sin, sinks, window, tables, context_len, own, entries, entry_tables, chosen,
    out, runs, width, entry_width, query_stride, block_stride, entry_stride, scale, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ENTRY_SIZE: tl.constexpr, SEEN: tl.constexpr, FIRST_KEY: tl.constexpr, RATIO: tl.constexpr, MOST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (N, HEADS / ROWS): out [N, HEADS, HEAD_DIM]. Tokens of no run get nothing.

    WIDEN as in attention.py. MOST is the width of `chosen`.
    """
    TYPE: tl.constexpr = out.dtype.element_ty
    token = tl.program_id(0)
    if token >= tl.load(query_start + runs):
        return
    run = run_of(query_start, token, runs).to(tl.int64)
    begin = tl.load(query_start + run)
    position = tl.load(positions + token)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    inside = depth < HEAD_DIM
    mask = (head < HEADS)[:, None] & inside[None, :]

    cosine, sine, paired = angles(cos_sin + position.to(tl.int64) * ROTATED, depth, HEAD_DIM, ROTATED)
    row = queries + token.to(tl.int64) * query_stride + head[:, None] * HEAD_DIM
    q = tl.load(row + depth[None, :], mask=mask, other=0.0)
    inverse = tl.rsqrt(tl.sum(q * q, 1) / HEAD_DIM + eps)
    q = q * cosine[None, :] + tl.load(row + paired[None, :], mask=mask, other=0.0) * sine[None, :]
    q = (q * inverse[:, None]).to(TYPE)
    if WIDEN:
        q = q.to(tl.float32)

    # A row of zeros, of which only the logit is given.
    peak = tl.load(sinks + head, mask=head < HEADS, other=0.0) * 1.4426950408889634
    mass = tl.where(peak == float("-inf"), 0.0, 1.0)
    total = tl.zeros([ROWS, DEPTH], tl.float32)

    last = position
    place = tl.load(context_len + run) + token - begin
    if own is not None:
        last = position - (token - begin) - 1
        place = tl.load(context_len + run) - 1
    count = last + 1 - tl.maximum(tl.maximum(last - SEEN + 1, FIRST_KEY), 0)
    oldest = place - count + 1
    for start in range(0, count, KEYS):
        number = start + tl.arange(0, KEYS)
        seen = number < count
        at = tl.where(seen, oldest + number, 0)
        block = tl.load(tables + run * width + at // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        at = block * block_stride + at % BLOCK_SIZE * HEAD_DIM
        peak, mass, total = _see(
            window, at, seen, q, peak, mass, total, depth, inside, scale, TYPE, PRECISION, WIDEN
        )  # fmt: skip
    if own is not None:
        wide = tl.load(query_start + run + 1) - begin
        for start in range(0, wide, KEYS):
            number = start + tl.arange(0, KEYS)
            at = (begin + number).to(tl.int64) * HEAD_DIM
            peak, mass, total = _see(
                own, at, number < wide, q, peak, mass, total, depth, inside, scale, TYPE, PRECISION, WIDEN
            )  # fmt: skip
    if entries is not None:
        visible = (position + 1) // RATIO
        most = visible
        if chosen is not None:
            most = tl.minimum(visible, MOST)
        for start in range(0, most, KEYS):
            number = start + tl.arange(0, KEYS)
            seen = number < most
            if chosen is not None:
                number = tl.load(chosen + token.to(tl.int64) * MOST + number, mask=seen, other=-1)
                seen = (number >= 0) & (number < visible)
                number = tl.where(seen, number, 0)
            block = tl.load(entry_tables + run * entry_width + number // ENTRY_SIZE, mask=seen, other=0).to(tl.int64)
            at = block * entry_stride + number % ENTRY_SIZE * HEAD_DIM
            peak, mass, total = _see(
                entries, at, seen, q, peak, mass, total, depth, inside, scale, TYPE, PRECISION, WIDEN
            )  # fmt: skip

    total = total / mass[:, None]
    even, odd = tl.split(tl.reshape(total, [ROWS, DEPTH // 2, 2]))
    total = total * cosine[None, :] - tl.reshape(tl.join(odd, even), [ROWS, DEPTH]) * sine[None, :]  # back
    to = out + (token.to(tl.int64) * HEADS + head[:, None]) * HEAD_DIM + depth[None, :]
    tl.store(to, total.to(TYPE), mask=mask)


def rows_launch(
    x: Tensor, norm: Tensor, positions: Tensor, cos_sin: Tensor, eps: float, out: Tensor, slots: Tensor | None
) -> Launch:
    """`Kernels.latent_rows` into `out`: the cache [blocks, C, 1, d] at slots, or [N, d] without them."""
    tokens, width = x.shape
    depth = power_of_two(width)
    return Launch(
        latent_rows,
        (tokens,),
        dict(
            x=x, norm=norm, positions=positions, cos_sin=cos_sin, slots=slots, out=out, x_stride=x.stride(0),
            block_stride=out.stride(0), eps=float(eps),
        ),
        min(max(depth // 256, 1), 8),
        constants=dict(HEAD_DIM=width, ROTATED=cos_sin.shape[1], BLOCK_SIZE=out.shape[1], DEPTH=depth),
    )  # fmt: skip


def compress_launches(
    values: Tensor,
    gates: Tensor,
    places: Tensor,
    positions: Tensor,
    query_start: Tensor,
    slots: Tensor,
    raw: Tensor,
    raw_tables: Tensor,
    raw_context: Tensor,
    entries: Tensor,
    entry_tables: Tensor,
    norm: Tensor,
    cos_sin: Tensor,
    eps: float,
) -> Iterator[Launch]:
    """`Kernels.compress`."""
    (tokens, columns), ratio, width = values.shape, places.shape[0], norm.shape[0]
    spans, block, depth = columns // width, power_of_two(columns), max(power_of_two(width), 2)
    yield Launch(
        keep,
        (tokens,),
        dict(
            values=values, gates=gates, places=places, positions=positions, slots=slots, raw=raw,
            value_stride=values.stride(0), gate_stride=gates.stride(0), block_stride=raw.stride(0),
        ),
        min(max(block // 256, 1), 8),
        constants=dict(RATIO=ratio, COLUMNS=columns, BLOCK_SIZE=raw.shape[1], BLOCK=block),
    )  # fmt: skip
    yield Launch(
        close,
        (tokens,),
        dict(
            positions=positions, query_start=query_start, raw=raw, raw_tables=raw_tables, raw_context=raw_context,
            entries=entries, entry_tables=entry_tables, norm=norm, cos_sin=cos_sin, runs=raw_context.shape[0],
            raw_width=raw_tables.stride(0), entry_width=entry_tables.stride(0), raw_stride=raw.stride(0),
            entry_stride=entries.stride(0), eps=float(eps),
        ),
        min(max(depth // 64, 1), 8),
        constants=dict(
            RATIO=ratio, SPANS=spans, WIDTH=width, ROTATED=cos_sin.shape[1], RAW_SIZE=raw.shape[1],
            ENTRY_SIZE=entries.shape[1], ROWS=POOLED, DEPTH=depth,
        ),
    )  # fmt: skip


def attention_launch(
    queries: Tensor,
    positions: Tensor,
    query_start: Tensor,
    cos_sin: Tensor,
    sinks: Tensor,
    window: Tensor,
    tables: Tensor,
    context_len: Tensor,
    seen: int,
    scale: float,
    eps: float,
    first_key: int,
    own: Tensor | None,
    entries: Tensor | None,
    entry_tables: Tensor | None,
    ratio: int,
    chosen: Tensor | None,
    out: Tensor,
) -> Launch:
    """`Kernels.latent_attention` into `out` [N, H d]; an even number of channels is not rotated."""
    tokens, heads, (_, size, _, width) = queries.shape[0], sinks.shape[0], window.shape
    depth, whole = max(power_of_two(width), 16), window.dtype == torch.float32
    return Launch(
        attend,
        (tokens, -(-heads // 16)),
        dict(
            queries=queries, positions=positions, query_start=query_start, cos_sin=cos_sin, sinks=sinks, window=window,
            tables=tables, context_len=context_len, own=own, entries=entries, entry_tables=entry_tables, chosen=chosen,
            out=out, runs=context_len.shape[0], width=tables.stride(0),
            entry_width=0 if entry_tables is None else entry_tables.stride(0), query_stride=queries.stride(0),
            block_stride=window.stride(0), entry_stride=0 if entries is None else entries.stride(0),
            scale=float(scale), eps=float(eps),
        ),
        8 if depth > 128 else 4,
        1 if whole else 2,
        255,
        dict(
            HEADS=heads, HEAD_DIM=width, ROTATED=cos_sin.shape[1], BLOCK_SIZE=size,
            ENTRY_SIZE=1 if entries is None else entries.shape[1], SEEN=seen, FIRST_KEY=first_key, RATIO=ratio,
            MOST=0 if chosen is None else chosen.shape[1], ROWS=16, KEYS=32, DEPTH=depth,
            PRECISION="ieee" if whole else "tf32",
            WIDEN=triton.knobs.runtime.interpret and window.dtype == torch.bfloat16,
        ),
    )  # fmt: skip
