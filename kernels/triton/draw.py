"""Softmaxes and draws over rows that are split into parts, shared by the sequential head and acceptance.

A row of a vocabulary is too long for one processor to read quickly, so a program takes PART columns of it and leaves
the part's maximum and sum of exponentials, or its mass, which together give those of the row.
"""

import triton
import triton.language as tl

PART = 8192  # columns of a part
NONE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def soften(peak, mass, value):
    """A running softmax: the maximum and the sum of exp(v - maximum) with `value` [BLOCK] included."""
    risen = tl.maximum(peak, tl.max(value, 0))
    level = tl.where(risen == float("-inf"), 0.0, risen)
    return risen, mass * tl.exp(peak - level) + tl.sum(tl.exp(value - level), 0)


@triton.jit
def merge(peaks, masses):
    """The maximum and sum of a whole row from those of its parts; a NaN among the maxima is left out."""
    peak = tl.max(tl.where(peaks == peaks, peaks, float("-inf")), 0)
    level = tl.where(peak == float("-inf"), 0.0, peak)
    return peak, tl.sum(masses * tl.exp(peaks - level), 0)


@triton.jit
def draw_part(part, mass, uniform):
    """Inverse CDF over the masses of a row's parts: the part, the mass before it, and the point inside it.

    part and mass [BLOCK]: 0, 1, ... and float64. A part without mass is never drawn.
    """
    point = uniform * tl.sum(mass, 0)
    choice = tl.min(tl.where((tl.cumsum(mass, 0) > point) & (mass > 0.0), part, NONE), 0)
    choice = tl.where(choice == NONE, tl.max(tl.where(mass > 0.0, part, 0), 0), choice)
    return choice, tl.sum(tl.where(part < choice, mass, 0.0), 0), point


@triton.jit
def draw_column(weights, first, end, before, point, BLOCK: tl.constexpr):
    """Inverse CDF over weights [end] float32 from column `first` on, which has the mass `before` in front of it.

    A column without weight is never drawn: if rounding leaves the point after the last edge, the last column with any
    is.
    """
    choice = NONE
    last = first
    for start in range(first, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        weight = tl.maximum(tl.load(weights + column, mask=column < end, other=0.0), 0.0).to(tl.float64)
        edge = before + tl.cumsum(weight, 0)
        choice = tl.minimum(choice, tl.min(tl.where((edge > point) & (weight > 0.0), column, NONE), 0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0.0, column, 0), 0))
        before += tl.sum(weight, 0)
    return tl.where(choice == NONE, last, choice)
