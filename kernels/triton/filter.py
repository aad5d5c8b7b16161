"""Top-k, top-p and min-p as a floor under a row's logits: what is below it is left out, ties at it stay.

Top-k and top-p ask for the same: the greatest value of the row at which enough of it is reached, k tokens or the share
top_p of the mass. It is found by bisection between values, a pass over the row for each, and every pass ends on values
that stand there: gaps are skipped, ties end it, and the floor is exact. A program takes a row and reads it some 10
to 20 times for a filter, all but the first from the L2 cache as long as the rows at work fit there.
"""

import triton
import triton.language as tl
from dspark_kernels.interface import Filters
from dspark_kernels.triton.launch import Launch, power_of_two
from torch import Tensor

BLOCK = 8192  # columns in a step
WARPS = 16


@triton.jit
def _scaled(base, correction, spot, score, scale, column, COLUMNS: tl.constexpr):
    """Logits times `scale` at `column` [BLOCK], -inf behind the last; that of the column `spot` is `score`."""
    logit = tl.load(base + column, mask=column < COLUMNS, other=float("-inf"))
    if correction is not None:
        logit += tl.load(correction + column, mask=column < COLUMNS, other=0.0)
    return tl.where(column == spot, score, logit) * scale


@triton.jit
def _greatest(
    base, correction, spot, score, scale, low, peak, wanted,
    MASS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The greatest v of the row's values, `low` to `peak`, such that those from v on weigh `wanted` (float64).

    A value weighs 1, or exp(value - peak) with MASS. Those from `low` on are taken to weigh enough.
    """
    high = peak
    while low < high:
        middle = 0.5 * low + 0.5 * high
        middle = tl.where((middle >= low) & (middle < high), middle, low)
        weight = tl.zeros([], tl.float64)
        above = high
        below = low
        for first in range(0, COLUMNS, BLOCK):
            value = _scaled(base, correction, spot, score, scale, first + tl.arange(0, BLOCK), COLUMNS)
            beyond = value > middle
            share = tl.where(beyond, 1.0, 0.0)
            if MASS:
                share = tl.where(beyond, tl.exp(value - peak), 0.0)
            weight += tl.sum(share, 0).to(tl.float64)
            above = tl.minimum(above, tl.min(tl.where(beyond, value, high), 0))
            below = tl.maximum(below, tl.max(tl.where(beyond, low, value), 0))
        enough = weight >= wanted
        low = tl.where(enough, above, low)
        high = tl.where(enough, high, below)
    return low


@triton.jit
def floor_of(
    base, correction, spot, score, scale, top_k, top_p, min_p, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The least of a row's scaled logits that its filters leave; -inf for a row with NaN or +inf, or only -inf.

    base [COLUMNS] float32, plus correction [COLUMNS] if there is one, but for the column `spot` (-1: none), which has
    the logit `score`. Each filter sees what the ones before it left: min_p (0: off), top_k (0: off), top_p (1: off).
    """
    floor = float("-inf")
    wanted = (min_p > 0.0) | ((top_k > 0) & (top_k < COLUMNS)) | (top_p < 1.0)
    if wanted:
        peak = float("-inf")
        least = float("inf")
        count = 0
        broken = 0
        for first in range(0, COLUMNS, BLOCK):
            value = _scaled(base, correction, spot, score, scale, first + tl.arange(0, BLOCK), COLUMNS)
            there = value > float("-inf")
            broken = tl.maximum(broken, tl.max(tl.where(value < float("inf"), 0, 1), 0))
            peak = tl.maximum(peak, tl.max(value, 0))
            least = tl.minimum(least, tl.min(tl.where(there, value, float("inf")), 0))
            count += tl.sum(there.to(tl.int32), 0)
        if (broken == 0) & (count > 0):
            if min_p > 0.0:
                floor = peak + tl.log(min_p)
            if (top_k > 0) & (top_k <= count):
                enough = top_k.to(tl.float64)
                kth = _greatest(base, correction, spot, score, scale, least, peak, enough, False, COLUMNS, BLOCK)
                floor = tl.maximum(floor, kth)
            if top_p < 1.0:
                mass = tl.zeros([], tl.float64)
                low = peak
                for first in range(0, COLUMNS, BLOCK):
                    value = _scaled(base, correction, spot, score, scale, first + tl.arange(0, BLOCK), COLUMNS)
                    share = tl.where(value >= floor, tl.exp(value - peak), 0.0)
                    low = tl.minimum(low, tl.min(tl.where(share > 0.0, value, peak), 0))
                    mass += tl.sum(share, 0).to(tl.float64)
                enough = top_p.to(tl.float64) * mass
                floor = _greatest(base, correction, spot, score, scale, low, peak, enough, True, COLUMNS, BLOCK)
    return floor


@triton.jit
def filter_logits(
    logits, rows, inverse_temperature, top_k, top_p, min_p, out, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (n): out [n, VOCABULARY], rows of logits with -inf where a filter leaves a token out."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + tl.load(rows + row) * VOCABULARY
    scale = tl.load(inverse_temperature + row)
    floor = floor_of(
        base, None, -1, 0.0, scale, tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row), VOCABULARY, BLOCK
    )
    for first in range(0, VOCABULARY, BLOCK):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(base + column, mask=column < VOCABULARY, other=0.0)
        logit = tl.where(logit * scale < floor, float("-inf"), logit)
        tl.store(out + row * VOCABULARY + column, logit, mask=column < VOCABULARY)


def launch(logits: Tensor, rows: Tensor, inverse_temperature: Tensor, filters: Filters, out: Tensor) -> Launch:
    """`Kernels.filter_logits` into out [n, V]."""
    vocabulary = logits.shape[1]
    return Launch(
        filter_logits,
        (len(rows),),
        dict(
            logits=logits, rows=rows, inverse_temperature=inverse_temperature, top_k=filters.top_k,
            top_p=filters.top_p, min_p=filters.min_p, out=out,
        ),
        WARPS,
        constants=dict(VOCABULARY=vocabulary, BLOCK=min(power_of_two(vocabulary), BLOCK)),
    )  # fmt: skip
