"""Selection: what a policy may choose, and what it must not look at."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_server.errors import ConfigError
from dspark_server.speculation.selection import build_selection

limits = st.lists(st.integers(0, 7), max_size=12)


@given(limits, st.integers(0, 60))
def test_fixed_takes_whole_blocks_within_the_room_oldest_first(limits: list[int], room: int) -> None:
    policy = build_selection("fixed")
    chosen = policy.drafting(limits, room)
    taken = [limits[index] for index in chosen]
    assert chosen == sorted(set(chosen))
    assert all(limit > 0 for limit in taken)
    assert sum(taken) <= room
    assert policy.lengths(torch.rand(len(taken), 7), taken, room) == taken
    # Whoever was left out did not fit beside those before it.
    for index, limit in enumerate(limits):
        if index not in chosen and limit > 0:
            assert limit > room - sum(limits[earlier] for earlier in chosen if earlier < index)


@given(limits, st.integers(0, 60), st.floats(0, 1), st.floats(0, 1))
def test_fixed_does_not_look_at_the_confidences(limits: list[int], room: int, one: float, other: float) -> None:
    policy = build_selection("fixed")
    taken = [limits[index] for index in policy.drafting(limits, room)]
    shape = (len(taken), 7)
    assert policy.lengths(torch.full(shape, one), taken, room) == policy.lengths(torch.full(shape, other), taken, room)


@given(limits, st.integers(0, 60))
def test_none_drafts_for_nobody(limits: list[int], room: int) -> None:
    policy = build_selection("none")
    assert policy.drafting(limits, room) == []
    assert policy.lengths(torch.ones(len(limits), 7), limits, room) == [0] * len(limits)


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'greedy'.*fixed"):
        build_selection("greedy")
