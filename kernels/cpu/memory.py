"""Memory for the data that every step reads: weights and caches, in huge pages where the system has them.

A pass streams all weights. With pages of 4 KiB the processor stops prefetching at every page's end, and in a virtual
machine looks each of them up in two tables: a fifth of the time (docs/experiments.md).
"""

import contextlib
import mmap
import threading
from math import prod

import torch
from torch import Tensor

HUGE = 2 << 20
CHUNK = 32 << 20  # bytes of one mapping of an arena
LINE = 64


def huge_zeros(size: int) -> Tensor:
    """`size` bytes [size] uint8 of zeros, mapped anew, in huge pages if the system allows; untouched pages are free."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    mapped = mmap.mmap(-1, size + HUGE, **private)  # shared memory, the default, gets no huge pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    return memory[-memory.data_ptr() % HUGE :][:size]


class Arena:
    """Hands out pieces of large mappings, so that small weights share huge pages. Freed pieces are not used again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros that begins on a cache line."""
        size = prod(shape) * dtype.itemsize
        if size >= CHUNK:
            return huge_zeros(size).view(dtype).view(shape)
        with self._lock:
            if size > len(self._chunk):
                self._chunk = huge_zeros(CHUNK)
            piece, self._chunk = self._chunk[:size], self._chunk[-(-size // LINE) * LINE :]
        return piece.view(dtype).view(shape)
