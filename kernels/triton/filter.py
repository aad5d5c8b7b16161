"""Top-k, top-p and min-p as a floor under a row's logits: logits below it are removed, ties at it stay.

Top-k and top-p need the same: the greatest value of the row such that the values from it on reach k tokens or the share
top_p of the mass. It is found by bisection between values. Every step ends on values of the row: gaps are skipped, ties
end it, and the floor is exact. A program takes a row; once the remaining candidates fit into a block, it stores them in
scratch memory and continues in registers, so the row itself is read some 10 times.
"""

import triton
import triton.language as tl
from dspark_kernels.interface import Filters
from dspark_kernels.triton.launch import Launch, power_of_two
from torch import Tensor

BLOCK = 4096  # columns in a step
WARPS = 16


@triton.jit
def _scaled(base, correction, spot, score, scale, column, COLUMNS: tl.constexpr):
    """Logits times `scale` at `column` [BLOCK], -inf after the last; that of the column `spot` is `score`."""
    logit = tl.load(base + column, mask=column < COLUMNS, other=float("-inf"))
    if correction is not None:
        logit += tl.load(correction + column, mask=column < COLUMNS, other=0.0)
    return tl.where(column == spot, score, logit) * scale


@triton.jit
def _beyond(value, middle, low, high, peak, MASS: tl.constexpr):
    """Over values [BLOCK]: weight and number of those above `middle`, the least of them, the greatest of the others.

    A value weighs 1, or exp(value - peak) with MASS; the last two are no further apart than `low` and `high`.
    """
    over = value > middle
    count = tl.sum(over.to(tl.int32), 0)
    weight = count.to(tl.float64)
    if MASS:
        weight = tl.sum(tl.where(over, tl.exp(value - peak), 0.0), 0).to(tl.float64)
    others = tl.where(over, low, tl.maximum(value, low))
    return weight, count, tl.min(tl.where(over, value, high), 0), tl.max(others, 0)


@triton.jit
def _middle(low, high):
    """The middle of the two, below `high`."""
    middle = 0.5 * low + 0.5 * high
    return tl.where((middle >= low) & (middle < high), middle, low)


@triton.jit
def _greatest(
    base, correction, spot, score, scale, few, low, peak, count, wanted,
    MASS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The greatest v of the row's values, `low` to `peak`, such that those from v on weigh `wanted` (float64).

    The `count` values from `low` on are assumed to weigh enough. few [BLOCK] is scratch; the weights are `_beyond`'s.
    """
    high = peak
    while (low < high) & (count > BLOCK):
        middle = _middle(low, high)
        weight = tl.zeros([], tl.float64)
        many = 0
        above = high
        below = low
        for first in range(0, COLUMNS, BLOCK):
            value = _scaled(base, correction, spot, score, scale, first + tl.arange(0, BLOCK), COLUMNS)
            more, number, least, greatest = _beyond(value, middle, low, high, peak, MASS)
            weight += more
            many += number
            above = tl.minimum(above, least)
            below = tl.maximum(below, greatest)
        enough = weight >= wanted
        low = tl.where(enough, above, low)
        high = tl.where(enough, high, below)
        count = tl.where(enough, many, count)
    if low < high:
        tl.debug_barrier()  # `few` may have been read
        left = 0
        for first in range(0, COLUMNS, BLOCK):
            value = _scaled(base, correction, spot, score, scale, first + tl.arange(0, BLOCK), COLUMNS)
            stays = value >= low
            tl.store(few + left + tl.cumsum(stays.to(tl.int32), 0) - 1, value, mask=stays)
            left += tl.sum(stays.to(tl.int32), 0)
        tl.debug_barrier()  # other threads read these values
        place = tl.arange(0, BLOCK)
        value = tl.load(few + place, mask=place < left, other=float("-inf"))
        while low < high:
            weight, many, above, below = _beyond(value, _middle(low, high), low, high, peak, MASS)
            low = tl.where(weight >= wanted, above, low)
            high = tl.where(weight >= wanted, high, below)
    return low


@triton.jit
def floor_of(
    base, correction, spot, score, scale, few, top_k, top_p, min_p, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The least of a row's scaled logits that its filters leave; -inf for a row with NaN or +inf, or only -inf.

    base [COLUMNS] float32, plus correction [COLUMNS] if there is one, except for the column `spot` (-1: none), which
    has the logit `score`; few [BLOCK] float32 is scratch. Each filter sees only the values that the ones before it
    left: min_p (0: off), top_k (0: off), top_p (1: off).
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
                kth = _greatest(
                    base, correction, spot, score, scale, few, least, peak, count, top_k.to(tl.float64), False,
                    COLUMNS, BLOCK,
                )  # fmt: skip
                floor = tl.maximum(floor, kth)
            if top_p < 1.0:
                mass = tl.zeros([], tl.float64)
                low = peak
                count = 0
                for first in range(0, COLUMNS, BLOCK):
                    value = _scaled(base, correction, spot, score, scale, first + tl.arange(0, BLOCK), COLUMNS)
                    share = tl.where(value >= floor, tl.exp(value - peak), 0.0)
                    low = tl.minimum(low, tl.min(tl.where(share > 0.0, value, peak), 0))
                    mass += tl.sum(share, 0).to(tl.float64)
                    count += tl.sum((share > 0.0).to(tl.int32), 0)
                floor = _greatest(
                    base, correction, spot, score, scale, few, low, peak, count, top_p.to(tl.float64) * mass, True,
                    COLUMNS, BLOCK,
                )  # fmt: skip
    return floor


@triton.jit
def filter_logits(
    logits, rows, inverse_temperature, few, top_k, top_p, min_p, out, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (n): out [n, VOCABULARY], rows of logits with -inf where a filter removes a token; few [n, BLOCK]."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + tl.load(rows + row) * VOCABULARY
    scale = tl.load(inverse_temperature + row)
    floor = floor_of(
        base, None, -1, 0.0, scale, few + row * BLOCK, tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row),
        VOCABULARY, BLOCK,
    )  # fmt: skip
    for first in range(0, VOCABULARY, BLOCK):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(base + column, mask=column < VOCABULARY, other=0.0)
        logit = tl.where(logit * scale < floor, float("-inf"), logit)
        tl.store(out + row * VOCABULARY + column, logit, mask=column < VOCABULARY)


def launch(logits: Tensor, rows: Tensor, inverse_temperature: Tensor, filters: Filters, out: Tensor) -> Launch:
    """`Kernels.filter_logits` into out [n, V]."""
    vocabulary = logits.shape[1]
    block = min(power_of_two(vocabulary), BLOCK)
    return Launch(
        filter_logits,
        (len(rows),),
        dict(
            logits=logits, rows=rows, inverse_temperature=inverse_temperature, few=out.new_empty(len(rows), block),
            top_k=filters.top_k, top_p=filters.top_p, min_p=filters.min_p, out=out,
        ),
        WARPS,
        constants=dict(VOCABULARY=vocabulary, BLOCK=block),
    )  # fmt: skip
