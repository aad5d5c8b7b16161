"""The block pool and the prefix cache: references to KV blocks, and the prefixes by which they are found again.

A block is *free*, *held* (referenced by one or more requests), or *cached* (referenced by none, its content known and
evictable, least recently used first). free + cached + held == total, always. A sequence has a table of blocks for each
group of caches (runtime/paging.py).

A prefix is named by *segments*: the shortest runs of tokens that fill whole blocks in every group. Only blocks of whole
segments of committed tokens get an identity, so a later request never finds an unverified token.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from struct import pack
from typing import NamedTuple

from dspark_server import failpoints
from dspark_server.errors import CapacityError
from dspark_server.runtime.paging import BlockTable, CacheGroup, segment_size


@dataclass(frozen=True)
class PrefixKey:
    """Identity of a segment: a SHA-256 chain over everything before it, and the inputs of the last digest."""

    digest: bytes
    parent: bytes
    tokens: tuple[int, ...]


class Part(NamedTuple):
    """A block's part of the segment with `digest`: number `place` of its blocks in a group."""

    digest: bytes
    group: int
    place: int


def chain(parent: bytes, tokens: Sequence[int]) -> PrefixKey:
    """Key of the segment that holds `tokens` after the prefix whose digest is `parent`."""
    own = tuple(tokens)
    # Fixed-width fields: no two different (parent, tokens) pairs give the same bytes.
    body = pack(f"<{len(own)}q", *own)
    return PrefixKey(hashlib.sha256(parent + body).digest(), parent, own)


def chain_root(*identity: str) -> bytes:
    """Start of a chain. `identity`: all that the KV rows depend on besides the tokens (model, drafter, salt)."""
    digest = hashlib.sha256()
    for part in identity:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


