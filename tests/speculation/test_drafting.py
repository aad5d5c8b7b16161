"""Who drafts at all: where it pays, by each request's record, and how often the others try."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_server.speculation.cost_model import CostModel, Profile
from dspark_server.speculation.drafting import (
    OPTIMISM,
    PROBING,
    Candidate,
    ProbeBudget,
    choose_drafting,
    predicted_thetas,
)
from dspark_server.speculation.prefix_scheduler import Load, Ranked, StepCost, theta_by_count
from dspark_server.speculation.selection import build_selection
from tests.speculation.costs import cost_model, early_stop, load


def test_nobody_drafts_where_verification_costs_what_decoding_does() -> None:
    """Per-token cost, no fixed part: a draft token is worth less than an anchor, and its draft is not free."""
    costs = cost_model([0.1 * tokens for tokens in range(1, 100)], draft=0.02)
    rows = [Candidate(4, 0.9, probe_due=True)] * 6
    assert choose_drafting(rows, load(6), costs).drafting == []


def test_everybody_drafts_on_an_idle_machine() -> None:
    costs = cost_model([1.0 + 0.001 * tokens for tokens in range(1, 100)], draft=0.1)
    choice = choose_drafting([Candidate(4, 0.6)] * 3, load(3), costs)
    assert choice.drafting == [0, 1, 2]
    assert not choice.probing


def test_copies_are_made_where_a_first_token_could_pay() -> None:
    rows = [Candidate(12, 0.9, copies=True), Candidate(12, 0.3, copies=True), Candidate(4, 0.0)]
    idle, busy = (cost_model([1.0 + each * n for n in range(1, 99)], draft=9.0) for each in (0.01, 0.2))
    assert choose_drafting(rows, load(3), idle).drafting == [0, 1]
    assert choose_drafting(rows, load(3), busy).drafting == [0]
    assert choose_drafting(rows, load(3), cost_model([0.1 * n for n in range(1, 99)], draft=9.0)).drafting == []


def test_those_with_the_better_record_draft_first() -> None:
    costs = cost_model([1.0 + 0.12 * tokens for tokens in range(1, 100)], draft=0.25)
    rows = [Candidate(4, rate) for rate in (0.05, 0.9, 0.1, 0.95)]
    assert choose_drafting(rows, load(4), costs).drafting == [1, 3]


def test_a_poor_record_is_probed_again_if_load_allows() -> None:
    poor = Candidate(4, 0.05, probe_due=True)
    choice = choose_drafting([poor], load(1), cost_model([1.0 + 0.05 * n for n in range(1, 99)], draft=0.3))
    assert choice.drafting == [0]
    assert choice.probing == {0}
    waiting = Candidate(4, 0.05)
    assert (
        choose_drafting([waiting], load(1), cost_model([1.0 + 0.05 * n for n in range(1, 99)], draft=0.3)).drafting
        == []
    )
    assert choose_drafting([poor], load(1), cost_model([1.0 * n for n in range(1, 99)], draft=0.3)).drafting == []


@pytest.mark.parametrize("policy", ["causal", "lagged"])
def test_probes_take_their_share_of_the_time_and_no_more(policy: str) -> None:
    """A crowd that is always due, on a machine where no draft is known to pay: none waits for ever either."""
    costs = cost_model([1.0 + 0.02 * n for n in range(1, 999)], draft=0.05)
    chosen, crowd, here = build_selection(policy, costs), [Candidate(4, 0.0, probe_due=True)] * 8, load(8)
    assert len(choose_drafting(crowd, here, costs).probing) == 8
    spent, probes = 0.0, 0
    for _ in range(1000):
        choice = chosen.drafting(crowd, here)
        assert choice.probing == set(choice.drafting)
        spent += costs.draft(len(choice.probing))
        probes += len(choice.probing)
    assert 0.5 * PROBING < spent / (1000 * costs.raw[8]) <= PROBING
    assert probes > 100


def test_a_probe_is_saved_for_and_no_more_than_those_due_need() -> None:
    budget = ProbeBudget(share=0.1)
    probes = []
    for _ in range(6):
        probes.append(budget.afford(1, 1.0, lambda n: 0.25 * n))
        budget.spend(0.25 * probes[-1])
    assert probes == [0, 0, 1, 0, 0, 1]
    budget = ProbeBudget(share=10.0)
    assert budget.afford(3, 1.0, lambda n: float(n)) == 3
    budget.spend(3.0)
    assert budget.afford(3, 0.0, lambda n: float(n)) == 0  # nothing was kept but what three needed


def test_a_crowd_of_newcomers_is_probed_in_part() -> None:
    """Some of them probe even if all of them together would not pay."""
    sizes = tuple(range(1, 400))
    verify = tuple(1.0 + 0.08 * max(0, tokens - 20) for tokens in sizes)
    costs = CostModel(Profile(sizes, verify, (1, 64), (0.01, 2.0), 0.0, 0.0), 399, 64)
    rows = [Candidate(4, 0.0, probe_due=True)] * 64
    choice = choose_drafting(rows, load(64), costs)
    assert choice.drafting == []  # at 64 anchors each draft token costs what an anchor does
    choice = choose_drafting(rows[:16], load(16), costs)
    assert choice.probing == set(choice.drafting)
    assert 0 < len(choice.drafting) < 16


@given(
    st.lists(st.tuples(st.integers(1, 7), st.floats(0, 1)), min_size=1, max_size=9),
    st.integers(0, 9),
    st.integers(1, 40),
    st.sampled_from([None, 0.5, 0.05]),
    st.integers(0, 2**32 - 1),
)
def test_what_drafting_is_predicted_to_be_worth_is_what_selection_would_make_of_it(
    rows: list[tuple[int, float]], known: int, room: int, floor: float | None, seed: int
) -> None:
    """Against ranking all of a subset's tokens and walking along them."""
    generator = np.random.default_rng(seed)
    costs = cost_model((1 + generator.random(200).cumsum()).tolist(), draft=float(generator.random()))
    here = Load(sampling=5, tokens=7, room=room, context=100, per_draft=20)
    crowd = [Candidate(limit, rate) for limit, rate in sorted(rows, key=lambda row: -row[1])]
    sizes = list(range(1, len(crowd) + 1))
    expected = []
    for size in sizes:
        rates = np.array([each.rate if index < known else OPTIMISM for index, each in enumerate(crowd[:size])])
        values = Ranked.rank(rates[:, None] ** np.arange(1, 8), [each.limit for each in crowd[:size]]).values
        cost = StepCost.of(costs, here, size, sum(each.limit for each in crowd[:size]))
        expected.append(theta_by_count(values, cost.upto(len(values)), here)[early_stop(values, cost, here, floor)])
    thetas = predicted_thetas(crowd, known, sizes, here, costs, floor)
    np.testing.assert_allclose(thetas, expected, rtol=1e-12)
    # What is left out as hopeless is.
    for above in (here.sampling / costs.raw[here.sampling], *thetas):
        for theta, found in zip(thetas, predicted_thetas(crowd, known, sizes, here, costs, floor, above), strict=True):
            assert found == theta or (found == 0 and theta <= above)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_subset_would_be_worth_more(seed: int) -> None:
    """Against all of them of the sizes that are looked at, and none: 1, 2, 4 and everybody; 100 random cases a seed."""
    generator = np.random.default_rng(seed)
    for _ in range(100):
        slopes = np.sort(generator.random(60)) * generator.choice([0.02, 0.1, 0.5])
        costs = cost_model((1 + slopes.cumsum()).tolist(), draft=0.3 * float(generator.random()) + 1e-3)
        crowd = [Candidate(3, float(rate)) for rate in generator.random(int(generator.integers(1, 6)))]
        here = Load(sampling=6, tokens=8, room=int(generator.integers(1, 20)))

        def theta(
            subset: tuple[int, ...], crowd: list[Candidate] = crowd, costs: CostModel = costs, here: Load = here
        ) -> float:
            values = sorted((crowd[index].rate ** k for index in subset for k in (1, 2, 3)), reverse=True)
            prompts = StepCost.of(costs, here, 0).prefill
            return max(
                (6 + sum(values[:count])) / (costs.draft(len(subset)) + costs.raw[8 + count] - prompts)
                for count in range(min(len(values), here.room) + 1)
            )

        sizes = {0, 1, 2, 4, len(crowd)}
        subsets = [s for size in sizes for s in itertools.combinations(range(len(crowd)), size)]
        chosen = tuple(choose_drafting(crowd, here, costs).drafting)
        assert theta(chosen) == pytest.approx(max(map(theta, subsets)), rel=1e-9)


def test_a_crowd_that_cannot_pay_is_not_looked_at_block_by_block() -> None:
    costs = cost_model([1.0 + 0.1 * tokens for tokens in range(1, 400)], draft=0.4)
    crowd = [Candidate(4, 0.5)] * 64
    best = 64 / costs.raw[64]
    assert predicted_thetas(crowd, 64, [1, 64], load(64), costs, above=best) == [0, 0]
    assert min(predicted_thetas(crowd, 64, [1, 64], load(64), costs)) > 0
