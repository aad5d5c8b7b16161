"""Triton's attention against the plain one: on a GPU where there is one, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from dspark_kernels import load
from dspark_kernels.triton import attention
from dspark_kernels.triton.launch import H100
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.support import check_hidden_rows_stay_hidden, close, paged, triton_kernels

# The interpreter computes in NumPy, which warns where a GPU does not: of -inf * 0 in columns that are masked.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

TRITON, REFERENCE = triton_kernels(), load("reference")
RUNS = [(9, 33), (0, 5), (1, 0), (3, 14)]


SHAPES = [
    (3, 2, 64, torch.float32),
    (4, 1, 128, torch.bfloat16),
    (1, 2, 96, torch.float16),
    (2, 1, 256, torch.bfloat16),
    (3, 1, 512, torch.bfloat16),
    (17, 1, 40, torch.float32),
]
MASKS = [(True, None, None), (False, None, None), (True, 6, None), (False, 7, 1.5), (True, 1, 0.5)]
CACHES = [None, torch.float8_e4m3fn]


@pytest.mark.parametrize(
    ("groups", "kv_heads", "size", "dtype", "causal", "window", "softcap", "cache"),
    [  # every shape under every mask, and over either cache each of both: all pairs
        (*shape, *mask, CACHES[(row + column) % 2])
        for row, shape in enumerate(SHAPES)
        for column, mask in enumerate(MASKS)
    ],
)
def test_attention(
    groups: int,
    kv_heads: int,
    size: int,
    dtype: torch.dtype,
    causal: bool,
    window: int | None,
    softcap: float | None,
    cache: torch.dtype | None,
) -> None:
    case = paged(RUNS, groups=groups, kv_heads=kv_heads, size=size, block=8, dtype=dtype, cache=cache)
    close(case.attend(TRITON, causal, window, softcap), case.attend(REFERENCE, causal, window, softcap))


@settings(max_examples=15, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 70)), min_size=1, max_size=5),
    block=st.sampled_from([1, 5, 16]),
    causal=st.booleans(),
    window=st.sampled_from([None, 3, 40]),
)
def test_ragged_attention(runs: list[tuple[int, int]], block: int, causal: bool, window: int | None) -> None:
    case = paged([(1, 2), *runs], groups=3, kv_heads=1, size=32, block=block, dtype=torch.float32)
    close(case.attend(TRITON, causal, window), case.attend(REFERENCE, causal, window))
    later = replace(
        paged([(q, c + 1) for q, c in runs], groups=3, kv_heads=1, size=32, block=block, dtype=torch.float32),
        first_key=1,
    )
    close(later.attend(TRITON, causal, window), later.attend(REFERENCE, causal, window))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    runs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 200)), min_size=1, max_size=3),
    causal=st.booleans(),
    window=st.sampled_from([None, 50]),
)
def test_keys_split_between_programs(
    runs: list[tuple[int, int]], causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the runs is so short that most of its splits have no keys."""
    monkeypatch.setattr(attention, "LEAST_KEYS", 16)
    case = paged([(1, 150), (2, 0), *runs], groups=2, kv_heads=1, size=16, block=4, dtype=torch.bfloat16)
    longest = case.tables.shape[1] * case.keys.shape[1]
    assert attention.splits(len(runs) + 2, min(longest, (window or longest) + 10), H100.processors) > 1
    close(case.attend(TRITON, causal, window, 3.0), case.attend(REFERENCE, causal, window, 3.0))


def test_a_nan_reaches_its_own_rows_only_and_nothing_stale_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for least in (256, 16):
        monkeypatch.setattr(attention, "LEAST_KEYS", least)
        case = paged([(3, 10), (2, 170)], groups=3, kv_heads=1, size=32, block=16, dtype=torch.float32)
        expected = case.attend(TRITON, False, None)
        used = {
            int(case.tables[run, at // 16]) * 16 + at % 16 for run, end in enumerate((13, 172)) for at in range(end)
        }
        for slot in set(range(16 * len(case.keys))) - used:
            case.keys[slot // 16, slot % 16], case.values[slot // 16, slot % 16] = torch.nan, torch.inf
        assert torch.equal(case.attend(TRITON, False, None), expected)
        case.qkv[4] = torch.nan
        attended = case.attend(TRITON, True, None)
        assert attended.isnan().all(1).tolist() == [False, False, False, False, True]
        assert not attended[:4].isnan().any()


def test_splits_fill_the_gpu_but_never_for_a_few_keys() -> None:
    assert attention.splits(8, 8192, H100.processors) == 32
    assert attention.splits(8, 8192, 108) == 16
    assert attention.splits(64, 8192, H100.processors) == 4
    assert attention.splits(200, 8192, H100.processors) == 1
    assert attention.splits(1, 511, H100.processors) == 1
    assert attention.splits(1, 512, H100.processors) == 2
    assert attention.splits(0, 0, H100.processors) == 1


@pytest.mark.parametrize(
    ("dtype", "cache", "causal", "window", "value"),
    [
        (torch.float32, None, True, None, torch.nan),
        (torch.bfloat16, torch.float8_e4m3fn, True, 3, torch.nan),
        (torch.bfloat16, None, False, 7, torch.inf),
        (torch.float32, torch.float8_e4m3fn, False, 7, torch.nan),
    ],
)
def test_what_a_query_does_not_see_does_nothing_to_it(
    dtype: torch.dtype,
    cache: torch.dtype | None,
    causal: bool,
    window: int | None,
    value: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "LEAST_KEYS", 16)  # of two splits the second has the mask's edge
    case = paged([(2, 31)], groups=1, kv_heads=2, size=20, block=8, dtype=dtype, cache=cache)
    check_hidden_rows_stay_hidden(TRITON, case, causal, window, value)
    for first_key in (1, 19):
        check_hidden_rows_stay_hidden(TRITON, replace(case, first_key=first_key), causal, window, value)
