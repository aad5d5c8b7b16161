"""The experts of a mixture: two grouped products over rows sorted by expert, and the sum of each token's outputs.

Rows are the (token, expert) pairs, in order of expert, then of token. Expert e's tiles start at start[e] // TILE + e,
an upper bound that needs nothing from the device's memory on the host (as in attention.py), so every launch has the
same grid whatever the tokens choose. A row's products are summed in order of the inputs, whatever tile it is in.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from dspark_kernels.triton.launch import Launch, power_of_two
from dspark_kernels.triton.tiles import owner_of
from torch import Tensor

INPUTS = 64  # of a step of a product
COLUMNS = 64  # of a tile


@triton.jit(do_not_specialize=["experts"])
def multiply(
    x, weight, sources, start, out, experts, x_stride, INPUTS: tl.constexpr, FEATURES: tl.constexpr,
    GATED: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, FEATURES / COLUMNS): out [rows, FEATURES] = each row times its expert's weight [FEATURES, INPUTS].

    GATED: weight is [2 FEATURES, INPUTS], out = silu(product with the first half) * product with the second, each
    rounded; the former is at most LIMIT, the latter within +-LIMIT, unless that is 0. sources [rows]: the row of x
    that a row is; None: itself. WIDEN as in attention.py.
    """
    TYPE: tl.constexpr = x.dtype.element_ty
    expert, first_tile = owner_of(start, tl.program_id(0), experts, TILE)
    row = tl.load(start + expert) + (tl.program_id(0) - first_tile) * TILE + tl.arange(0, TILE)
    end = tl.load(start + expert + 1)
    if tl.load(start + expert) + (tl.program_id(0) - first_tile) * TILE >= end:
        return
    present = row < end
    source = row
    if sources is not None:
        source = tl.load(sources + row, mask=present, other=0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < FEATURES
    HALVES: tl.constexpr = 2 if GATED else 1
    matrix = weight + expert.to(tl.int64) * (HALVES * FEATURES * INPUTS)
    total = tl.zeros([TILE, COLUMNS], tl.float32)
    second = tl.zeros([TILE, COLUMNS], tl.float32)
    for begin in range(0, INPUTS, STEP):
        k = begin + tl.arange(0, STEP)
        known = k < INPUTS
        a = tl.load(
            x + source.to(tl.int64)[:, None] * x_stride + k[None, :], mask=present[:, None] & known[None, :], other=0.0
        )
        at = column[None, :] * INPUTS + k[:, None]
        mask = known[:, None] & inside[None, :]
        b = tl.load(matrix + at, mask=mask, other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total += tl.dot(a, b, input_precision=PRECISION)
        if GATED:
            c = tl.load(matrix + FEATURES * INPUTS + at, mask=mask, other=0.0)
            if WIDEN:
                c = c.to(tl.float32)
            second += tl.dot(a, c, input_precision=PRECISION)
    if GATED:
        gate = total.to(TYPE).to(tl.float32)
        up = second.to(TYPE).to(tl.float32)
        if LIMIT > 0:
            gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
            up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        total = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(
        out + row.to(tl.int64)[:, None] * FEATURES + column[None, :],
        total.to(out.dtype.element_ty),
        mask=present[:, None] & inside[None, :],
    )


@triton.jit
def combine(rows, places, shares, present, out, CHOSEN: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (N, WIDTH / BLOCK): out [N, WIDTH] = sum of share * row of each of a token's CHOSEN places [N, CHOSEN].

    Rows from `present` [1] on are experts' of other ranks, and add nothing.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(CHOSEN):
        place = tl.load(places + token * CHOSEN + slot).to(tl.int64)
        share = tl.load(shares + token * CHOSEN + slot)
        own = inside & (place + tl.zeros([BLOCK], tl.int64) < tl.load(present))
        total += tl.where(own, share, 0.0) * tl.load(rows + place * WIDTH + column, mask=own, other=0.0)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=inside)


def launches(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    chosen: Tensor,
    shares: Tensor,
    out: Tensor,
    limit: float | None = None,
) -> Iterator[Launch]:
    """`Kernels.experts` into `out` [N, D]; nothing is read from the device."""
    (tokens, each), (experts, hidden, features) = chosen.shape, down.shape
    of_slot = chosen.flatten().clamp(max=experts)  # those of other ranks are sorted last
    order = of_slot.argsort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = torch.zeros(experts + 2, dtype=torch.int64, device=x.device)
    start = counts.scatter_add_(0, of_slot.long() + 1, torch.ones_like(order)).cumsum(0).int()
    sources = (order // each).int()
    activated = torch.empty(tokens * each, features, dtype=x.dtype, device=x.device)
    rows = torch.empty(tokens * each, hidden, dtype=torch.float32, device=x.device)
    tile = min(max(power_of_two(-(-tokens * each // experts)), 16), 64)
    yield _product(x, gate_up, sources, start, activated, tile, True, limit)
    yield _product(activated, down, None, start, rows, tile)
    block = min(power_of_two(hidden), 1024)
    yield Launch(
        combine,
        (tokens, -(-hidden // block)),
        dict(rows=rows, places=places.int(), shares=shares, present=start[experts:], out=out),
        constants=dict(CHOSEN=each, WIDTH=hidden, BLOCK=block),
    )


def _product(
    x: Tensor,
    weight: Tensor,
    sources: Tensor | None,
    start: Tensor,
    out: Tensor,
    tile: int,
    gated: bool = False,
    limit: float | None = None,
) -> Launch:
    (rows, features), experts = out.shape, weight.shape[0]
    return Launch(
        multiply,
        (rows // tile + experts if rows else 0, -(-features // COLUMNS)),
        dict(x=x, weight=weight, sources=sources, start=start, out=out, experts=experts, x_stride=x.stride(0)),
        4,
        2 if x.dtype == torch.float32 else 3,
        255,
        dict(
            INPUTS=weight.shape[2], FEATURES=features, GATED=gated, TILE=tile, COLUMNS=COLUMNS, STEP=INPUTS,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            LIMIT=limit or 0.0,
            WIDEN=triton.knobs.runtime.interpret and x.dtype == torch.bfloat16,
        ),
    )  # fmt: skip
