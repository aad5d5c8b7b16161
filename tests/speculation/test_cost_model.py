"""The cost model: between measured sizes, beyond them, its convex minorant, and what serving teaches it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dspark_server.errors import ConfigError
from dspark_server.speculation.cost_model import CostModel, Profile
from dspark_server.speculation.curves import isotonic

PROFILE = Profile((1, 2, 4, 8), (1.0, 1.0, 2.0, 6.0), (1, 4), (0.5, 0.8), 0.02, 0.01)


def test_times_are_interpolated_and_extended_by_the_last_slope() -> None:
    cost_model = CostModel(PROFILE, 10, 8)
    np.testing.assert_allclose(cost_model.raw, [1, 1, 1, 1.5, 2, 3, 4, 5, 6, 7, 8])
    assert cost_model.draft(0) == 0.0
    assert cost_model.draft(2) == pytest.approx(0.6)
    assert cost_model.draft(8) == pytest.approx(1.2)
    assert cost_model.attention(context=100.0, pairs=500.0) == pytest.approx(7.0)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.floats(0.01, 10)), min_size=1, max_size=20),
    st.integers(0, 110),
    st.integers(0, 110),
)
def test_the_minorant_is_convex_below_and_the_greatest(rows: list[tuple[int, float]], start: int, drafts: int) -> None:
    sizes = tuple(np.cumsum([step for step, _ in rows]).tolist())
    cost_model = CostModel(Profile(sizes, tuple(seconds for _, seconds in rows), (1,), (0.1,), 0.0, 0.0), 100, 8)
    minorant = cost_model.convex(start, drafts)
    curve = cost_model.raw[min(start, 100) :][: len(minorant)]
    assert min(drafts, 100 - min(start, 100)) < len(minorant) <= max(2, 2 * drafts)
    assert (np.diff(cost_model.raw) >= -1e-12).all()
    assert (minorant <= curve + 1e-9).all()
    assert (np.diff(minorant, 2) >= -1e-9).all()
    # At every corner it touches the curve, so that no convex function in between is greater.
    corners = [0, *(np.nonzero(np.diff(minorant, 2) > 1e-7)[0] + 1).tolist(), len(curve) - 1]
    np.testing.assert_allclose(minorant[corners], curve[corners], atol=1e-6)


def test_a_step_sees_a_flat_curve_where_it_stands_on_one() -> None:
    """As of a mixture of experts: a pass rises until all experts are read, then costs the same for long."""
    cost_model = CostModel(Profile((1, 200, 2400, 4000), (1.0, 9.0, 9.0, 17.0), (1,), (0.1,), 0.0, 0.0), 4000, 8)
    assert cost_model.convex(1, 3999)[1000] == pytest.approx(1.0 + 1000 * 8 / 2399)
    np.testing.assert_allclose(cost_model.convex(1000, 3000)[:1400], 9.0)
    np.testing.assert_allclose(cost_model.convex(1, 128), 1.0 + 8 / 199 * np.arange(129))  # as steep as it is there


SIZES = (1, 2, 4, 8, 16, 32, 64)
SERVED = Profile(SIZES, tuple(0.010 + 0.001 * size for size in SIZES), (1, 2, 4, 8), (0.002,) * 4, 1e-6, 1e-7)


def serve(
    cost_model: CostModel, steps: int, tokens: int = 4, requests: int = 2, factor: float = 1.0, draft: float = 1.0
) -> None:
    """Steps that take `factor` times what `SERVED` says, drafts `draft` times that."""
    verify = SERVED.verify[SIZES.index(tokens)] + 1e-6 * 100 + 1e-7 * 400
    for _ in range(steps):
        cost_model.observe(
            tokens=tokens,
            context=100.0,
            pairs=400.0,
            verify=factor * verify,
            requests=requests,
            draft=factor * draft * 0.002,
            overhead=factor * 0.001,
        )


@pytest.mark.parametrize("factor", [8.0, 1 / 8])
def test_a_lasting_shift_is_learnt_in_either_direction(factor: float) -> None:
    """In 30 seconds of steps of whatever length, and of sizes never tried, and of attention."""
    cost_model, right = CostModel(SERVED, 64, 8), CostModel(SERVED, 64, 8)
    serve(cost_model, int(30 / (0.016 * factor)), factor=factor)
    np.testing.assert_allclose(cost_model.raw[4] / right.raw[4], factor, rtol=0.03)
    np.testing.assert_allclose(cost_model.raw[1:] / right.raw[1:], factor, rtol=0.4)
    assert cost_model.draft(2) == pytest.approx(factor * 0.002, rel=0.03)
    assert cost_model.draft(8) == pytest.approx(factor * 0.002, rel=0.4)
    assert cost_model.attention(100.0, 400.0) == pytest.approx(factor * right.attention(100.0, 400.0), rel=1.1)
    assert cost_model.overhead == pytest.approx(factor * 0.001, rel=0.03)
    assert cost_model.slowdown == pytest.approx(factor, rel=0.03)
    assert (np.diff(cost_model.raw) >= 0).all()


def test_a_change_after_long_service_is_learnt_as_soon() -> None:
    cost_model = CostModel(SERVED, 64, 8)
    serve(cost_model, 4000)
    serve(cost_model, 240, factor=8.0)  # 30 seconds
    assert cost_model.raw[4] == pytest.approx(8 * SERVED.verify[2], rel=0.03)
    assert cost_model.draft(2) == pytest.approx(8 * 0.002, rel=0.03)


def test_a_cost_measured_lately_outweighs_those_that_were_not() -> None:
    """More work never costs less: where that moves costs, those that were not measured lately move."""
    cost_model = CostModel(SERVED, 64, 8)
    serve(cost_model, 2000, tokens=64, requests=0)
    serve(cost_model, 8, tokens=1, requests=0, factor=16)
    assert cost_model.raw[1] > 12.5 * SERVED.verify[0]  # 10.8 if all were adjusted alike
    serve(cost_model, 22, tokens=1, requests=0, factor=16)
    assert cost_model.raw[1] == pytest.approx(16 * SERVED.verify[0], rel=0.02)
    assert cost_model.raw[64] >= cost_model.raw[1]


def test_one_step_that_was_held_up_says_nothing() -> None:
    cost_model = CostModel(SERVED, 64, 8)
    serve(cost_model, 300)
    before, draft = cost_model.raw.copy(), cost_model.draft(2)
    for _ in range(10):
        serve(cost_model, 1, factor=10_000)
        serve(cost_model, 20)
    np.testing.assert_allclose(cost_model.raw, before, rtol=1e-6)
    assert cost_model.draft(2) == pytest.approx(draft)
    assert cost_model.overhead == pytest.approx(0.001)


@pytest.mark.parametrize("factor", [8.0, 1 / 8])
def test_few_drafts_tell_what_a_draft_costs(factor: float) -> None:
    """One where it is cheaper than believed, three where it is dearer, after a minute without any."""
    cost_model = CostModel(SERVED, 64, 8)
    serve(cost_model, 4000, requests=0)
    serve(cost_model, 1 if factor < 1 else 3, draft=factor)
    assert cost_model.draft(2) == pytest.approx(factor * 0.002, rel=0.4)
    assert cost_model.raw[4] == pytest.approx(0.014, rel=0.05)  # which is no word about passes


def test_what_drafts_add_to_the_host_is_a_part_of_their_cost() -> None:
    """Rules of sampling take longer over a block: learnt beside steps without drafts, and forgotten with the rules."""
    cost_model = CostModel(SERVED, 64, 8)

    def steps(count: int, extra: float) -> None:
        for _ in range(count):
            for requests in (0, 2, 2, 2):
                cost_model.observe(
                    tokens=4, context=0.0, pairs=0.0, verify=SERVED.verify[2], requests=requests,
                    draft=0.002 if requests else 0.0, overhead=0.001 + requests * extra,
                )  # fmt: skip

    steps(50, 4e-4)
    assert cost_model.overhead == pytest.approx(0.001, rel=0.01)
    assert cost_model.draft(2) == pytest.approx(0.002 + 2 * 4e-4, rel=0.02)
    assert cost_model.draft(0) == 0.0
    steps(50, 0.0)
    assert cost_model.draft(2) == pytest.approx(0.002, rel=0.02)
    serve(
        cost_model, 400, requests=2, factor=2.0
    )  # a busier engine in which every step drafts: nothing to compare with
    assert cost_model.overhead == pytest.approx(0.002, rel=0.05)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 99),
            st.integers(0, 99),
            *[st.floats(allow_nan=True, allow_infinity=True)] * 3,
            st.floats(0, 1e9),
        ),
        max_size=30,
    )
)
@example([(0, 0, 1.0, 0.0, 8.9e307, 0.0)] * 2)
@example([(0, 0, 5e-324, 0.0, 0.0, 1e8)])
@example([(0, 0, 1.0, 0.0, 1e308, 0.0), (0, 0, 1.0, 0.0, 1.1e308, 0.0)])
def test_no_times_poison_the_tables(steps: list[tuple[int, int, float, float, float, float]]) -> None:
    cost_model = CostModel(SERVED, 64, 8)
    for tokens, requests, verify, draft, overhead, context in steps:
        cost_model.observe(
            tokens=tokens,
            context=context,
            pairs=context,
            verify=verify,
            requests=requests,
            draft=draft,
            overhead=overhead,
        )
        assert np.isfinite(cost_model.raw).all()
        assert (cost_model.raw > 0).all()
        assert (np.diff(cost_model.raw) >= -1e-12 * cost_model.raw[-1]).all()
        costs = [cost_model.draft(count) for count in range(9)]
        assert costs == sorted(costs)
        assert 0 < costs[1] < np.inf
        assert 0 <= cost_model.overhead < np.inf
        assert 0 < cost_model.slowdown < np.inf
        assert np.isfinite(cost_model.convex(4, 16)).all()


def test_times_that_no_clock_can_have_measured_say_nothing() -> None:
    cost_model = CostModel(SERVED, 64, 8)
    serve(cost_model, 100)
    before = cost_model.raw.copy()
    for wrong in (float("nan"), -1.0, 0.0, float("inf")):
        serve(cost_model, 50, factor=wrong)
    np.testing.assert_array_equal(cost_model.raw, before)
    assert cost_model.slowdown == pytest.approx(1.0)


def test_slow_steps_are_said_once_at_either_end(caplog: pytest.LogCaptureFixture) -> None:
    cost_model = CostModel(SERVED, 64, 8)
    serve(cost_model, 500)
    serve(cost_model, 1, factor=5000)  # held up for a minute
    serve(cost_model, 30, factor=8)  # four seconds
    assert not cost_model.slow
    serve(cost_model, 30, factor=1)
    assert not caplog.records
    for _ in range(3):
        serve(cost_model, 200, factor=8)  # half a minute
        assert cost_model.slow
        serve(cost_model, 200, factor=4)  # better, but not over
        assert cost_model.slow
    (line,) = caplog.messages
    assert "times what the cost profile says" in line
    serve(cost_model, 3000)
    assert not cost_model.slow
    assert len(caplog.messages) == 2
    assert "no longer slow" in caplog.messages[1]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20), st.booleans(), st.integers(0, 2**32 - 1))
def test_isotonic_is_the_nearest_rising_curve(values: list[float], weighted: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights = generator.uniform(0.1, 10, len(values)) if weighted else np.ones(len(values))
    found = isotonic(values, weights if weighted else None)
    assert (np.diff(found) >= 0).all()
    assert (weights * found).sum() == pytest.approx((weights * values).sum())
    for rising in np.sort(generator.uniform(0, 100, (20, len(values)))):
        assert (weights * (values - found) * (rising - found)).sum() <= 1e-6


def test_one_time_too_high_does_not_lift_all_larger_sizes() -> None:
    profile = replace(SERVED, verify=(0.011, 0.096, *SERVED.verify[2:]))
    cost_model = CostModel(profile, 64, 8)
    assert cost_model.raw[64] == SERVED.verify[-1]
    assert cost_model.raw[2] < 0.096 / 2


def test_a_profile_survives_the_disk_and_a_damaged_one_says_so(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    PROFILE.save(path)
    assert Profile.load(path) == PROFILE
    for text in ("", "[]", '{"tokens": [1]}', path.read_text().replace("6.0", "-6.0"), path.read_text()[:-9]):
        path.write_text(text)
        with pytest.raises(ConfigError):
            Profile.load(path)
