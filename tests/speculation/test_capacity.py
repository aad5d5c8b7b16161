"""The cost model: between measured sizes, beyond them, its convex minorant, and what serving teaches it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_server.errors import ConfigError
from dspark_server.speculation.capacity import Capacity, Profile

PROFILE = Profile((1, 2, 4, 8), (1.0, 1.0, 2.0, 6.0), (1, 4), (0.5, 0.8), 0.02, 0.01)


def test_times_are_interpolated_and_extended_by_the_last_slope() -> None:
    capacity = Capacity(PROFILE, 10, 8)
    np.testing.assert_allclose(capacity.raw, [1, 1, 1, 1.5, 2, 3, 4, 5, 6, 7, 8])
    assert capacity.draft(0) == 0.0
    assert capacity.draft(2) == pytest.approx(0.6)
    assert capacity.draft(8) == pytest.approx(1.2)
    assert capacity.attention(context=100.0, pairs=500.0) == pytest.approx(7.0)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.floats(0.01, 10)), min_size=1, max_size=20),
    st.integers(0, 110),
    st.integers(0, 110),
)
def test_the_minorant_is_convex_below_and_the_greatest(rows: list[tuple[int, float]], start: int, drafts: int) -> None:
    sizes = tuple(np.cumsum([step for step, _ in rows]).tolist())
    capacity = Capacity(Profile(sizes, tuple(seconds for _, seconds in rows), (1,), (0.1,), 0.0, 0.0), 100, 8)
    minorant = capacity.convex(start, drafts)
    curve = capacity.raw[min(start, 100) :][: len(minorant)]
    assert min(drafts, 100 - min(start, 100)) < len(minorant) <= max(2, 2 * drafts)
    assert (np.diff(capacity.raw) >= -1e-12).all()
    assert (minorant <= curve + 1e-9).all()
    assert (np.diff(minorant, 2) >= -1e-9).all()
    # At every corner it touches the curve, so that no convex function in between is greater.
    corners = [0, *(np.nonzero(np.diff(minorant, 2) > 1e-7)[0] + 1).tolist(), len(curve) - 1]
    np.testing.assert_allclose(minorant[corners], curve[corners], atol=1e-6)


def test_a_step_sees_a_flat_curve_where_it_stands_on_one() -> None:
    """As of a mixture of experts: a pass rises until all experts are read, then costs the same for long."""
    capacity = Capacity(Profile((1, 200, 2400, 4000), (1.0, 9.0, 9.0, 17.0), (1,), (0.1,), 0.0, 0.0), 4000, 8)
    assert capacity.convex(1, 3999)[1000] == pytest.approx(1.0 + 1000 * 8 / 2399)
    np.testing.assert_allclose(capacity.convex(1000, 3000)[:1400], 9.0)
    np.testing.assert_allclose(capacity.convex(1, 128), 1.0 + 8 / 199 * np.arange(129))  # as steep as it is there


def test_serving_moves_the_table_slowly_towards_what_steps_take() -> None:
    capacity = Capacity(PROFILE, 10, 8)

    def step(seconds: float) -> None:
        reading = capacity.attention(100.0, 400.0)
        capacity.observe(
            tokens=4, context=100.0, pairs=400.0, verify=seconds + reading, requests=2, draft=0.9, overhead=0.1
        )

    step(3.0)
    assert capacity.raw[4] == pytest.approx(2.0)  # not by one step
    before = capacity.raw / capacity.raw[4]
    for _ in range(2000):
        step(3.0)
    assert capacity.raw[4] == pytest.approx(3.0, rel=0.02)
    assert capacity.draft(2) == pytest.approx(0.9, rel=0.02)
    assert capacity.overhead == pytest.approx(0.1)
    assert (np.diff(capacity.raw) >= 0).all()
    # Most of it was the machine, the rest that size: the others have followed some way.
    shape = capacity.raw / capacity.raw[4] / before
    assert shape[1] == pytest.approx(shape[8])
    assert 0.85 < shape[1] < 0.97
    before = capacity.raw.copy()
    for _ in range(100):
        step(100.0)  # a machine that slept
    np.testing.assert_array_equal(capacity.raw, before)


def test_a_profile_survives_the_disk_and_a_damaged_one_says_so(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    PROFILE.save(path)
    assert Profile.load(path) == PROFILE
    for text in ("", "[]", '{"tokens": [1]}', path.read_text().replace("6.0", "-6.0"), path.read_text()[:-9]):
        path.write_text(text)
        with pytest.raises(ConfigError):
            Profile.load(path)