class BlockPool:
    """Blocks by number, 0 .. num_blocks-1, with reference counts and an LRU of reusable ones."""

    def __init__(self, num_blocks: int, groups: Sequence[CacheGroup], *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.groups = tuple(groups)
        self.segment_size = segment_size(groups)
        self.prefix_caching = prefix_caching
        self._free: list[int] = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._key_of: list[PrefixKey | None] = [None] * num_blocks
        self._part_of: list[Part | None] = [None] * num_blocks
        self._block_of: dict[Part, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self.given_back = 0  # number of times since the start that a block became available

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out now, evicting cached ones if needed."""
        return len(self._free) + len(self._evictable)

    @property
    def usage(self) -> float:
        """Share of the pool that requests hold, 0 .. 1."""
        return 1.0 - self.available / self.num_blocks

    def allocate(self, count: int) -> list[int]:
        """`count` writable blocks, each held once.

        Raises CapacityError, and takes nothing, if fewer are available.
        """
        failpoints.hit("blocks.allocate")
        if count > self.available:
            raise CapacityError(f"{count} KV blocks wanted, {self.available} available")
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def distrust(self, keys: Sequence[PrefixKey]) -> None:
        """Remove the identity of all blocks of these segments, held or not, so that look-ups do not find them."""
        for key in keys:
            for number, group in enumerate(self.groups):
                for place in range(self.segment_size // group.block_size):
                    block = self._find(key, number, place)
                    if block is None:
                        continue
                    self._forget(block)
                    if self._references[block] == 0:
                        del self._evictable[block]
                        self._free.append(block)

    def _forget(self, block: int) -> None:
        part = self._part_of[block]
        if part is not None:
            del self._block_of[part]
            self._part_of[block] = self._key_of[block] = None

    def lookup(self, keys: Sequence[PrefixKey]) -> tuple[int, list[BlockTable]]:
        """The longest cached prefix of `keys` that every group can serve: its segments, and its blocks in each group.

        A group with a reach needs only the blocks that the next token reads. Adds no reference.
        """
        segments = len(keys)
        for number, group in enumerate(self.groups):
            if group.reach is None:
                per = self.segment_size // group.block_size
                segments = next(
                    (at for at in range(segments) if any(self._find(keys[at], number, i) is None for i in range(per))),
                    segments,
                )
        while (shorter := min(self._served(keys, segments, number) for number in range(len(self.groups)))) < segments:
            segments = shorter
        return segments, [self._table(keys, segments, number) for number in range(len(self.groups))]

    def _served(self, keys: Sequence[PrefixKey], segments: int, number: int) -> int:
        """The longest prefix up to `segments` that a group with a reach may still serve."""
        group = self.groups[number]
        if group.reach is None:
            return segments
        per, first = self.segment_size // group.block_size, group.first_needed(segments * self.segment_size)
        for block in range(segments * per - 1, first // group.block_size - 1, -1):
            if self._find(keys[block // per], number, block % per) is None:
                return block // per  # longer ones need this block, too
        return segments

    def _table(self, keys: Sequence[PrefixKey], segments: int, number: int) -> BlockTable:
        group = self.groups[number]
        per, first = self.segment_size // group.block_size, group.first_needed(segments * self.segment_size)
        found = (self._find(keys[i // per], number, i % per) for i in range(first // group.block_size, segments * per))
        return BlockTable(first, [block for block in found if block is not None])

    def _find(self, key: PrefixKey, group: int, index: int) -> int | None:
        block = self._block_of.get(Part(key.digest, group, index))
        if block is None:
            return None
        known = self._key_of[block]
        # Equal digests are not trusted: their inputs must match too.
        return block if known is key or known == key else None

    def names(self, key: PrefixKey) -> bool:
        """Whether a block is published with the digest of `key`, so that a look-up may find more than before."""
        return any(Part(key.digest, group, 0) in self._block_of for group in range(len(self.groups)))

    def hold(self, tables: Sequence[BlockTable]) -> None:
        """Add one reference to each block found by `lookup`."""
        for table in tables:
            for block in table.blocks:
                if self._references[block] == 0:
                    del self._evictable[block]
                self._references[block] += 1

    def release(self, tables: Sequence[BlockTable]) -> None:
        """Drop one reference to each block. Blocks with an identity stay findable until evicted."""
        for table in tables:
            self._release(table.blocks)

    def release_behind(self, tables: Sequence[BlockTable], computed: int) -> None:
        """Drop the blocks that no token after the first `computed` ones reads."""
        for group, table in zip(self.groups, tables, strict=True):
            first = group.first_needed(computed)
            if first > table.first:
                gone = (first - table.first) // group.block_size
                self._release(table.blocks[:gone])
                table.first, table.blocks = first, table.blocks[gone:]

    def _release(self, blocks: Sequence[int]) -> None:
        # The last block of a chain is evicted first: a prefix is worth more than its continuation.
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released more often than held"
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            self.given_back += 1
            if self._part_of[block] is None:
                self._free.append(block)
            else:
                self._evictable[block] = None

    def publish(self, tables: Sequence[BlockTable], segment: int, key: PrefixKey) -> bool:
        """Make the blocks of segment number `segment`, of committed tokens, findable. The first with a key keeps it.

        False if the digest belongs to other tokens: then the segments after this one must not be published either, as
        look-ups would take them for continuations of those tokens.
        """
        if not self.prefix_caching:
            return True
        named = True
        for block, part in self._parts(tables, segment, key):
            if self._part_of[block] is not None:
                continue
            owner = self._block_of.setdefault(part, block)
            if owner == block:
                self._part_of[block], self._key_of[block] = part, key
            named = named and self._key_of[owner] == key
        return named

    def _parts(self, tables: Sequence[BlockTable], segment: int, key: PrefixKey) -> Iterator[tuple[int, Part]]:
        """The blocks of a segment that are still held, and what they are of it."""
        for number, (group, table) in enumerate(zip(self.groups, tables, strict=True)):
            per = self.segment_size // group.block_size
            before = segment * per - table.first // group.block_size
            for index in range(max(0, -before), per):
                yield table.blocks[before + index], Part(key.digest, number, index)

    def reset(self) -> None:
        """Free all blocks, held ones too, and forget all identities; block tables become invalid."""
        self.given_back += self.num_blocks - self.available
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._references = [0] * self.num_blocks
        self._evictable.clear()
        self._forget_all()

    def reset_cache(self) -> None:
        """Forget every identity; blocks held stay held."""
        for block in list(self._evictable):
            self._free.append(block)
        self._evictable.clear()
        self._forget_all()

    def _forget_all(self) -> None:
        self._key_of = [None] * self.num_blocks
        self._part_of = [None] * self.num_blocks
        self._block_of.clear()

    def check(self, owners: Sequence[Sequence[BlockTable]]) -> None:
        """Check conservation (RELIABILITY, law 1). `owners` are the block tables of all live requests."""
        counts = [0] * self.num_blocks
        for tables in owners:
            for table in tables:
                for block in table.blocks:
                    counts[block] += 1
        held = sum(1 for count in counts if count)
        assert counts == self._references, "reference counts do not match the owners"
        assert len(self._free) + len(self._evictable) + held == self.num_blocks, "blocks lost or doubled"
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert all(counts[block] == 0 for block in (*self._free, *self._evictable)), "a reusable block is held"
        assert all(self._part_of[block] is None for block in self._free), "a free block has an identity"
        for part, block in self._block_of.items():
            key = self._key_of[block]
            assert self._part_of[block] == part, "the index names a block that is something else"
            assert key is not None, "the index names a block without identity"
            assert key.digest == part.digest, "a block's identity is that of another segment"
