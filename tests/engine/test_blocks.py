"""The block pool keeps its conservation law through any sequence of operations, and finds only what was published."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dspark_server.engine import blocks, request
from dspark_server.engine.blocks import BlockKey, BlockPool, chain, chain_root
from dspark_server.errors import CapacityError

from .support import greedy, tiny_core

SIZE = 2
ROOT = chain_root("test")


class PoolMachine(RuleBasedStateMachine):
    """Owners hold chains of blocks over an alphabet of two tokens, so that prefixes often coincide."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, SIZE)
        self.owners: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}  # what each block held by an owner really contains, as a prefix

    @rule(tokens=st.lists(st.integers(0, 1), min_size=0, max_size=8))
    def admit(self, tokens: list[int]) -> None:
        keys: list[BlockKey] = []
        for start in range(0, len(tokens) - SIZE + 1, SIZE):
            keys.append(chain(keys[-1].digest if keys else ROOT, tokens[start : start + SIZE]))
        found = self.pool.lookup(keys)
        for index, block in enumerate(found):
            assert self.content[block] == tuple(tokens[: (index + 1) * SIZE]), "a hit on other content"
        self.pool.hold(found)
        try:
            fresh = self.pool.allocate(len(keys) - len(found) + 1)
        except CapacityError:
            self.pool.release(found)
            return
        table = found + fresh
        for index, key in enumerate(keys):
            if index >= len(found):
                self.content[table[index]] = tuple(tokens[: (index + 1) * SIZE])
                self.pool.publish(table[index], key)
        self.owners.append(table)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.owners:
            self.pool.release(self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1))))

    @rule()
    def reset(self) -> None:
        self.pool.reset_cache()

    @invariant()
    def conserved(self) -> None:
        self.pool.check(self.owners)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_forced_digest_collision_is_not_a_hit() -> None:
    pool = BlockPool(3, SIZE)
    first, second, third = pool.allocate(3)
    mine, other = BlockKey(b"same", ROOT, (1, 2)), BlockKey(b"same", ROOT, (3, 4))
    assert pool.publish(first, mine)
    assert pool.publish(second, mine), "the same content: what follows it may be published"
    assert not pool.publish(third, other)
    assert pool.lookup([mine]) == [first]
    assert pool.lookup([other]) == pool.lookup([BlockKey(b"same", b"another", (1, 2))]) == []


def test_prefixes_with_equal_digests_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that differ pass for one another; then what follows the one passes for what follows the other."""
    here, there, rest = [5, 6, 7, 8], [50, 60, 70, 80], [[9, 10, 11, 12, 13], [90, 100, 110, 120, 130]]
    asked = [here + rest[1], there + rest[0], here + rest[0], there + rest[1], here + rest[0], there + rest[0]]
    expected = [tiny_core().generate([prompt], greedy(12))[0] for prompt in asked]
    true, forced = blocks.chain, 0

    def forged(parent: bytes, tokens: Sequence[int]) -> BlockKey:
        nonlocal forced
        key = true(parent, tokens)
        if tuple(tokens) not in (tuple(here), tuple(there)):
            return key
        forced += 1
        return replace(key, digest=b"same" * 8)

    monkeypatch.setattr(request, "chain", forged)
    core = tiny_core()
    assert [core.generate([prompt], greedy(12))[0] for prompt in asked] == expected
    assert forced >= len(asked)
    assert core.loop.stats.prefix_hits > 0


def test_least_recently_used_goes_first_and_a_prefix_outlives_its_continuation() -> None:
    pool = BlockPool(3, SIZE)
    first, second = chain(ROOT, (1, 1)), chain(chain(ROOT, (1, 1)).digest, (1, 1))
    table = pool.allocate(2)
    pool.publish(table[0], first)
    pool.publish(table[1], second)
    pool.release(table)
    pool.allocate(2)  # the free block and one cached block
    assert pool.lookup([first, second]) == [table[0]]


def test_releasing_more_than_held_is_a_bug() -> None:
    pool = BlockPool(1, SIZE)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError):
        pool.release(blocks)


def test_salt_and_identity_separate_chains() -> None:
    assert chain_root("ab", "c") != chain_root("a", "bc")
    assert chain(chain_root("m", "x"), (1, 2)) != chain(chain_root("m", "y"), (1, 2))
