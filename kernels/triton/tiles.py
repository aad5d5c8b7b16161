"""Tiles of rows that belong to owners: runs of queries (attention.py), experts (experts.py)."""

import triton
import triton.language as tl


@triton.jit
def owner_of(start, tile, owners, TILE: tl.constexpr):
    """The last owner whose tiles start at or before `tile`, and its first tile.

    start [owners + 1] is each owner's first row. Its tiles start at start[owner] // TILE + owner, an upper bound that
    needs nothing from the device's memory on the host.
    """
    low = 0
    high = owners
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(start + middle) // TILE + middle
        low = tl.where(first <= tile, middle, low)
        high = tl.where(first <= tile, high, middle)
    return low, tl.load(start + low) // TILE + low


@triton.jit
def run_of(start, token, runs):
    """The run of a token: the last of `runs` whose first token, start [runs + 1], is at or before it."""
    low = 0
    high = runs
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(start + middle) <= token
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low
