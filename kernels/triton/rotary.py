"""Rotary position embedding of q and k, their norms, and the write of k and v to the cache, in one launch.

A program takes one token and a few heads: those of q are rotated in place, those of k and v go to the token's slot.
Element i of a head is paired with i + d/2, so a head is two halves in registers and its norm needs no exchange.
"""

import triton
import triton.language as tl
from dspark_kernels.triton.fp8 import by_hand, for_launch, stored
from dspark_kernels.triton.launch import Launch, power_of_two
from torch import Tensor

HEADS = 4  # of a program, at most: one warp each


@triton.jit
def _load_halves(row, head, half, inside, HEAD_DIM: tl.constexpr):
    """The two halves [heads, half] of each head, float32."""
    at = row + head[:, None] * HEAD_DIM + half[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return low, tl.load(at + HEAD_DIM // 2, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(row, head, half, inside, low, high, HEAD_DIM: tl.constexpr, BITS: tl.constexpr):
    at = row + head[:, None] * HEAD_DIM + half[None, :]
    tl.store(at, stored(low, row.dtype.element_ty, BITS), mask=inside)
    tl.store(at + HEAD_DIM // 2, stored(high, row.dtype.element_ty, BITS), mask=inside)


@triton.jit
def _rotate(low, high, table, norm, half, eps, HEAD_DIM: tl.constexpr):
    """Both halves, normalised if there is a norm weight, rotated by the token's angles at `table`."""
    there = half < HEAD_DIM // 2
    if norm is not None:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_DIM + eps)
        low *= scale[:, None] * tl.load(norm + half, mask=there, other=0.0).to(tl.float32)[None, :]
        high *= scale[:, None] * tl.load(norm + HEAD_DIM // 2 + half, mask=there, other=0.0).to(tl.float32)[None, :]
    cosine = tl.load(table + half, mask=there, other=0.0)[None, :]
    sine = tl.load(table + HEAD_DIM // 2 + half, mask=there, other=0.0)[None, :]
    return low * cosine - high * sine, high * cosine + low * sine


@triton.jit
def rotary_kv_write(
    qkv, positions, cos_sin, slots, keys, values, q_norm, k_norm, qkv_stride, block_stride, eps,
    BLOCK_SIZE: tl.constexpr, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, SHARED_VALUES: tl.constexpr,
    VALUE_NORM: tl.constexpr,
):  # fmt: skip
    """Grid (N, ceil(Q_HEADS / HEADS) + ceil(KV_HEADS / HEADS)), q's parts first. A negative slot is not written.

    BITS is that of `stored`.
    """
    token = tl.program_id(0).to(tl.int64)
    row = qkv + token * qkv_stride
    table = cos_sin + tl.load(positions + token).to(tl.int64) * HEAD_DIM
    half = tl.arange(0, HALF)
    there = (half < HEAD_DIM // 2)[None, :]
    Q_PARTS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    part = tl.program_id(1)
    if part < Q_PARTS:
        head = part * HEADS + tl.arange(0, HEADS)
        inside = (head < Q_HEADS)[:, None] & there
        low, high = _load_halves(row, head, half, inside, HEAD_DIM)
        low, high = _rotate(low, high, table, q_norm, half, eps, HEAD_DIM)
        _store_halves(row, head, half, inside, low, high, HEAD_DIM, False)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        at = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * (KV_HEADS * HEAD_DIM)
        head = (part - Q_PARTS) * HEADS + tl.arange(0, HEADS)
        inside = (head < tl.where(slot >= 0, KV_HEADS, 0))[:, None] & there
        low, high = _load_halves(row + Q_HEADS * HEAD_DIM, head, half, inside, HEAD_DIM)
        low, high = _rotate(low, high, table, k_norm, half, eps, HEAD_DIM)
        _store_halves(keys + at, head, half, inside, low, high, HEAD_DIM, BITS)
        from_head: tl.constexpr = Q_HEADS if SHARED_VALUES else Q_HEADS + KV_HEADS
        low, high = _load_halves(row + from_head * HEAD_DIM, head, half, inside, HEAD_DIM)
        if VALUE_NORM:
            scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_DIM + eps)
            low *= scale[:, None]
            high *= scale[:, None]
        _store_halves(values + at, head, half, inside, low, high, HEAD_DIM, BITS)


def launch(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    num_q_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    value_norm: bool,
) -> Launch:
    """`Kernels.rotary_kv_write`."""
    _, block_size, kv_heads, head_dim = keys.shape
    heads = min(HEADS, power_of_two(max(kv_heads, 1)))
    return Launch(
        rotary_kv_write,
        (qkv.shape[0], -(-num_q_heads // heads) + -(-kv_heads // heads)),
        dict(
            qkv=qkv, positions=positions, cos_sin=cos_sin, slots=slots, keys=for_launch(keys),
            values=for_launch(values), q_norm=q_norm, k_norm=k_norm, qkv_stride=qkv.stride(0),
            block_stride=keys.stride(0), eps=float(eps),
        ),
        heads,
        constants=dict(
            BLOCK_SIZE=block_size, Q_HEADS=num_q_heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, HEADS=heads,
            HALF=power_of_two(head_dim // 2), BITS=by_hand(keys), VALUE_NORM=value_norm,
            SHARED_VALUES=qkv.shape[1] < (num_q_heads + 2 * kv_heads) * head_dim,
        ),
    )  # fmt: skip
