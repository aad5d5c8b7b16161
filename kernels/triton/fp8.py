"""Rows of an e4m3 cache (float8_e4m3fn, scale 1): clamped when written, widened when read.

A GPU converts by an instruction, from compute capability 8.9 on; Triton can compile neither for an older one. Its
interpreter converts wrongly (it rounds without carrying, and reads NaN as 480), so BITS converts by hand there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CAPABILITY = 89  # the least compute capability, times ten
_LARGEST = tl.constexpr(448.0)
_NAN = tl.constexpr(0x7F)


@triton.jit
def widened(stored, dtype: tl.constexpr, BITS: tl.constexpr):
    """Values loaded from a cache, as `dtype`, which holds every number that e4m3 has."""
    if BITS:
        code = (stored & 0x7F).to(tl.int32)
        size = (code << 20).to(tl.float32, bitcast=True) * (2.0**120)  # the exponents' biases are 7 and 127
        size = tl.where(code == _NAN, float("nan"), size)
        stored = tl.where(stored >= 0x80, -size, size)
    return stored.to(dtype)


@triton.jit
def stored(value, dtype: tl.constexpr, BITS: tl.constexpr):
    """float32 `value` as a cache of `dtype` stores it: in e4m3 rounded to the nearest, ties to even, within +-448."""
    if BITS or dtype == tl.float8e4nv:
        value = tl.where(value > _LARGEST, _LARGEST, tl.where(value < -_LARGEST, -_LARGEST, value))  # NaN stays
    if BITS:
        bits = value.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        # Multiples of 2**-9 below 2**-6: the last bits of the value plus 2**14.
        small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xF
        code = tl.where(size < 0x3C800000, small, normal)
        code = tl.where(value != value, _NAN, code)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return value.to(dtype)


def by_hand(cache: Tensor) -> bool:
    """Whether a cache is e4m3 and Triton cannot convert it: in the interpreter."""
    return bool(triton.knobs.runtime.interpret) and cache.dtype == torch.float8_e4m3fn


def for_launch(cache: Tensor) -> Tensor:
    """The cache as kernels take it: bytes where they convert `by_hand`."""
    return cache.view(torch.uint8) if by_hand(cache) else cache
