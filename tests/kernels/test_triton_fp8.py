"""Triton's kernels over an e4m3 cache, against the plain ones; the grid of shapes is test_triton_attention's."""

import pytest
import torch
from dspark_kernels import load
from dspark_kernels.reference import read_rows
from dspark_kernels.triton import attention
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.support import close, paged, triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

TRITON, REFERENCE = triton_kernels(), load("reference")
E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    runs=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 70)), min_size=1, max_size=5),
    block=st.sampled_from([1, 5, 16]),
    causal=st.booleans(),
    window=st.sampled_from([None, 3, 40]),
    dtype=st.sampled_from(DTYPES),
    least=st.sampled_from([16, 256]),
)
def test_ragged_attention(
    runs: list[tuple[int, int]],
    block: int,
    causal: bool,
    window: int | None,
    dtype: torch.dtype,
    least: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With keys split between programs and without."""
    monkeypatch.setattr(attention, "LEAST_KEYS", least)
    case = paged([(1, 2), *runs], groups=3, kv_heads=1, size=32, block=block, dtype=dtype, cache=E4M3)
    close(case.attend(TRITON, causal, window), case.attend(REFERENCE, causal, window))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_read_as_the_number_it_is(dtype: torch.dtype) -> None:
    """A query that sees one key gives its value back; a NaN among the values reaches its own column only."""
    case = paged([(1, 0)], groups=1, kv_heads=1, size=256, block=1, dtype=dtype, cache=E4M3)
    case.values.view(torch.uint8)[:] = torch.arange(256, dtype=torch.uint8)
    expected = torch.arange(256, dtype=torch.uint8).view(E4M3).to(dtype).unsqueeze(0)
    assert torch.equal(expected.isnan().nonzero(), torch.tensor([[0, 0x7F], [0, 0xFF]]))
    assert torch.equal(case.attend(TRITON, True, None).nan_to_num(999.0), expected.nan_to_num(999.0))
    case.keys.view(torch.uint8)[..., 0, 3] = 0x7F
    assert bool(case.attend(TRITON, True, None).isnan().all())


def written(kernels: object, rows: Tensor, kv_heads: int, size: int, normed: bool) -> tuple[Tensor, Tensor]:
    """The cache after k and v `rows` [N, 2 kv_heads size] are written to scattered slots, widened to float32."""
    noise = torch.Generator().manual_seed(1)
    slots = torch.randperm(4 * len(rows), generator=noise)[: len(rows)].int()
    positions = torch.randint(0, 50, (len(rows),), generator=noise, dtype=torch.int32)
    cos_sin = torch.randn(50, size, generator=noise)
    k_norm = torch.randn(size, generator=noise).to(rows.dtype) if normed else None
    keys, values = torch.zeros(len(rows), 2, 4, kv_heads, size, dtype=E4M3).unbind(1)
    kernels.rotary_kv_write(rows.clone(), positions, cos_sin, slots, keys, values, 0, None, k_norm, 1e-6)  # type: ignore[attr-defined]
    everything = torch.arange(4 * len(keys))
    return read_rows(keys, everything), read_rows(values, everything)


@settings(max_examples=12, deadline=None)
@given(
    kv_heads=st.sampled_from([1, 3]),
    size=st.sampled_from([16, 96]),
    normed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.01, 3.0, 400.0]),
)
def test_rows_are_rounded_and_clamped_as_the_plain_ones(
    kv_heads: int, size: int, normed: bool, dtype: torch.dtype, spread: float
) -> None:
    torch.manual_seed(size)
    rows = (torch.randn(5, 2 * kv_heads * size) * spread).to(dtype)
    (keys, values), (plain_keys, plain_values) = (
        written(kernels, rows, kv_heads, size, normed) for kernels in (TRITON, REFERENCE)
    )
    assert torch.equal(values, plain_values), "nothing is computed of them"
    # The last bit of a float32 may decide between two neighbours in e4m3: of few keys, and by one step.
    torch.testing.assert_close(keys, plain_keys, atol=2**-9, rtol=2**-3)
    assert (keys != plain_keys).float().mean() < 0.01
    assert values.abs().max() == 448 or spread < 400


def test_ties_go_to_the_even_and_what_is_too_large_is_clamped() -> None:
    """Every number of e4m3, those halfway between two, and those next to them."""
    codes = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    halfway = (codes[1:] + codes[:-1]) / 2
    around = [torch.nextafter(halfway, torch.tensor(end)) for end in (0.0, 1e9)]
    edges = torch.tensor([448.1, 463.9, 464.0, 480.0, 1e30, torch.inf, torch.nan, 2**-10, 2**-11, 1e-30, 1e-45, 0.0])
    numbers = torch.cat([codes, halfway, *around, edges])
    numbers = torch.cat([numbers, -numbers])
    rows = torch.zeros(len(numbers) // 16 + 1, 32)
    flat = torch.zeros(len(rows) * 16)
    flat[: len(numbers)] = numbers
    rows[:, 16:] = flat.view(-1, 16)
    ours, plain = (written(kernels, rows, 1, 16, False)[1] for kernels in (TRITON, REFERENCE))
    assert ours.isnan().sum() == 2
    assert torch.equal(ours.nan_to_num(999.0), plain.nan_to_num(999.0))
    assert torch.equal(ours.signbit() & (ours == 0), plain.signbit() & (plain == 0))
