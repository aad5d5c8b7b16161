"""The block pool keeps its conservation law through any sequence of operations, and finds only what was published."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dspark_server.engine import blocks, request
from dspark_server.engine.blocks import BlockPool, Part, PrefixKey, chain, chain_root
from dspark_server.errors import CapacityError
from dspark_server.runtime.paging import BlockTable, CacheGroup

from .support import greedy, tiny_core

SIZE = 2
ONE = (CacheGroup(SIZE),)
ROOT = chain_root("test")


class Owner:
    """A sequence as far as its rows are computed, its tables, and its published segments."""

    def __init__(self, tokens: list[int], tables: list[BlockTable], segments: int, computed: int) -> None:
        self.tokens = tokens
        self.tables = tables
        self.published = segments
        self.computed = computed


class PoolMachine(RuleBasedStateMachine):
    """Owners hold sequences over an alphabet of two tokens, so that prefixes often coincide."""

    groups: Sequence[CacheGroup] = ONE

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, self.groups)
        self.owners: list[Owner] = []
        # What each block that was filled really contains: its group, and all tokens up to its end.
        self.content: dict[int, tuple[int, tuple[int, ...]]] = {}

    def keys(self, tokens: list[int]) -> list[PrefixKey]:
        size, keys = self.pool.segment_size, list[PrefixKey]()
        for start in range(0, len(tokens) - size + 1, size):
            keys.append(chain(keys[-1].digest if keys else ROOT, tokens[start : start + size]))
        return keys

    @rule(tokens=st.lists(st.integers(0, 1), max_size=12))
    def admit(self, tokens: list[int]) -> None:
        keys = self.keys(tokens)
        segments, tables = self.pool.lookup(keys)
        computed = segments * self.pool.segment_size
        for number, (group, table) in enumerate(zip(self.groups, tables, strict=True)):
            assert table.first + len(table.blocks) * group.block_size == computed, "a row is missing"
            assert table.first <= max(0, computed - (group.reach or computed) + 1), "what the next token reads is gone"
            for index, block in enumerate(table.blocks):
                end = table.first + (index + 1) * group.block_size
                assert self.content[block] == (number, tuple(tokens[:end])), "a hit on other content"
        assert segments == self.longest(keys), "a longer prefix is cached"
        self.pool.hold(tables)
        self.owners.append(Owner(tokens, tables, segments, computed))

    def longest(self, keys: list[PrefixKey]) -> int:
        """The longest prefix of which every group has what the next token reads, tried one by one."""
        published = set(self.pool._block_of)
        for segments in range(len(keys), 0, -1):
            end = segments * self.pool.segment_size
            if all(
                Part(keys[at // self.pool.segment_size].digest, number, at % self.pool.segment_size // group.block_size)
                in published
                for number, group in enumerate(self.groups)
                for at in range(group.first_needed(end), end)
            ):
                return segments
        return 0

    @rule(data=st.data(), count=st.integers(1, 7))
    def compute(self, data: st.DataObject, count: int) -> None:
        """A pass over some of an owner's tokens: blocks behind a window go, others come, segments are published."""
        if not self.owners:
            return
        owner = data.draw(st.sampled_from(self.owners))
        self.pool.release_behind(owner.tables, owner.computed)
        end = min(len(owner.tokens), owner.computed + count)
        for number, (group, table) in enumerate(zip(self.groups, owner.tables, strict=True)):
            assert table.first == group.first_needed(owner.computed)
            try:
                fresh = self.pool.allocate(group.blocks_between(table.first, end) - len(table.blocks))
            except CapacityError:
                return
            table.blocks += fresh
            for index in range((owner.computed - table.first) // group.block_size, len(table.blocks)):
                upto = table.first + (index + 1) * group.block_size
                self.content[table.blocks[index]] = number, tuple(owner.tokens[: min(upto, end)])
        owner.computed = end
        for segment, key in list(enumerate(self.keys(owner.tokens[:end])))[owner.published :]:
            assert self.pool.publish(owner.tables, segment, key)
            owner.published = segment + 1

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.owners:
            owner = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
            self.pool.release(owner.tables)

    @rule()
    def reset(self) -> None:
        self.pool.reset_cache()

    @invariant()
    def conserved(self) -> None:
        self.pool.check([owner.tables for owner in self.owners])


class WindowedPool(PoolMachine):
    groups = CacheGroup(4), CacheGroup(2, reach=3)


class TwoWindows(PoolMachine):
    """No layer sees everything; the blocks of both groups end together every sixth token only."""

    groups = CacheGroup(3, reach=5), CacheGroup(2, reach=1)


LONG = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool, TestWindowedPool, TestTwoWindows = PoolMachine.TestCase, WindowedPool.TestCase, TwoWindows.TestCase
TestPool.settings = TestWindowedPool.settings = TestTwoWindows.settings = LONG


def test_a_forced_digest_collision_is_not_a_hit() -> None:
    pool = BlockPool(3, ONE)
    first, second, third = ([BlockTable(0, [block])] for block in pool.allocate(3))
    mine, other = PrefixKey(b"same", ROOT, (1, 2)), PrefixKey(b"same", ROOT, (3, 4))
    assert pool.publish(first, 0, mine)
    assert pool.publish(second, 0, mine), "the same content: what follows it may be published"
    assert not pool.publish(third, 0, other)
    assert pool.lookup([mine]) == (1, first)
    assert pool.lookup([other])[0] == pool.lookup([PrefixKey(b"same", b"another", (1, 2))])[0] == 0


def test_prefixes_with_equal_digests_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that differ pass for one another; then what follows the one passes for what follows the other."""
    here, there, rest = [5, 6, 7, 8], [50, 60, 70, 80], [[9, 10, 11, 12, 13], [90, 100, 110, 120, 130]]
    asked = [here + rest[1], there + rest[0], here + rest[0], there + rest[1], here + rest[0], there + rest[0]]
    expected = [tiny_core().generate([prompt], greedy(12))[0] for prompt in asked]
    true, forced = blocks.chain, 0

    def forged(parent: bytes, tokens: Sequence[int]) -> PrefixKey:
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
    pool = BlockPool(3, ONE)
    first, second = chain(ROOT, (1, 1)), chain(chain(ROOT, (1, 1)).digest, (1, 1))
    tables = [BlockTable(0, pool.allocate(2))]
    pool.publish(tables, 0, first)
    pool.publish(tables, 1, second)
    pool.release(tables)
    pool.allocate(2)  # the free block and one cached block
    assert pool.lookup([first, second]) == (1, [BlockTable(0, tables[0].blocks[:1])])


def test_a_hit_needs_the_windows_tail() -> None:
    """The blocks that the next token reads, in the group with a window: without them a shorter prefix is the hit."""
    pool, tokens = BlockPool(6, (CacheGroup(2), CacheGroup(2, reach=3))), (1, 2, 3, 4, 5, 6)
    keys: list[PrefixKey] = []
    for start in (0, 2, 4):
        keys.append(chain(keys[-1].digest if keys else ROOT, tokens[start : start + 2]))
    tables = [BlockTable(0, pool.allocate(3)), BlockTable(0, pool.allocate(3))]
    for segment, key in enumerate(keys):
        pool.publish(tables, segment, key)
    full, near = (table.blocks for table in tables)
    assert pool.lookup(keys) == (3, [BlockTable(0, full), BlockTable(4, near[2:])])
    pool.release([BlockTable(4, near[2:])])  # the least recently used
    pool.allocate(1)
    assert pool.lookup(keys) == (2, [BlockTable(0, full[:2]), BlockTable(2, near[1:2])])


def test_releasing_more_than_held_is_a_bug() -> None:
    pool = BlockPool(1, ONE)
    tables = [BlockTable(0, pool.allocate(1))]
    pool.release(tables)
    with pytest.raises(AssertionError):
        pool.release(tables)


def test_salt_and_identity_separate_chains() -> None:
    assert chain_root("ab", "c") != chain_root("a", "bc")
    assert chain(chain_root("m", "x"), (1, 2)) != chain(chain_root("m", "y"), (1, 2))
