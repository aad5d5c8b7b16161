"""DeepSeek-V4's residual streams and its router: products of all streams, Sinkhorn's mixing, the scores of experts.

The products of a token's streams are split by columns, so that few tokens keep more than a few processors busy; the
parts follow from the width alone and are summed in their order, so a token's result is its own.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from dspark_kernels.triton.elementwise import NO_RANK, rank, ranked_column
from dspark_kernels.triton.launch import Launch, power_of_two
from torch import Tensor

TOKENS = 16  # of a tile of products
STEP = 64  # columns of a step
PART = 1024  # columns of a part


@triton.jit(do_not_specialize=["tokens"])
def multiply(
    streams, fn, out, tokens, stride, ROWS: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (tokens / TOKENS, WIDE / PART): out [parts, N, ROWS + 1], each part's products with fn, and its squares."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    present = token < tokens
    row = tl.arange(0, BLOCK)
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    squares = tl.zeros([TOKENS], tl.float32)
    for begin in range(0, PART, STEP):
        column = tl.program_id(1) * PART + begin + tl.arange(0, STEP)
        inside = column < WIDE
        at = streams + token.to(tl.int64)[:, None] * stride + column[None, :]
        x = tl.load(at, mask=present[:, None] & inside[None, :], other=0.0).to(tl.float32)
        weight = tl.load(
            fn + row[None, :] * WIDE + column[:, None], mask=(row < ROWS)[None, :] & inside[:, None], other=0.0
        )
        total += tl.dot(x, weight, input_precision="ieee")
        squares += tl.sum(x * x, 1)
    to = out + (tl.program_id(1) * tokens + token).to(tl.int64) * (ROWS + 1)
    tl.store(to[:, None] + row[None, :], total, mask=present[:, None] & (row < ROWS)[None, :])
    tl.store(to + ROWS, squares, mask=present)


@triton.jit(do_not_specialize=["tokens"])
def mix(
    streams, parts, base, scale, norm, out, post, mixing, tokens, stride, floor, eps, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, ITERATIONS: tl.constexpr, SQUARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N): `Kernels.read_streams` from the parts of the products. SQUARE is a power of two, at least COUNT."""
    token = tl.program_id(0).to(tl.int64)
    ROWS: tl.constexpr = (2 + COUNT) * COUNT
    stream = tl.arange(0, SQUARE)
    known = stream < COUNT
    both = known[:, None] & known[None, :]
    cell = 2 * COUNT + stream[:, None] * COUNT + stream[None, :]
    before = tl.zeros([SQUARE], tl.float32)
    after = tl.zeros([SQUARE], tl.float32)
    among = tl.zeros([SQUARE, SQUARE], tl.float32)
    squares = 0.0
    for part in range(PARTS):
        at = parts + (part * tokens + token) * (ROWS + 1)
        before += tl.load(at + stream, mask=known, other=0.0)
        after += tl.load(at + COUNT + stream, mask=known, other=0.0)
        among += tl.load(at + cell, mask=both, other=0.0)
        squares += tl.load(at + ROWS)
    inverse = tl.rsqrt(squares / (COUNT * WIDTH) + eps)
    before = before * inverse * tl.load(scale) + tl.load(base + stream, mask=known, other=0.0)
    after = after * inverse * tl.load(scale + 1) + tl.load(base + COUNT + stream, mask=known, other=0.0)
    among = among * inverse * tl.load(scale + 2) + tl.load(base + cell, mask=both, other=0.0)
    among = tl.where(both, among, float("-inf"))
    level = tl.max(among, 1)
    among = tl.exp(among - tl.where(level == float("-inf"), 0.0, level)[:, None])
    sums = tl.sum(among, 1)
    among = tl.where(both, among / tl.where(known, sums, 1.0)[:, None] + floor, 0.0)
    among = among / tl.where(known, tl.sum(among, 0) + floor, 1.0)[None, :]
    for _ in range(ITERATIONS - 1):
        among = among / tl.where(known, tl.sum(among, 1) + floor, 1.0)[:, None]
        among = among / tl.where(known, tl.sum(among, 0) + floor, 1.0)[None, :]
    tl.store(mixing + token * (COUNT * COUNT) + cell - 2 * COUNT, among, mask=both)
    tl.store(post + token * COUNT + stream, 2.0 / (1.0 + tl.exp(-after)), mask=known)
    share = 1.0 / (1.0 + tl.exp(-before)) + floor
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(COUNT):
        own = tl.sum(tl.where(stream == j, share, 0.0), 0)
        total += own * tl.load(streams + token * stride + j * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    total = total.to(out.dtype.element_ty).to(tl.float32)
    total *= tl.rsqrt(tl.sum(total * total, 0) / WIDTH + eps)
    total *= tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def write(
    streams, output, post, mixing, stride, output_stride, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    SQUARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N, WIDTH / BLOCK): `Kernels.write_streams`; all streams are read before the first is written."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    stream = tl.arange(0, SQUARE)
    known = stream < COUNT
    at = streams + token * stride + column
    x = tl.load(at[None, :] + stream[:, None] * WIDTH, mask=known[:, None] & inside[None, :], other=0.0).to(tl.float32)
    y = tl.load(output + token * output_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.debug_barrier()
    for k in tl.static_range(COUNT):
        share = tl.load(mixing + token * (COUNT * COUNT) + stream * COUNT + k, mask=known, other=0.0)
        total = tl.sum(share[:, None] * x, 0) + tl.load(post + token * COUNT + k) * y
        tl.store(at + k * WIDTH, total.to(streams.dtype.element_ty), mask=inside)


@triton.jit
def _roots(logit):
    """sqrt(softplus(logit)), exact to rounding where softplus is small, too."""
    small = tl.exp(-tl.abs(logit))
    above = 1.0 + small
    log = tl.where(above == 1.0, small, tl.log(above) * (small / tl.where(above == 1.0, 1.0, above - 1.0)))
    return tl.sqrt(tl.maximum(logit, 0.0, propagate_nan=tl.PropagateNan.ALL) + log)


@triton.jit
def score(
    logits, bias, given, chosen, shares, scale, EXPERTS: tl.constexpr, CHOSEN: tl.constexpr, BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Grid (N): `Kernels.score_experts`; `given` [N, CHOSEN], or a bias."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    row = logits + token * EXPERTS
    if given is not None:
        number = tl.load(given + token * CHOSEN + slot, mask=slot < CHOSEN, other=0).to(tl.int32)
    else:
        expert = tl.arange(0, BLOCK)
        inside = expert < EXPERTS
        value = _roots(tl.load(row + expert, mask=inside, other=0.0))
        ranks = rank(value + tl.load(bias + expert, mask=inside, other=0.0), expert)
        ranks = tl.where(inside, ranks, NO_RANK)
        number = tl.zeros([SLOTS], tl.int32)
        for k in range(CHOSEN):
            best = tl.max(ranks, 0)
            number = tl.where(slot == k, ranked_column(best).to(tl.int32), number)
            ranks = tl.where(ranks == best, NO_RANK, ranks)
    own = tl.where(slot < CHOSEN, _roots(tl.load(row + number, mask=slot < CHOSEN, other=0.0)), 0.0)
    to = token * CHOSEN + slot
    tl.store(chosen + to, number, mask=slot < CHOSEN)
    tl.store(shares + to, own / tl.sum(own, 0) * scale, mask=slot < CHOSEN)


def read_launches(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    iterations: int,
    floor: float,
    eps: float,
    out: Tensor,
    post: Tensor,
    mixing: Tensor,
) -> Iterator[Launch]:
    """`Kernels.read_streams` into out [N, D], post [N, n] and mixing [N, n, n]."""
    (tokens, wide), rows, width, count = streams.shape, fn.shape[0], norm.shape[0], post.shape[1]
    pieces = -(-wide // PART)
    parts = torch.empty((pieces, tokens, rows + 1), dtype=torch.float32, device=streams.device)
    yield Launch(
        multiply,
        (-(-tokens // TOKENS), pieces),
        dict(streams=streams, fn=fn, out=parts, tokens=tokens, stride=streams.stride(0)),
        4,
        1,
        255,
        dict(
            ROWS=rows, WIDE=wide, TOKENS=TOKENS, STEP=min(STEP, max(16, power_of_two(wide))), PART=PART,
            BLOCK=max(16, power_of_two(rows)),
        ),
    )  # fmt: skip
    block = power_of_two(width)
    yield Launch(
        mix,
        (tokens,),
        dict(
            streams=streams, parts=parts, base=base, scale=scale, norm=norm, out=out, post=post, mixing=mixing,
            tokens=tokens, stride=streams.stride(0), floor=float(floor), eps=float(eps),
        ),
        min(max(block // 512, 1), 16),
        constants=dict(
            COUNT=count, WIDTH=width, PARTS=pieces, ITERATIONS=iterations, SQUARE=power_of_two(count), BLOCK=block
        ),
    )  # fmt: skip


def write_launch(streams: Tensor, output: Tensor, post: Tensor, mixing: Tensor) -> Launch:
    """`Kernels.write_streams`."""
    (tokens, width), count = output.shape, post.shape[1]
    block = min(power_of_two(width), 1024)
    return Launch(
        write,
        (tokens, -(-width // block)),
        dict(
            streams=streams, output=output, post=post, mixing=mixing, stride=streams.stride(0),
            output_stride=output.stride(0),
        ),
        constants=dict(COUNT=count, WIDTH=width, SQUARE=power_of_two(count), BLOCK=block),
    )  # fmt: skip


def score_launch(
    logits: Tensor, bias: Tensor | None, given: Tensor | None, scale: float, chosen: Tensor, shares: Tensor
) -> Launch:
    """`Kernels.score_experts` into `chosen` and `shares` [N, K]."""
    (tokens, experts), count = logits.shape, chosen.shape[1]
    block = power_of_two(experts)
    return Launch(
        score,
        (tokens,),
        dict(
            logits=logits, bias=None if given is not None else bias, given=given, chosen=chosen, shares=shares,
            scale=float(scale),
        ),
        min(max(block // 128, 1), 4),
        constants=dict(EXPERTS=experts, CHOSEN=count, BLOCK=block, SLOTS=power_of_two(count)),
    )  # fmt: skip
