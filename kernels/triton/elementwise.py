"""The operations between matrix products: RMSNorm and the residual's addition, gates, argmax.

Each reads and writes device memory once and computes next to nothing: a row (or a piece of one) is a program.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from dspark_kernels.triton.launch import Launch, power_of_two
from torch import Tensor

GATE_COLUMNS = 1024
ARGMAX_COLUMNS = 8192
NO_RANK = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # below the rank of any number


@triton.jit
def rms_norm(x, residual, weight, out, x_stride, residual_stride, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (N): out [N, COLUMNS] = rms_norm(x), or of residual += x as it is stored, if there is one."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        at = residual + row * residual_stride + column
        rounded = (tl.load(at, mask=inside, other=0.0).to(tl.float32) + value).to(residual.dtype.element_ty)
        tl.store(at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / COLUMNS + eps)
    normed = value * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * COLUMNS + column, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_mul(gate_up, out, stride, FEATURES: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    """Grid (N, FEATURES / BLOCK): out [N, FEATURES] = silu(gate) * up of gate_up [N, 2 FEATURES].

    With GELU, gelu by its approximation with tanh: x / 2 * (1 + tanh(z)) = x / (1 + exp(-2 z)).
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < FEATURES
    at = gate_up + row * stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + FEATURES, mask=inside, other=0.0).to(tl.float32)
    exponent = -gate
    if GELU:
        exponent = -1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    tl.store(
        out + row * FEATURES + column, (gate / (1.0 + tl.exp(exponent)) * up).to(out.dtype.element_ty), mask=inside
    )


@triton.jit
def norm_add(x, residual, weight, x_stride, residual_stride, eps, factor, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (N): residual = (residual + rms_norm(x)) * factor, each step as it would be stored."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / COLUMNS + eps)
    normed = value * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    at = residual + row * residual_stride + column
    TYPE: tl.constexpr = residual.dtype.element_ty
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32) + normed.to(TYPE).to(tl.float32)
    tl.store(at, (total.to(TYPE).to(tl.float32) * factor).to(TYPE), mask=inside)


@triton.jit
def rank(value, column):
    """An int64 that is greatest for the greatest float32, of equals for the lowest column; a NaN beats any number."""
    value = tl.where(value == 0.0, 0.0, value)  # -0 is 0
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(value != value, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def ranked_column(rank):
    """The column that `rank` was made from."""
    return 0x7FFFFFFF - (rank & 0x7FFFFFFF)


@triton.jit
def argmax_part(logits, ranks, stride, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (M, PARTS): ranks [M, PARTS] int64, the best of each piece of BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    value = tl.load(logits + row * stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    best = tl.max(tl.where(inside, rank(value, column), NO_RANK), 0)
    tl.store(ranks + row * PARTS + tl.program_id(1), best)


@triton.jit
def argmax_whole(ranks, out, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (M): out [M] int64, the column of each row's best rank."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    best = tl.max(tl.load(ranks + row * PARTS + part, mask=part < PARTS, other=NO_RANK), 0)
    tl.store(out + row, ranked_column(best))


def norm_launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Launch:
    """RMSNorm of x [N, D], or of residual += x, into out [N, D]."""
    rows, columns = x.shape
    block = power_of_two(columns)
    return Launch(
        rms_norm,
        (rows,),
        dict(
            x=x, residual=residual, weight=weight, out=out, x_stride=x.stride(0),
            residual_stride=0 if residual is None else residual.stride(0), eps=float(eps),
        ),
        min(max(block // 512, 1), 16),
        constants=dict(COLUMNS=columns, BLOCK=block),
    )  # fmt: skip


def norm_add_launch(x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: float) -> Launch:
    """`Kernels.norm_add`."""
    rows, columns = x.shape
    block = power_of_two(columns)
    return Launch(
        norm_add,
        (rows,),
        dict(
            x=x, residual=residual, weight=weight, x_stride=x.stride(0), residual_stride=residual.stride(0),
            eps=float(eps), factor=float(scale),
        ),
        min(max(block // 512, 1), 16),
        constants=dict(COLUMNS=columns, BLOCK=block),
    )  # fmt: skip


def gate_launch(gate_up: Tensor, out: Tensor, gelu: bool = False) -> Launch:
    """silu(gate) * up, or gelu(gate) * up, into out [N, F]."""
    rows, features = out.shape
    block = min(power_of_two(features), GATE_COLUMNS)
    return Launch(
        gate_mul,
        (rows, -(-features // block)),
        dict(gate_up=gate_up, out=out, stride=gate_up.stride(0)),
        constants=dict(FEATURES=features, BLOCK=block, GELU=gelu),
    )


def argmax_launches(logits: Tensor, out: Tensor) -> Iterator[Launch]:
    """The columns of the rows' maxima into out [M]."""
    rows, columns = logits.shape
    block = min(power_of_two(columns), ARGMAX_COLUMNS)
    parts = -(-columns // block)
    ranks = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    yield Launch(
        argmax_part,
        (rows, parts),
        dict(logits=logits, ranks=ranks, stride=logits.stride(0)),
        8,
        constants=dict(COLUMNS=columns, PARTS=parts, BLOCK=block),
    )
    yield Launch(
        argmax_whole, (rows,), dict(ranks=ranks, out=out), 1, constants=dict(PARTS=parts, BLOCK=power_of_two(parts))
    )
