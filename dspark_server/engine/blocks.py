"""The block pool and the prefix cache: references to KV blocks, and the prefixes by which they are found again.

A block is *free*, *held* (referenced by one or more requests), or *cached* (referenced by none, its content known and
evictable, least recently used first). free + cached + held == total, always. Only full blocks of committed tokens get
an identity, so a later request never finds an unverified token.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from struct import pack

from dspark_server import failpoints
from dspark_server.errors import CapacityError


@dataclass(frozen=True)
class BlockKey:
    """Identity of a full block: a SHA-256 chain over everything before it, and the inputs of the last digest."""

    digest: bytes
    parent: bytes
    tokens: tuple[int, ...]


def chain(parent: bytes, tokens: Sequence[int]) -> BlockKey:
    """Key of the block that holds `tokens` after the prefix whose digest is `parent`."""
    own = tuple(tokens)
    # Fixed-width fields: no two different (parent, tokens) pairs give the same bytes.
    body = pack(f"<{len(own)}q", *own)
    return BlockKey(hashlib.sha256(parent + body).digest(), parent, own)


def chain_root(*identity: str) -> bytes:
    """Start of a chain. `identity`: all that the KV rows depend on besides the tokens (model, drafter, salt)."""
    digest = hashlib.sha256()
    for part in identity:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


class BlockPool:
    """Blocks by number, 0 .. num_blocks-1, with reference counts and an LRU of reusable ones."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._free: list[int] = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._key_of: list[BlockKey | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
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

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens take."""
        return -(-tokens // self.block_size)

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

    def distrust(self, blocks: Sequence[int]) -> None:
        """Remove the identity of held blocks, so that look-ups do not find them."""
        for block in blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._block_of[key.digest]
            self._key_of[block] = None

    def lookup(self, keys: Sequence[BlockKey]) -> list[int]:
        """Blocks that hold the longest cached prefix of `keys`; adds no reference."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key.digest)
            if block is None:
                break
            known = self._key_of[block]
            # Equal digests are not trusted: their inputs must match too.
            if known is not key and known != key:
                break
            found.append(block)
        return found

    def names(self, key: BlockKey) -> bool:
        """Whether a block is published with the digest of `key`, so that a look-up may find more than before."""
        return key.digest in self._block_of

    def hold(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block found by `lookup`."""
        for block in blocks:
            if self._references[block] == 0:
                del self._evictable[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each. Blocks with an identity stay findable until evicted."""
        # The last block of a chain is evicted first: a prefix is worth more than its continuation.
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released more often than held"
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            self.given_back += 1
            if self._key_of[block] is None:
                self._free.append(block)
            else:
                self._evictable[block] = None

    def publish(self, block: int, key: BlockKey) -> bool:
        """Make a full block of committed tokens findable. The first block with a key keeps it.

        False if the digest belongs to other tokens: then the blocks after this one must not be published either, as
        look-ups would take them for continuations of those tokens.
        """
        if not self.prefix_caching or self._key_of[block] is not None:
            return True
        named = self._block_of.setdefault(key.digest, block)
        if named == block:
            self._key_of[block] = key
        return self._key_of[named] == key

    def reset(self) -> None:
        """Free all blocks, held ones too, and forget all identities; block tables become invalid."""
        self.given_back += self.num_blocks - self.available
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._references = [0] * self.num_blocks
        self._evictable.clear()
        self._key_of = [None] * self.num_blocks
        self._block_of.clear()

    def reset_cache(self) -> None:
        """Forget every identity; blocks held stay held."""
        for block in list(self._evictable):
            self._free.append(block)
        self._evictable.clear()
        self._key_of = [None] * self.num_blocks
        self._block_of.clear()

    def check(self, owners: Sequence[Sequence[int]]) -> None:
        """Check conservation (RELIABILITY, law 1). `owners` are the block tables of all live requests."""
        counts = [0] * self.num_blocks
        for table in owners:
            for block in table:
                counts[block] += 1
        held = sum(1 for count in counts if count)
        assert counts == self._references, "reference counts do not match the owners"
        assert len(self._free) + len(self._evictable) + held == self.num_blocks, "blocks lost or doubled"
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert all(counts[block] == 0 for block in (*self._free, *self._evictable)), "a reusable block is held"
        assert all(self._key_of[block] is None for block in self._free), "a free block has an identity"
        for digest, block in self._block_of.items():
            key = self._key_of[block]
            assert key is not None, "the index names a block without identity"
            assert key.digest == digest, "the index names a block that is something else"
