"""How caches are paged: which layers share blocks, how many tokens a block holds, which blocks a sequence needs.

A layer declares the rows that it keeps (`CacheRows`). Layers whose rows are kept equally long form a group. All groups
take blocks of the same number of bytes from one pool; a sequence has one table of blocks for each group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import NamedTuple

ALIGNMENT = 64  # bytes: rows of every layer begin at a multiple of this within a block


class CacheRows(NamedTuple):
    """What an attention layer keeps of a token: a key and a value row of `heads` times `head_dim` elements.

    A later token reads the rows of the last `reach` tokens, itself included; None: of all.
    """

    heads: int
    head_dim: int
    reach: int | None = None


class CacheGroup(NamedTuple):
    """Layers with one reach: `block_size` tokens of all of them share a block."""

    block_size: int
    reach: int | None = None

    def first_needed(self, computed: int) -> int:
        """First token of the first block that is read once `computed` tokens have their rows."""
        if self.reach is None:
            return 0
        return max(0, computed - self.reach + 1) // self.block_size * self.block_size

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
    """Where a layer's rows are in the blocks of `group`: bytes from a block's start to its keys, and to its values."""

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
        sizes: Sequence[int] | None = None,
    ) -> "CacheLayout":
        """Lay out the layers of all owners; elements take `itemsize` bytes.

        `sizes` are the tokens per block of each group. None: `block_size` for a single group; for several see `_sizes`.
        """
        layers = [layer for owner in owners for layer in owner]
        reaches = sorted({layer.reach for layer in layers}, key=lambda reach: (reach is not None, reach or 0))
        row_bytes = [
            sum(2 * layer.heads * layer.head_dim * itemsize for layer in layers if layer.reach == reach)
            for reach in reaches
        ]
        groups = tuple(map(CacheGroup, sizes or _sizes(row_bytes, block_size), reaches))
        ends = [0] * len(groups)

        def place(layer: CacheRows) -> CachePlace:
            group = reaches.index(layer.reach)
            size = groups[group].block_size * layer.heads * layer.head_dim * itemsize
            size = -(-size // ALIGNMENT) * ALIGNMENT
            ends[group] += 2 * size
            return CachePlace(layer, group, ends[group] - 2 * size, ends[group] - size)

        places = tuple(tuple(map(place, owner)) for owner in owners)
        return cls(groups, max(ends), places)


def segment_size(groups: Sequence[CacheGroup]) -> int:
    """Tokens of the shortest run that is whole blocks of every group: the unit of the prefix cache."""
    return lcm(*(group.block_size for group in groups))


def _sizes(row_bytes: Sequence[int], block_size: int) -> list[int]:
    """Tokens per block of groups with `row_bytes` for a token, where a block has the same bytes in all.

    The group with the widest rows has between a quarter of `block_size` and twice as many. Of these the sizes are
    chosen that waste few bytes and have a short segment, of equals the largest.
    """
    if len(row_bytes) == 1:
        return [block_size]
    widest = max(row_bytes)

    def cost(sizes: Sequence[int]) -> float:
        used = [size * own for size, own in zip(sizes, row_bytes, strict=True)]
        return 1 - min(used) / max(used) + 0.01 * max(1.0, lcm(*sizes) / block_size)

    candidates = []
    for size in range(2 * block_size, max(0, block_size // 4 - 1), -1):
        most = [size * widest // own for own in row_bytes]
        candidates += [most, [each // size * size for each in most]]  # the latter have the shortest segments
    return min(candidates, key=cost)
