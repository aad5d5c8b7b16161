"""Cost curves over measured sizes: never falling, dense, and their convex minorant. Seconds at rising sizes."""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def isotonic(values: Sequence[float] | Floats, weights: Floats | None = None) -> Floats:
    """The rising curve nearest to `values` in least squares, by pooling adjacent violators.

    More work never costs less. Unlike under a running maximum, one value that is too high raises only the values that
    it is pooled with, and is itself lowered; `weights` (None: all 1) are the weights of the squares.
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, number of values
    for value, own in zip(values, np.ones(len(values)) if weights is None else weights, strict=True):
        mean, weight, count = float(value), float(own), 1
        while pools and pools[-1][0] >= mean:
            before, heavy, size = pools.pop()
            mean = (before * heavy + mean * weight) / (heavy + weight)
            weight, count = heavy + weight, size + count
        pools.append((mean, weight, count))
    return np.repeat([mean for mean, _, _ in pools], [count for _, _, count in pools])


def dense(sizes: Sequence[int], seconds: Floats, at: npt.NDArray[np.int64]) -> Floats:
    """Linear between the measured sizes, the last slope beyond them, the first value before them."""
    values = np.interp(at, sizes, seconds)
    if len(sizes) > 1:
        slope = max(0.0, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
        values = np.where(at > sizes[-1], seconds[-1] + slope * (at - sizes[-1]), values)
    return np.asarray(values, dtype=np.float64)


def runs_as(recorded: Sequence[int], at: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The sizes that work of sizes `at` runs at: the next recorded one; past the largest, or without any, its own."""
    if not recorded:
        return at
    steps = np.asarray(recorded, dtype=np.int64)
    place = np.searchsorted(steps, at)
    return np.where(place < len(steps), steps[np.minimum(place, len(steps) - 1)], at)


def shares(sizes: Sequence[int], seconds: Floats, size: int) -> Floats:
    """[len(sizes)] the share of each measured size in `dense` at `size`; their sum is 1."""
    parts = np.zeros(len(sizes))
    right = bisect_left(sizes, size)
    if right == 0 or right == len(sizes):
        parts[min(right, len(sizes) - 1)] = 1.0
        return parts
    near = (size - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
    before, after = (1 - near) * seconds[right - 1], near * seconds[right]
    parts[right - 1], parts[right] = before / (before + after), after / (before + after)
    return parts


def convex_minorant(sizes: Sequence[int], seconds: Sequence[float]) -> Floats:
    """The greatest convex function on sizes[0], sizes[0] + 1 .. sizes[-1] that never exceeds `seconds` at `sizes`."""
    hull: list[int] = []
    for index, (size, value) in enumerate(zip(sizes, seconds, strict=True)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (seconds[b] - seconds[a]) * (size - sizes[a]) < (value - seconds[a]) * (sizes[b] - sizes[a]):
                break
            hull.pop()
        hull.append(index)
    corners = [sizes[index] for index in hull], [seconds[index] for index in hull]
    return np.asarray(np.interp(np.arange(sizes[0], sizes[-1] + 1), *corners))
