"""CUDA graphs by size: work over fixed buffers, recorded for a few sizes and replayed for all up to the largest.

A step that is smaller than its bucket is padded: the rows beyond it are computed but never read, and they write to a KV
slot that no block table names (`KVPool.scratch`).
"""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from dspark_server.runtime.device import Device, Graph

Results = tuple[Tensor | None, ...]


def default_sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4, then multiples of 8 up to 64, of 16 up to 256, of 32 up to 512; none above `most`, but `most` itself.

    Fine where steps are short and padding is noticeable, coarse where a recorded size costs more memory.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 513, 32)]
    return tuple(size for size in sizes if size < most) + ((most,) if most <= sizes[-1] else ())


def up_to(sizes: Sequence[int], most: int) -> list[int]:
    """Return the sizes below `most`, and `most` if `sizes` has an equal or larger one: the largest that can occur."""
    below = sorted({size for size in sizes if size < most})
    return below + [most] * any(size >= most for size in sizes)


class Graphs:
    """Records work at the first use of a size, and replays it from then on.

    `sizes` are the buckets; without any, everything runs eagerly. Results of all sizes share the memory of the largest
    recorded before them: record the largest first.
    """

    def __init__(self, device: Device, sizes: Sequence[int]) -> None:
        self.sizes = sorted(set(sizes))
        self.replays = 0
        self._device = device
        self._recorded: dict[Hashable, Graph[Results]] = {}
        self._largest: dict[Hashable, Results] = {}

    def bucket(self, size: int) -> int | None:
        """Return the smallest bucket that holds `size`; None if it is too large, or there are no graphs."""
        place = bisect_left(self.sizes, size)
        return self.sizes[place] if place < len(self.sizes) else None

    def run(self, size: int, work: Callable[[int], Results], variant: Hashable = None) -> Results:
        """Run `work(n)`, with n the bucket of `size`; without a bucket n is `size`, and nothing is recorded.

        `variant` distinguishes works recorded at the same size; the first dimension of each result grows with n. A
        replay overwrites the results of earlier ones of the same variant.
        """
        bucket = self.bucket(size)
        if bucket is None:
            return work(size)
        graph = self._recorded.get((variant, bucket))
        if graph is None:
            shared = self._largest.get(variant)
            graph = self._device.capture(lambda: _into(shared, work(bucket)))
            self._recorded[variant, bucket] = graph
            self._largest.setdefault(variant, graph.result)
        graph.replay()
        self.replays += 1
        return graph.result


def _into(shared: Results | None, results: Results) -> Results:
    """Move results into the leading rows of those of a larger size, if there is one."""
    if shared is None or any(mine is not None and len(mine) > len(its) for mine, its in _pairs(results, shared)):
        return results
    return tuple(None if mine is None else its[: len(mine)].copy_(mine) for mine, its in _pairs(results, shared))


def _pairs(results: Results, shared: Results) -> list[tuple[Tensor | None, Tensor]]:
    assert [mine is None for mine in results] == [its is None for its in shared], "a variant returns the same things"
    return [(mine, its if its is not None else torch.empty(0)) for mine, its in zip(results, shared, strict=True)]
