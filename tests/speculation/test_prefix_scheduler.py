"""Algorithm 1 and its ranking: the walk is the search it stands for, on any curve."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_server.speculation.prefix_scheduler import Ranked, StepCost, admit, theta_by_count
from tests.speculation.costs import cost_model, early_stop, load


@given(
    st.lists(
        st.tuples(
            st.integers(0, 7), st.lists(st.sampled_from([0.3, 0.5, 0.9, 1.0, 0.0, np.nan]), min_size=7, max_size=7)
        ),
        max_size=9,
    ),
    st.integers(0, 40),
    st.sampled_from([None, 0.5, 0.05]),
    st.integers(0, 2**32 - 1),
)
def test_causal_walks_along_the_ranking(
    rows: list[tuple[int, list[float]]], room: int, floor: float | None, seed: int
) -> None:
    """Ties, NaNs and bumps in the curve among them: the same tokens as the first so many of all ranked at once."""
    generator = np.random.default_rng(seed)
    costs = cost_model(np.sort(generator.random(120) + 0.5).tolist(), draft=0.1)
    here, most = load(max(1, len(rows)), room), [limit for limit, _ in rows]
    survival = torch.tensor([block for _, block in rows]).view(len(rows), 7).cumprod(1)
    for slots in (sum(most), None):
        seconds = StepCost.of(costs, here, len(rows), slots)
        ranked = Ranked.of(survival, most)
        expected = ranked.first(early_stop(ranked.values, seconds, here, floor))
        room = seconds.room(here, floor)
        assert admit(survival.tolist(), most, here.sampling, room, seconds).lengths == expected


def test_theta_counts_what_the_step_is_expected_to_commit() -> None:
    theta = theta_by_count(np.array([0.5, 0.25]), np.array([1.0, 1.0, 2.0]), load(3))
    np.testing.assert_allclose(theta, [3.0, 3.5, 1.875])
