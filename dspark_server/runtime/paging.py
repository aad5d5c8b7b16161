"""Paging of caches: the layers that share blocks, the tokens that a block holds, the blocks that a sequence needs.

A layer declares the rows that it keeps (`CacheRows`). Layers whose rows are kept equally long form a group. All groups
take blocks of the same number of bytes from one pool; a sequence has one table of blocks for each group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import NamedTuple

import torch

ALIGNMENT = 64  # bytes: rows of every layer begin at a multiple of this within a block
# Attention kernels add a row's keys up in tiles of so many, counted from a table's first row. Tables begin at multiples
# of it, so that a row is computed the same way wherever its table begins.
TILE = 64


class CacheRows(NamedTuple):
    """Rows that a layer keeps of a token: a key and, with `values`, a value row of `heads` times `head_dim` elements.

    A later token reads the rows of the last `reach` tokens, itself included; None: of all. `dtype` None: the cache's.
    With `every` > 1 there is one row for so many tokens, from a multiple of `every` on.
    """

    heads: int
    head_dim: int
    reach: int | None = None
    values: bool = True
    dtype: torch.dtype | None = None
    every: int = 1

    def parts(self, itemsize: int) -> list[int]:
        """Bytes of each of its rows; elements of the cache take `itemsize` bytes."""
        size = self.heads * self.head_dim * (self.dtype.itemsize if self.dtype else itemsize)
        return [size, size] if self.values else [size]


class CacheGroup(NamedTuple):
    """Layers with one reach: `block_size` tokens of all of them share a block. Tables begin at multiples of `tile`."""

    block_size: int
    reach: int | None = None
    tile: int = 1

    @property
    def step(self) -> int:
        """Tables begin at multiples of this."""
        return lcm(self.block_size, self.tile)

    def first_needed(self, computed: int) -> int:
        """First token of a table that has all that is read once `computed` tokens have their rows."""
        if self.reach is None:
            return 0
        return max(0, computed - self.reach + 1) // self.step * self.step

    def most_kept(self, length: int) -> int:
        """Most tokens that a table holds of a sequence of `length` tokens before the next one."""
        return length if self.reach is None else min(length, self.reach + self.step)

    def blocks_between(self, first: int, end: int) -> int:
        """Blocks for the tokens from `first`, at the start of a block, up to `end`."""
        return max(0, -(-(end - first) // self.block_size))


@dataclass
class BlockTable:
    """A sequence's blocks in one group. The first of them holds the tokens from `first` on; those before are gone."""

    first: int = 0
    blocks: list[int] = field(default_factory=list)


def tables_for(groups: Sequence[CacheGroup], blocks: Iterator[int], computed: int, end: int) -> list[BlockTable]:
    """Tables for the rows up to `end` of a sequence that has `computed` of them, filled from `blocks`."""
    firsts = [group.first_needed(computed) for group in groups]
    return [
        BlockTable(first, [next(blocks) for _ in range(group.blocks_between(first, end))])
        for group, first in zip(groups, firsts, strict=True)
    ]


class CachePlace(NamedTuple):
    """Place of a layer's rows in the blocks of `group`: bytes from a block's start to its keys, and to its values.

    Where it keeps no values, these are the keys.
    """

    rows: CacheRows
    group: int
    keys: int
    values: int


@dataclass(frozen=True)
class CacheLayout:
    """Blocks of `block_bytes` each; `places[owner][layer]` for the layers of each owner (target, drafter)."""

    groups: tuple[CacheGroup, ...]
    block_bytes: int
    places: tuple[tuple[CachePlace, ...], ...]

    @classmethod
    def of(
        cls,
        owners: Sequence[Sequence[CacheRows]],
        block_size: int,
        itemsize: int,
        groups: Sequence[CacheGroup] | None = None,
    ) -> "CacheLayout":
        """Lay out the layers of all owners; elements take `itemsize` bytes.

        `groups` are those to use. None: one for each reach that a layer has, with `block_size` tokens per block if it
        is the only one; for several see `_sizes`.
        """
        layers = [layer for owner in owners for layer in owner]
        reaches = sorted({layer.reach for layer in layers}, key=lambda reach: (reach is not None, reach or 0))
        if groups is not None:
            reaches = [group.reach for group in groups]
        if groups is None:
            members = [[layer for layer in layers if layer.reach == reach] for reach in reaches]
            token_bytes = [sum(sum(each.parts(itemsize)) / each.every for each in own) for own in members]
            units = [lcm(*(each.every for each in own)) for own in members]
            sizes = _sizes(token_bytes, [reach is not None for reach in reaches], units, block_size)
            groups = [CacheGroup(size, reach, TILE) for size, reach in zip(sizes, reaches, strict=True)]
        ends = [0] * len(groups)

        def group_of(reach: int | None) -> int:
            """The group that keeps the fewest tokens, of those that keep enough."""
            enough = [(g.reach is None, g.reach or 0, i) for i, g in enumerate(groups) if _keeps(g.reach, reach)]
            return min(enough)[2]

        def place(layer: CacheRows) -> CachePlace:
            group = group_of(layer.reach)
            starts = []
            for part in layer.parts(itemsize):
                starts.append(ends[group])
                ends[group] += -(-groups[group].block_size // layer.every * part // ALIGNMENT) * ALIGNMENT
            return CachePlace(layer, group, starts[0], starts[-1])

        places = tuple(tuple(map(place, owner)) for owner in owners)
        return cls(tuple(groups), max(ends), places)


def _keeps(mine: int | None, wanted: int | None) -> bool:
    """Whether rows kept for a reach of `mine` tokens serve a reach of `wanted`."""
    return mine is None or (wanted is not None and mine >= wanted)


def segment_size(groups: Sequence[CacheGroup]) -> int:
    """Tokens of the shortest run that is whole blocks of every group: the unit of the prefix cache."""
    return lcm(*(group.block_size for group in groups))


def _sizes(token_bytes: Sequence[float], windowed: Sequence[bool], units: Sequence[int], block_size: int) -> list[int]:
    """Tokens per block of groups with `token_bytes` for a token, where a block has the same bytes in all.

    The group with the widest rows has between a quarter of `block_size` and twice as many. Of these the sizes are
    chosen that waste few bytes and have a short segment, of equals the largest. Where a table may begin behind a
    sequence's first token, blocks fill tiles; elsewhere they are multiples of the group's unit.
    """
    if len(token_bytes) == 1:
        return [-(-block_size // units[0]) * units[0]]
    widest = max(token_bytes)

    def cost(sizes: Sequence[int]) -> float:
        used = [size * own for size, own in zip(sizes, token_bytes, strict=True)]
        return 1 - min(used) / max(used) + 0.01 * max(1.0, lcm(*sizes) / block_size)

    def fitted(sizes: Sequence[int], low: int) -> list[int]:
        steps = (1 if window else lcm(low, unit) for window, unit in zip(windowed, units, strict=True))
        return [max(step, size // step * step) for size, step in zip(sizes, steps, strict=True)]

    candidates: list[list[int]] = []
    for size in range(2 * block_size, max(0, block_size // 4 - 1), -1):
        most = [int(size * widest / own) for own in token_bytes]
        most = [min(TILE, power_below(each)) if window else each for each, window in zip(most, windowed, strict=True)]
        candidates += [fitted(most, 1), fitted(most, min(most))]  # the latter have the shortest segments
    return min(candidates, key=cost)


def power_below(number: int) -> int:
    """The greatest power of two up to a positive number."""
    return 1 << (number.bit_length() - 1)
