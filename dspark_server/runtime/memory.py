"""How the C library hands out memory."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Have malloc reuse freed blocks instead of giving them back to the system; does nothing without glibc.

    By default each tensor of 32 MiB or more is mapped afresh, and its pages cost more to fault in than a matrix
    product takes to fill them, most of all in a virtual machine (docs/experiments.md).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
