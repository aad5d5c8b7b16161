"""Memory allocation by the C library."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Make malloc reuse freed blocks instead of returning them to the system; does nothing without glibc.

    By default each tensor of 32 MiB or more is mapped afresh, and its page faults take longer than a matrix product
    takes to fill it, most of all in a virtual machine (docs/experiments.md).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
