"""Block sizes of groups of caches, and the memory that they share."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_server.runtime.kv import KVPool
from dspark_server.runtime.paging import TILE, CacheGroup, CacheLayout, CacheRows, segment_size, tables_for

HEADS, SIZES, DTYPES = (
    st.integers(1, 8),
    st.sampled_from([1, 20, 64, 256]),
    st.sampled_from([None, torch.float32, torch.float8_e4m3fn]),
)
ROWS = st.builds(
    CacheRows, HEADS, SIZES, st.sampled_from([None, 1, 7, 1024]), st.booleans(), DTYPES, st.just(1)
) | st.builds(CacheRows, HEADS, SIZES, st.none(), st.booleans(), DTYPES, st.sampled_from([2, 4, 128]))
# DeepSeek-V4-Flash: 43 layers with a window, of them 21 with entries of 4 tokens and an indexer, 20 with those of 128.
RAW = {"values": False, "dtype": torch.float32}
FLASH = [
    *[CacheRows(1, 512, 128, values=False)] * 43,
    *[CacheRows(1, 512, values=False, every=4), CacheRows(1, 2048, 8, **RAW)] * 21,
    *[CacheRows(1, 128, values=False, every=4), CacheRows(1, 512, 8, **RAW)] * 21,
    *[CacheRows(1, 512, values=False, every=128), CacheRows(1, 1024, 128, **RAW)] * 20,
]


@given(st.lists(ROWS, min_size=1, max_size=6), st.lists(ROWS, max_size=3), st.integers(1, 64))
def test_no_layers_rows_share_a_byte(target: list[CacheRows], drafter: list[CacheRows], block_size: int) -> None:
    """Every layer writes its own number everywhere; all of them read it back."""
    layout = CacheLayout.of([target, drafter], block_size, 2)
    pool = KVPool(2, layout, torch.bfloat16)
    own, theirs = pool.layers(0), pool.layers(1)
    by_group: dict[int, list[torch.Tensor]] = {}
    for rows, cache in zip(target + drafter, own + theirs, strict=True):
        size = pool.groups[cache.group].block_size
        assert size % rows.every == 0
        assert cache.keys.shape == cache.values.shape == (2, size // rows.every, *rows[:2])
        assert pool.groups[cache.group].reach == rows.reach
        assert cache.keys.stride() == cache.values.stride()
        assert cache.keys.dtype == cache.values.dtype == (rows.dtype or torch.bfloat16)
        by_group.setdefault(cache.group, []).extend([cache.keys, cache.values][: 1 + rows.values])
    for tensors in by_group.values():
        for number, tensor in enumerate(tensors):
            tensor.fill_(number)
        assert all(bool((tensor.float() == number).all()) for number, tensor in enumerate(tensors))
    # A block belongs to one group at a time: what one group writes to block 0 leaves block 1 of the others alone.
    for tensors in by_group.values():
        for tensor in tensors:
            tensor[1].fill_(3)
    for number, tensors in by_group.items():
        for tensor in tensors:
            tensor[0].fill_(number)
    last = [tensor[1] for tensor in list(by_group.values())[-1]]  # of those filled last
    assert all(bool((rows.float() == 3).all()) for rows in last)


@pytest.mark.parametrize(
    ("layers", "sizes", "wasted", "segment"),
    [
        ([CacheRows(3, 64)] * 30, [16], 0.0, 16),  # SmolLM2-135M
        # Gemma4-12B with its drafter: 40 layers with a window, 8 without, 5 of the drafter.
        ([CacheRows(8, 256, 1024)] * 40 + [CacheRows(1, 512)] * 13, [48, 4], 0.03, 48),
        ([CacheRows(8, 64, 128)] * 12 + [CacheRows(8, 64)] * 12, [16, 16], 0.0, 16),  # every other layer has a window
        ([CacheRows(8, 128, 4096)] * 10 + [CacheRows(8, 128)] * 18, None, 0.1, 192),
        (FLASH, [128, 4, 8], 0.15, 128),
    ],
)
def test_blocks_waste_little_and_segments_are_short(
    layers: list[CacheRows], sizes: list[int] | None, wasted: float, segment: int
) -> None:
    layout = CacheLayout.of([layers], 16, 2)
    assert sizes is None or [group.block_size for group in layout.groups] == sizes
    for group in layout.groups:
        used = sum(
            sum(rows.parts(2)) * (group.block_size // rows.every) for rows in layers if rows.reach == group.reach
        )
        assert layout.block_bytes * (1 - wasted) <= used <= layout.block_bytes
    assert segment_size(layout.groups) <= segment
    assert all(TILE % group.block_size == 0 for group in layout.groups if group.reach is not None)


@given(st.integers(1, 9), st.integers(1, 20) | st.none(), st.sampled_from([1, 8]))
def test_a_window_moves_on_by_whole_blocks_and_keeps_what_is_read(size: int, reach: int | None, tile: int) -> None:
    group = CacheGroup(size, reach, tile)
    firsts = [group.first_needed(computed) for computed in range(60)]
    assert all(first % size == 0 and (reach is None or first % tile == 0) for first in firsts)
    assert all(before <= after for before, after in pairwise(firsts))
    for computed, first in enumerate(firsts):
        oldest = 0 if reach is None else max(0, computed - reach + 1)  # that the token at `computed` reads
        assert first <= oldest < first + group.step or reach is None
        assert computed - first < group.most_kept(computed + 1)
        (table,) = tables_for([group], iter(range(99)), computed, computed + 1)
        assert table.first == first
        assert table.first + size * len(table.blocks) > computed


def test_ranks_without_a_drafter_take_the_groups_of_the_one_that_has_it() -> None:
    """A pass's tables are sent by number of group: a drafter's own window may add one in between."""
    target = [CacheRows(2, 64, 1024)] * 3 + [CacheRows(2, 64)]
    first = CacheLayout.of([target, [CacheRows(2, 64, 512)]], 16, 2)
    other = CacheLayout.of([target, []], 16, 2, first.groups)
    assert other.groups == first.groups
    assert [place.group for place in other.places[0]] == [place.group for place in first.places[0]]
