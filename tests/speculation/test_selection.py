"""Selection: what a policy may choose, what it must not look at, and that causal finds the best there is."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dspark_server.errors import ConfigError
from dspark_server.speculation.capacity import Capacity, Profile
from dspark_server.speculation.history import LONGEST_WAIT, SurvivalHistory
from dspark_server.speculation.selection import (
    OPTIMISM,
    PROBING,
    Candidate,
    Lagged,
    Load,
    Purse,
    Ranked,
    Selection,
    StepCost,
    admit,
    best_count,
    build_selection,
    choose_drafting,
    predicted_thetas,
    theta_by_count,
    within_floor,
)
from tests.speculation.test_exact import Context, Pair, ratio_law

limits = st.lists(st.integers(0, 7), max_size=12)
AWARE = ("causal", "lagged")


def capacity(verify: list[float], draft: float = 0.0, attention: float = 0.0) -> Capacity:
    """Verification of B tokens takes verify[B - 1] seconds, a draft `draft` whoever takes part."""
    sizes = tuple(range(1, len(verify) + 1))
    drafts = ((1, 64), (draft, draft * 1.001)) if draft else ((), ())
    return Capacity(Profile(sizes, tuple(verify), drafts[0], drafts[1], 0.0, attention), len(verify), 64)


def linear(fixed: float, each: float, size: int = 100) -> Capacity:
    return capacity([fixed + each * tokens for tokens in range(1, size + 1)])


def load(requests: int, room: int = 1000) -> Load:
    return Load(sampling=requests, tokens=requests, room=room)


def candidates(limits: list[int], rate: float = 0.9) -> list[Candidate]:
    return [Candidate(limit, rate) for limit in limits]


def falling(generator: np.random.Generator, requests: int, gamma: int) -> Tensor:
    return torch.from_numpy(generator.random((requests, gamma)).cumprod(axis=1)).float()


def early_stop(survivals: np.ndarray, cost: StepCost, load: Load, floor: float | None = None) -> int:
    """Algorithm 1 over ranked survivals [n]: how many, stopping where Theta first fails to rise."""
    seconds = cost.upto(len(survivals))
    most = min(load.room, within_floor(seconds, floor), len(survivals))
    theta = theta_by_count(survivals, seconds, load)[: most + 1]
    stops = np.nonzero(theta[1:] <= theta[:-1])[0]
    return int(stops[0]) if len(stops) else most


# ---- policies that do not price anything --------------------------------------------------------------------------


@given(limits, st.integers(0, 60))
def test_fixed_takes_whole_blocks_within_the_room_oldest_first(limits: list[int], room: int) -> None:
    policy = build_selection("fixed")
    chosen = policy.drafting(candidates(limits), load(len(limits), room)).drafting
    taken = [limits[index] for index in chosen]
    assert chosen == sorted(set(chosen))
    assert all(limit > 0 for limit in taken)
    assert sum(taken) <= room
    assert policy.lengths(torch.rand(len(taken), 7), taken, load(len(limits), room)) == taken
    # Whoever was left out did not fit beside those before it.
    for index, limit in enumerate(limits):
        if index not in chosen and limit > 0:
            assert limit > room - sum(limits[earlier] for earlier in chosen if earlier < index)


@given(limits, st.integers(0, 60), st.floats(0, 1), st.floats(0, 1))
def test_fixed_does_not_look_at_the_confidences(limits: list[int], room: int, one: float, other: float) -> None:
    policy, here = build_selection("fixed"), load(len(limits), room)
    taken = [limits[index] for index in policy.drafting(candidates(limits), here).drafting]
    shape = (len(taken), 7)
    assert policy.lengths(torch.full(shape, one), taken, here) == policy.lengths(torch.full(shape, other), taken, here)


@given(limits, st.integers(0, 60))
def test_none_drafts_for_nobody(limits: list[int], room: int) -> None:
    policy, here = build_selection("none"), load(len(limits), room)
    assert policy.drafting(candidates(limits), here).drafting == []
    assert policy.lengths(torch.ones(len(limits), 7), limits, here) == [0] * len(limits)


def test_threshold_keeps_prefixes_that_are_likely_enough() -> None:
    policy = build_selection("threshold", threshold=0.4)
    survival = torch.tensor([[0.9, 0.5, 0.3], [0.39, 0.2, 0.1], [0.8, 0.8, 0.8]])
    assert policy.lengths(survival, [3, 3, 2], load(3)) == [2, 0, 2]
    assert policy.lengths(survival, [3, 3, 2], load(3, room=2)) == [1, 0, 1]


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'greedy'.*causal.*fixed"):
        build_selection("greedy")


# ---- the load-aware ones ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_causal_is_the_best_of_all_prefixes_on_a_convex_cost(seed: int) -> None:
    """Against every combination of prefix lengths, 250 random cases a seed."""
    generator = np.random.default_rng(seed)
    for _ in range(250):
        requests, gamma = int(generator.integers(1, 4)), int(generator.integers(1, 4))
        slopes = np.sort(generator.random(20)) * generator.choice([0.05, 1.0])
        costs = capacity((1 + slopes.cumsum()).tolist(), draft=float(generator.random()) + 1e-3)
        survival = falling(generator, requests, gamma)
        most = generator.integers(0, gamma + 1, requests).tolist()
        lengths = build_selection("causal", costs).lengths(survival, most, load(requests))

        def theta(chosen: tuple[int, ...], survival: Tensor = survival, costs: Capacity = costs) -> float:
            tokens = sum(1 + float(row[:length].sum()) for row, length in zip(survival, chosen, strict=True))
            return tokens / (costs.draft(len(chosen)) + costs.raw[len(chosen) + sum(chosen)])

        best = max(theta(each) for each in itertools.product(*(range(limit + 1) for limit in most)))
        assert theta(tuple(lengths)) == pytest.approx(best, rel=1e-9)


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
    costs = capacity(np.sort(generator.random(120) + 0.5).tolist(), draft=0.1)
    here, most = load(max(1, len(rows)), room), [limit for limit, _ in rows]
    survival = torch.tensor([block for _, block in rows]).view(len(rows), 7).cumprod(1)
    for convex in (True, False):
        seconds = StepCost.of(costs, here, len(rows), convex=convex)
        ranked = Ranked.of(survival, most)
        expected = ranked.first(early_stop(ranked.values, seconds, here, floor))
        room = seconds.room(here, floor)
        assert admit(survival.tolist(), most, here.sampling, room, seconds).lengths == expected


@pytest.mark.parametrize("policy", ["causal", "threshold", "fixed", "lagged"])
def test_whether_a_token_is_kept_does_not_depend_on_it_or_on_later_ones(policy: str) -> None:
    """The causality probe: x_k moves confidences after k, and whether ell >= k must not move with them."""
    generator = np.random.default_rng(11)
    for case in range(400):
        requests, gamma = int(generator.integers(1, 5)), int(generator.integers(1, 6))
        # Bumps and all: what a real machine's curve looks like.
        verify = np.sort(generator.random(requests * (gamma + 1)) * 3) + 0.2
        chosen = build_selection(policy, capacity(verify.tolist(), draft=0.1), threshold=0.3)
        survival, here = falling(generator, requests, gamma), load(requests, int(generator.integers(0, 30)))
        most = [gamma] * requests
        if isinstance(chosen, Lagged):
            for _ in range(2):  # fix what later steps will do
                chosen.lengths(falling(generator, requests, gamma), most, here)
        row, slot = int(generator.integers(requests)), int(generator.integers(gamma))
        changed = survival.clone()
        tail = generator.random(gamma - slot - 1) if slot + 1 < gamma else np.empty(0)
        changed[row, slot + 1 :] = changed[row, slot] * torch.from_numpy(tail.cumprod()).float()
        shares = list(chosen._shares) if isinstance(chosen, Lagged) else []
        before = chosen.lengths(survival, most, here)
        if isinstance(chosen, Lagged):
            chosen._shares.clear()
            chosen._shares.extend(shares)
        after = chosen.lengths(changed, most, here)
        for position in range(slot + 1):
            assert (before[row] > position) == (after[row] > position), case


def test_a_slot_lost_to_a_nan_moves_no_earlier_decision() -> None:
    """Neither the cut limit nor the NaN itself may say whether tokens before it are kept."""
    for name in AWARE:
        policy = build_selection(name, linear(1.0, 0.05))
        survival = torch.tensor([[0.9, 0.8, 0.7], [0.6, 0.5, 0.1]])
        if name == "lagged":
            for _ in range(2):
                policy.lengths(survival, [3, 3], load(2))
        whole = policy.lengths(survival, [3, 3], load(2))
        policy = build_selection(name, linear(1.0, 0.05))
        if name == "lagged":
            for _ in range(2):
                policy.lengths(survival, [3, 3], load(2))
        survival[0, 2] = torch.nan
        assert policy.lengths(survival, [2, 3], load(2))[0] == min(2, whole[0])


def test_ties_go_to_the_earlier_position() -> None:
    survival = torch.full((2, 3), 0.5)
    for name in ("causal", "threshold"):
        policy = build_selection(name, linear(1.0, 1e-6), threshold=0.1)
        for room in range(7):
            lengths = policy.lengths(survival, [3, 3], load(2, room))
            assert sum(lengths) == room
            assert lengths[0] == min(3, room)


SPS = (1.0, 0.5, 0.45)  # Appendix A: one request, 0, 1 or 2 draft tokens


def appendix_survival(x1: int) -> np.ndarray:
    return np.array([0.8, 0.8 * (0.9 if x1 == 0 else 0.0)])


def appendix_pair() -> Pair:
    pair = Pair(2, 2, 0, "random")
    for context in pair.p:
        pair.p[context], pair.q[context] = np.array([0.7, 0.3]), np.array([0.5, 0.5])
    return pair


def says_a(committed: dict[Context, float]) -> float:
    return sum(weight for said, weight in committed.items() if said[0] == 0)


def test_appendix_a_retrospective_search_and_ours() -> None:
    """On the raw curve, convex smoothing bypassed: 17/20 for the search over all, exactly 7/10 for the early stop."""
    seconds = 1 / np.array(SPS)

    def ours(draft: Context) -> int:
        return admit([appendix_survival(draft[0]).tolist()], [2], 1, 2, seconds.tolist().__getitem__).lengths[0]

    def retrospective(draft: Context) -> int:
        return best_count(appendix_survival(draft[0]), seconds, load(1))

    pair = appendix_pair()
    assert says_a(ratio_law(pair, retrospective)) == pytest.approx(17 / 20, abs=1e-12)
    assert says_a(ratio_law(pair, ours)) == pytest.approx(7 / 10, abs=1e-12)


def test_lagged_is_exact_with_fresh_noise_and_only_then() -> None:
    """K comes from a block that was discarded. Redrawn, its successor is independent of K; replayed, it is not."""
    pair = appendix_pair()
    costs = capacity([1 / sps for sps in SPS])

    def kept(discarded: Context, drafted: Context) -> int:
        policy = Lagged(costs)
        for context in (discarded, discarded, drafted):
            survival = torch.from_numpy(appendix_survival(context[0])[None]).float()
            lengths = policy.lengths(survival, [2], load(1))
        return lengths[0]

    blocks = list(itertools.product(range(2), repeat=2))
    fresh = sum(says_a(ratio_law(pair, lambda draft, old=old: kept(old, draft))) / len(blocks) for old in blocks)
    replayed = says_a(ratio_law(pair, lambda draft: kept(draft, draft)))
    assert fresh == pytest.approx(7 / 10, abs=1e-12)
    assert replayed == pytest.approx(17 / 20, abs=1e-12)


def test_lagged_counts_by_the_survivals_of_two_steps_ago() -> None:
    policy = build_selection("lagged", linear(1.0, 0.2))
    likely, hopeless = torch.full((1, 4), 0.99).cumprod(1), torch.full((1, 4), 0.01).cumprod(1)
    counts = [policy.lengths(survival, [4], load(1))[0] for survival in (hopeless, likely, likely, hopeless, likely)]
    assert counts == [4, 4, 0, 4, 4]


def test_a_floor_bounds_the_step() -> None:
    costs = linear(0.1, 0.01)
    survival = torch.full((1, 8), 0.999).cumprod(1)
    free = build_selection("causal", costs).lengths(survival, [8], load(1))[0]
    bound = build_selection("causal", costs, floor=1 / 0.135).lengths(survival, [8], load(1))[0]
    assert free == 8
    assert bound == 2  # 0.1 + 0.01 * (1 + 2) s
    assert within_floor(np.array([0.2, 0.3]), 1 / 0.1) == 0


def test_context_makes_tokens_dearer() -> None:
    costs = capacity([1.0 + 0.01 * tokens for tokens in range(1, 40)], attention=1e-3)
    survival = torch.full((1, 8), 0.8).cumprod(1)
    policy = build_selection("causal", costs)
    near = policy.lengths(survival, [8], Load(1, 1, 100, context=1, pairs=1, per_draft=1))[0]
    far = policy.lengths(survival, [8], Load(1, 1, 100, context=1000, pairs=1000, per_draft=1000))[0]
    assert far < near


# ---- who drafts at all --------------------------------------------------------------------------------------------


def test_nobody_drafts_where_verification_costs_what_decoding_does() -> None:
    """Per-token cost, no fixed part: a draft token is worth less than an anchor, and its draft is not free."""
    costs = capacity([0.1 * tokens for tokens in range(1, 100)], draft=0.02)
    rows = [Candidate(4, 0.9, probe_due=True)] * 6
    assert choose_drafting(rows, load(6), costs).drafting == []


def test_everybody_drafts_on_an_idle_machine() -> None:
    costs = capacity([1.0 + 0.001 * tokens for tokens in range(1, 100)], draft=0.1)
    choice = choose_drafting([Candidate(4, 0.6)] * 3, load(3), costs)
    assert choice.drafting == [0, 1, 2]
    assert not choice.probing


def test_copies_are_made_where_a_first_token_could_pay() -> None:
    rows = [Candidate(12, 0.9, copies=True), Candidate(12, 0.3, copies=True), Candidate(4, 0.0)]
    idle, busy = (capacity([1.0 + each * n for n in range(1, 99)], draft=9.0) for each in (0.01, 0.2))
    assert choose_drafting(rows, load(3), idle).drafting == [0, 1]
    assert choose_drafting(rows, load(3), busy).drafting == [0]
    assert choose_drafting(rows, load(3), capacity([0.1 * n for n in range(1, 99)], draft=9.0)).drafting == []


def test_those_with_the_better_record_draft_first() -> None:
    costs = capacity([1.0 + 0.12 * tokens for tokens in range(1, 100)], draft=0.25)
    rows = [Candidate(4, rate) for rate in (0.05, 0.9, 0.1, 0.95)]
    assert choose_drafting(rows, load(4), costs).drafting == [1, 3]


def test_a_poor_record_is_probed_again_if_load_allows() -> None:
    poor = Candidate(4, 0.05, probe_due=True)
    choice = choose_drafting([poor], load(1), capacity([1.0 + 0.05 * n for n in range(1, 99)], draft=0.3))
    assert choice.drafting == [0]
    assert choice.probing == {0}
    waiting = Candidate(4, 0.05)
    assert (
        choose_drafting([waiting], load(1), capacity([1.0 + 0.05 * n for n in range(1, 99)], draft=0.3)).drafting == []
    )
    assert choose_drafting([poor], load(1), capacity([1.0 * n for n in range(1, 99)], draft=0.3)).drafting == []


@pytest.mark.parametrize("policy", ["causal", "lagged"])
def test_probes_take_their_share_of_the_time_and_no_more(policy: str) -> None:
    """A crowd that is always due, on a machine where no draft is known to pay: none waits for ever either."""
    costs = capacity([1.0 + 0.02 * n for n in range(1, 999)], draft=0.05)
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
    purse = Purse(share=0.1)
    assert [purse.afford(1, 1.0, lambda n: 0.25 * n) for _ in range(6)] == [0, 0, 1, 0, 0, 1]
    purse = Purse(share=10.0)
    assert purse.afford(3, 1.0, lambda n: float(n)) == 3
    assert purse.afford(3, 0.0, lambda n: float(n)) == 0  # nothing was kept but what three needed


def test_a_crowd_of_newcomers_is_probed_in_part() -> None:
    """Where all of them together would not pay, some do."""
    sizes = tuple(range(1, 400))
    verify = tuple(1.0 + 0.08 * max(0, tokens - 20) for tokens in sizes)
    costs = Capacity(Profile(sizes, verify, (1, 64), (0.01, 2.0), 0.0, 0.0), 399, 64)
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
    costs = capacity((1 + generator.random(200).cumsum()).tolist(), draft=float(generator.random()))
    here = Load(sampling=5, tokens=7, room=room, context=100, per_draft=20)
    crowd = [Candidate(limit, rate) for limit, rate in sorted(rows, key=lambda row: -row[1])]
    sizes = list(range(1, len(crowd) + 1))
    expected = []
    for size in sizes:
        rates = np.array([each.rate if index < known else OPTIMISM for index, each in enumerate(crowd[:size])])
        values = Ranked.rank(rates[:, None] ** np.arange(1, 8), [each.limit for each in crowd[:size]]).values
        cost = StepCost.of(costs, here, size, convex=True)
        expected.append(theta_by_count(values, cost.upto(len(values)), here)[early_stop(values, cost, here, floor)])
    thetas = predicted_thetas(crowd, known, sizes, here, costs, floor)
    np.testing.assert_allclose(thetas, expected, rtol=1e-12)
    # What is left out as hopeless is.
    for above in (here.sampling / costs.raw[here.sampling], *thetas):
        for theta, found in zip(thetas, predicted_thetas(crowd, known, sizes, here, costs, floor, above), strict=True):
            assert found == theta or (found == 0 and theta <= above)


def test_a_crowd_that_cannot_pay_is_not_looked_at_block_by_block() -> None:
    costs = capacity([1.0 + 0.1 * tokens for tokens in range(1, 400)], draft=0.4)
    crowd = [Candidate(4, 0.5)] * 64
    best = 64 / costs.raw[64]
    assert predicted_thetas(crowd, 64, [1, 64], load(64), costs, above=best) == [0, 0]
    assert min(predicted_thetas(crowd, 64, [1, 64], load(64), costs)) > 0


def test_a_prefill_chunk_does_not_make_drafts_look_cheap() -> None:
    """Where drafts do not pay without the chunk, they do not pay beside it."""
    costs = capacity([1.0 + 0.1 * tokens for tokens in range(1, 400)])
    survival = torch.full((4, 4), 0.15).cumprod(1)
    policy = build_selection("causal", costs)
    assert policy.lengths(survival, [4] * 4, load(4)) == [0] * 4
    assert policy.lengths(survival, [4] * 4, Load(sampling=4, tokens=260, room=100)) == [0] * 4


@given(limits, st.integers(0, 60), st.integers(0, 2**32 - 1))
def test_choices_and_lengths_stay_within_limits_and_room(limits: list[int], room: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    verify = np.sort(generator.random(120)) + 0.01
    here = load(len(limits), room)
    for name in AWARE:
        policy: Selection = build_selection(name, capacity(verify.tolist(), draft=float(generator.random()) + 1e-3))
        rows = [Candidate(limit, float(generator.random()), bool(generator.integers(2))) for limit in limits]
        choice = policy.drafting(rows, here)
        assert choice.drafting == sorted(set(choice.drafting))
        assert all(limits[index] > 0 for index in choice.drafting)
        assert choice.probing <= set(choice.drafting)
        taken = [limits[index] for index in choice.drafting]
        lengths = policy.lengths(falling(generator, len(taken), 7), taken, here)
        assert all(0 <= length <= limit for length, limit in zip(lengths, taken, strict=True))
        assert sum(lengths) <= room


def test_theta_counts_what_the_step_is_expected_to_commit() -> None:
    theta = theta_by_count(np.array([0.5, 0.25]), np.array([1.0, 1.0, 2.0]), load(3))
    np.testing.assert_allclose(theta, [3.0, 3.5, 1.875])


# ---- a request's record ---------------------------------------------------------------------------------------------


def test_a_record_starts_at_the_prior_and_follows_what_happens() -> None:
    record = SurvivalHistory()
    assert record.rate(0.6) == pytest.approx(0.6)
    for _ in range(60):
        record.judged(verified=4, accepted=1)
    assert record.rate(0.6) == pytest.approx(0.5, abs=0.03)
    for _ in range(60):
        record.judged(verified=0, accepted=0)
    assert record.rate(0.6) == pytest.approx(0.5, abs=0.03), "a draft nobody looked at says nothing"


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
def test_what_confidence_says_and_what_became_of_it_come_to_the_same(chance: float) -> None:
    told, seen, throws = SurvivalHistory(memory=0.999), SurvivalHistory(memory=0.999), np.random.default_rng(7)
    for _ in range(5000):
        told.expected([chance**k for k in range(1, 6)])
        seen.judged(5, int((throws.random(5) < chance).cumprod().sum()))
    assert told.rate(0.3) == pytest.approx(chance, abs=0.01)
    assert seen.rate(0.3) == pytest.approx(chance, abs=0.02)


def test_probes_come_at_growing_intervals_until_drafting_pays() -> None:
    record, probes = SurvivalHistory(), []
    for step in range(300):
        if record.probe_due:
            probes.append(step)
            record.drafted(probing=True)
        else:
            record.left_out()
    gaps = np.diff(probes)
    assert gaps[:5].tolist() == [3, 5, 9, 17, 33]
    assert gaps.max() == LONGEST_WAIT + 1
    record.drafted(probing=False)
    record.left_out()
    assert record.probe_due
