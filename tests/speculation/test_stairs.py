"""Recorded passes: costs are looked up at the size that runs, free rows are filled, and it all stays lossless."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dspark_server.errors import ConfigError
from dspark_server.speculation.cost_model import CostModel, Profile
from dspark_server.speculation.curves import runs_as
from dspark_server.speculation.drafting import Candidate, choose_drafting
from dspark_server.speculation.prefix_scheduler import Load, StepCost
from dspark_server.speculation.selection import Causal, Lagged, build_selection
from tests.speculation.costs import load
from tests.speculation.test_exact import Context, Pair, ratio_law, total_variation

TOKENS, VERIFY = (1, 8, 16, 32, 33, 64), (1.0, 1.1, 1.5, 2.5, 4.5, 6.0)
RECORDED = (1, 8, 16, 32)
AWARE = ("causal", "lagged")


def stairs(draft: float = 0.01, recorded: tuple[int, ...] = RECORDED) -> CostModel:
    """Passes up to 32 tokens are recorded; one more runs eagerly and costs two seconds more."""
    costs = Profile(TOKENS, VERIFY, (1, 8), (draft, 8 * draft), 0.0, 0.0, recorded, (1, 4, 8))
    return CostModel(costs, 64, 8)


def test_a_pass_costs_what_its_recorded_size_does() -> None:
    costs = stairs()
    for tokens, runs in ((1, 1), (2, 8), (8, 8), (9, 16), (17, 32), (32, 32)):
        assert costs.raw[tokens] == VERIFY[TOKENS.index(runs)]
    np.testing.assert_allclose(costs.raw[33:], np.linspace(4.5, 6.0, 32))  # eagerly: every size its own
    assert [costs.draft(count) for count in (0, 1, 2, 4, 5)] == pytest.approx([0, 0.01, 0.04, 0.04, 0.08])
    assert runs_as((), np.array([3, 5])).tolist() == [3, 5]


def test_sizes_that_do_not_rise_are_refused() -> None:
    with pytest.raises(ConfigError, match="recorded sizes"):
        Profile(TOKENS, VERIFY, (1,), (0.1,), 0.0, 0.0, recorded=(8, 8))


def test_a_step_teaches_the_size_that_it_ran_at() -> None:
    costs = stairs()
    for _ in range(400):
        costs.observe(tokens=17, context=0, pairs=0, verify=5.0, requests=0, draft=0, overhead=0)
    assert costs.raw[32] == costs.raw[17] == pytest.approx(5.0, rel=0.05)


@given(st.integers(1, 40), st.integers(0, 60))
def test_the_minorant_is_below_the_stairs_and_convex_on_either_side(tokens: int, drafts: int) -> None:
    costs = stairs()
    whole, apart = costs.convex(tokens, drafts), costs.convex_apart(tokens, drafts)
    curve = costs.raw[tokens : tokens + len(whole)]
    assert (whole <= apart + 1e-9).all()
    assert (apart <= curve + 1e-9).all()
    assert (np.diff(whole, 2) >= -1e-9).all()
    for part in (apart[: max(0, 33 - tokens)], apart[max(0, 33 - tokens) :]):
        assert len(part) < 3 or (np.diff(part, 2) >= -1e-9).all()


@pytest.mark.parametrize("policy", AWARE)
def test_rows_that_the_pass_has_anyway_are_filled(policy: str) -> None:
    """However unlikely their tokens: padding costs the same."""
    chosen = build_selection(policy, stairs())
    survival = torch.full((3, 7), 0.05).cumprod(1)
    kept = [sum(chosen.lengths(survival, [7] * 3, load(3))) for _ in range(3)]
    assert kept[-1] == 5  # 3 anchors run as 8
    assert sum(chosen.lengths(survival, [1] * 3, load(3))) == 3
    assert sum(chosen.lengths(survival, [7] * 3, load(3, room=2))) == 2


@pytest.mark.parametrize("policy", AWARE)
def test_a_larger_pass_has_to_pay_by_all_of_its_tokens(policy: str) -> None:
    costs = Profile(TOKENS, (1.0, 1.1, 1.5, 2.5, 3.0, 3.3), (1,), (0.01,), 0.0, 0.0, RECORDED)
    chosen = build_selection(policy, CostModel(costs, 64, 8))
    likely, short = torch.full((8, 7), 0.97).cumprod(1), torch.full((8, 7), 0.97).cumprod(1)
    short[:, 3:] *= 0.02
    for survival, tokens in ((likely, 64), (short, 32)):
        for _ in range(3):
            kept = sum(chosen.lengths(survival, [7] * 8, load(8)))
        assert 8 + kept == tokens


@pytest.mark.parametrize("seed", range(3))
def test_with_the_usual_survivals_causal_finds_the_best_of_all_counts(seed: int) -> None:
    """If every step's survivals are those of the last, as `lagged` does; on any stairs."""
    generator = np.random.default_rng(seed)
    for _ in range(150):
        verify = np.sort(generator.random(len(TOKENS)) * generator.choice([0.3, 3.0])) + 0.5
        costs = CostModel(Profile(TOKENS, tuple(verify.tolist()), (1,), (0.1,), 0.0, 0.0, RECORDED), 64, 8)
        requests = int(generator.integers(1, 7))
        survival = torch.from_numpy(generator.random((requests, 4)).cumprod(1)).float()
        here, limits = load(requests), [4] * requests
        values = np.sort(survival.double().numpy().ravel())[::-1]
        seconds = StepCost.of(costs, here, requests).upto(len(values))
        theta = (requests + np.concatenate([[0.0], values.cumsum()])) / seconds
        for name in AWARE:
            policy = build_selection(name, costs)
            for _ in range(3):
                kept = sum(policy.lengths(survival, limits, here))
            assert theta[kept] == pytest.approx(theta.max(), rel=1e-6), name


def test_as_many_draft_as_a_recorded_draft_takes() -> None:
    costs = Profile((1, 64), (1.0, 1.1), (1, 6, 8), (0.1, 0.1, 9.0), 0.0, 0.0, (), (1, 6, 8))
    choice = choose_drafting([Candidate(4, 0.9)] * 7, load(7), CostModel(costs, 64, 8))
    assert len(choice.drafting) == 6


@pytest.mark.parametrize("policy", AWARE)
def test_a_floor_counts_what_the_pass_takes(policy: str) -> None:
    survival = torch.full((1, 20), 0.99).cumprod(1)
    for floor, kept in ((1 / 1.6, 15), (1 / 1.2, 7), (1 / 0.9, 0)):
        chosen = build_selection(policy, stairs(), floor=floor)
        for _ in range(3):
            lengths = chosen.lengths(survival, [20], load(1))
        assert lengths == [kept]


@pytest.mark.parametrize("policy", AWARE)
def test_whether_a_token_is_kept_does_not_depend_on_it_or_on_later_ones(policy: str) -> None:
    """The causality probe, on stairs."""
    generator = np.random.default_rng(5)
    changes = 0
    for case in range(300):
        requests, gamma = int(generator.integers(1, 7)), int(generator.integers(1, 6))
        verify = np.sort(generator.random(len(TOKENS)) * 3) + 0.2
        costs = CostModel(Profile(TOKENS, tuple(verify.tolist()), (1,), (0.1,), 0.0, 0.0, RECORDED), 64, 8)
        here = Load(requests, requests + int(generator.integers(0, 9)), int(generator.integers(0, 40)))
        before, after = _drawn(generator, requests, gamma), _drawn(generator, requests, gamma)
        row, slot = int(generator.integers(requests)), int(generator.integers(gamma))
        changed = after.clone()
        tail = generator.random(gamma - slot - 1)
        changed[row, slot + 1 :] = changed[row, slot] * torch.from_numpy(tail.cumprod()).float()
        kept = []
        for last in (after, changed):
            chosen = build_selection(policy, costs)
            for survival in (before, before):
                chosen.lengths(survival, [gamma] * requests, here)
            kept.append(chosen.lengths(last, [gamma] * requests, here))
        changes += kept[0] != kept[1]
        for position in range(slot + 1):
            assert (kept[0][row] > position) == (kept[1][row] > position), case
    assert changes > 10


@pytest.mark.parametrize("policy", AWARE)
@pytest.mark.parametrize("vocabulary", [2, 3])
def test_the_joint_law_is_the_targets(policy: str, vocabulary: int) -> None:
    """Exact, beside another request in the same pass; what was usual before is enumerated, too."""
    cuts = set()
    for seed in range(3):
        pair, other = Pair(vocabulary, 2, seed, "random"), Pair(2, 2, seed + 9, "random")
        source = np.random.default_rng(seed)
        verify = 0.4 + source.choice([0.05, 0.3, 0.9], 4).cumsum()
        costs = CostModel(Profile((1, 3, 5, 6), tuple(verify.tolist()), (1,), (0.1,), 0.0, 0.0, (3, 5)), 8, 2)
        said = {context: float(source.random()) for context in (*pair.q, *other.q)}
        committed: dict[Context, float] = {}
        for (earlier, chance), (beside, share) in itertools.product(_drafts(other), repeat=2):
            lengths = {}
            for draft, _ in _drafts(pair):
                chosen = build_selection(policy, costs)
                assert isinstance(chosen, Causal | Lagged)
                for past in ((0, 0), (0, 0)):
                    chosen.lengths(_survival(said, past, earlier), [2, 2], load(2))
                lengths[draft] = chosen.lengths(_survival(said, draft, beside), [2, 2], load(2))[0]
            cuts |= set(lengths.values())
            for outcome, weight in ratio_law(pair, lengths.__getitem__).items():
                committed[outcome] = committed.get(outcome, 0.0) + chance * share * weight
        assert total_variation(pair, committed) <= 1e-12
    assert len(cuts) > 1


def _drawn(generator: np.random.Generator, requests: int, gamma: int) -> Tensor:
    return torch.from_numpy(generator.random((requests, gamma)).cumprod(axis=1)).float()


def _survival(said: dict[Context, float], *blocks: Context) -> Tensor:
    return torch.tensor(np.stack([np.cumprod([said[block[:k]] for k in range(2)]) for block in blocks])).float()


def _drafts(of: Pair) -> list[tuple[Context, float]]:
    blocks = itertools.product(range(of.vocabulary), repeat=2)
    return [(block, float(np.prod([of.q[block[:k]][x] for k, x in enumerate(block)]))) for block in blocks]
