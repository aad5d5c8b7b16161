"""Selection: what a policy may choose, what it must not look at, and that causal finds the best there is."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dspark_server.errors import ConfigError
from dspark_server.speculation.cost_model import CostModel
from dspark_server.speculation.drafting import Candidate
from dspark_server.speculation.prefix_scheduler import Load, StepCost, admit, best_count, within_floor
from dspark_server.speculation.selection import Lagged, LoadAware, Selection, build_selection
from tests.speculation.costs import cost_model, linear, load
from tests.speculation.test_exact import Context, Pair, ratio_law, total_variation

limits = st.lists(st.integers(0, 7), max_size=12)
AWARE = ("causal", "lagged")


def built(name: str, costs: CostModel, count: int = 0) -> Selection:
    """The policy, or the default one in a step that explores with `count` draft tokens."""
    policy = build_selection("causal" if name == "exploring" else name, costs, threshold=0.3)
    if name == "exploring":
        assert isinstance(policy, LoadAware)
        policy._exploration.count = count
    return policy


def candidates(limits: list[int], rate: float = 0.9) -> list[Candidate]:
    return [Candidate(limit, rate) for limit in limits]


def falling(generator: np.random.Generator, requests: int, gamma: int) -> Tensor:
    return torch.from_numpy(generator.random((requests, gamma)).cumprod(axis=1)).float()


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


@pytest.mark.parametrize("policy", AWARE)
@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_best_of_all_prefixes(policy: str, seed: int) -> None:
    """Against every combination of prefix lengths, 250 cases a seed: `causal` on a convex curve, `lagged` on any.

    Two thirds of them beside prompts, with context or little room.
    """
    generator = np.random.default_rng(seed)
    for case in range(250):
        requests, gamma = int(generator.integers(1, 4)), int(generator.integers(1, 4))
        slopes = generator.random(30)
        slopes = np.sort(slopes) if policy == "causal" else slopes**4
        verify = 1 + (slopes * generator.choice([0.05, 1.0])).cumsum()
        costs = cost_model(verify.tolist(), draft=float(generator.random()) + 1e-3, attention=1e-3)
        prefill, room = (int(generator.integers(9)), int(generator.integers(10))) if case % 3 else (0, 99)
        here = Load(requests, requests + prefill, room, context=50, pairs=70, per_draft=20 * (case % 2))
        survival = falling(generator, requests, gamma)
        most = generator.integers(0, gamma + 1, requests).tolist()
        chosen = build_selection(policy, costs)
        for _ in range(3):  # lagged: the count is that of the same survivals two steps ago
            lengths = chosen.lengths(survival, most, here)

        def theta(
            chosen: tuple[int, ...], survival: Tensor = survival, costs: CostModel = costs, here: Load = here
        ) -> float:
            tokens = sum(1 + float(row[:length].double().sum()) for row, length in zip(survival, chosen, strict=True))
            whole = costs.raw[here.tokens + sum(chosen)] + 1e-3 * (here.pairs + sum(chosen) * here.per_draft)
            prompts = StepCost.of(costs, here, 0).prefill
            return tokens / (costs.draft(len(chosen)) + whole - prompts)

        allowed = (each for each in itertools.product(*(range(limit + 1) for limit in most)) if sum(each) <= room)
        assert sum(lengths) <= room
        assert theta(tuple(lengths)) == pytest.approx(max(map(theta, allowed)), rel=1e-9)


@pytest.mark.parametrize("policy", ["causal", "threshold", "fixed", "lagged", "exploring"])
def test_whether_a_token_is_kept_does_not_depend_on_it_or_on_later_ones(policy: str) -> None:
    """The causality probe: x_k moves confidences after k, and whether ell >= k must not move with them."""
    generator = np.random.default_rng(11)
    for case in range(400):
        requests, gamma = int(generator.integers(1, 5)), int(generator.integers(1, 6))
        # Bumps and all: what a real machine's curve looks like.
        verify = np.sort(generator.random(requests * (gamma + 1)) * 3) + 0.2
        chosen = built(policy, cost_model(verify.tolist(), draft=0.1), int(generator.integers(1, requests * gamma + 1)))
        survival, here = falling(generator, requests, gamma), load(requests, int(generator.integers(0, 30)))
        most = [gamma] * requests
        if isinstance(chosen, Lagged):
            for _ in range(2):  # fix what later steps will do
                chosen.lengths(falling(generator, requests, gamma), most, here)
        row, slot = int(generator.integers(requests)), int(generator.integers(gamma))
        changed = survival.clone()
        tail = generator.random(gamma - slot - 1) if slot + 1 < gamma else np.empty(0)
        changed[row, slot + 1 :] = changed[row, slot] * torch.from_numpy(tail.cumprod()).float()
        past = list(chosen._past) if isinstance(chosen, Lagged) else []
        before = chosen.lengths(survival, most, here)
        if isinstance(chosen, Lagged):
            chosen._past.clear()
            chosen._past.extend(past)
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
        cost = StepCost(seconds, seconds, fixed=0.0, each=0.0)
        return admit([appendix_survival(draft[0]).tolist()], [2], 1, 2, cost).lengths[0]

    def retrospective(draft: Context) -> int:
        return best_count(appendix_survival(draft[0]), seconds, load(1))

    pair = appendix_pair()
    assert says_a(ratio_law(pair, retrospective)) == pytest.approx(17 / 20, abs=1e-12)
    assert says_a(ratio_law(pair, ours)) == pytest.approx(7 / 10, abs=1e-12)


def test_lagged_is_exact_with_fresh_noise_and_only_then() -> None:
    """K comes from a block that was discarded. Redrawn, its successor is independent of K; replayed, it is not."""
    pair = appendix_pair()
    costs = cost_model([1 / sps for sps in SPS])

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


@pytest.mark.parametrize("policy", [*AWARE, "exploring"])
@pytest.mark.parametrize("kind", ["random", "opposed", "zeros"])
@pytest.mark.parametrize(("vocabulary", "gamma"), [(2, 2), (2, 3), (3, 2)])
def test_the_joint_law_through_selection_is_the_targets(policy: str, kind: str, vocabulary: int, gamma: int) -> None:
    """Exact, beside another request whose block competes for the same step, on a curve full of bumps.

    How likely a prefix is to survive is said by the tokens before it, as by a confidence head; all blocks are
    enumerated, those too that `lagged` counted by.
    """
    cuts = set()
    for seed in range(3):
        source = np.random.default_rng(seed)
        pair, other = Pair(vocabulary, gamma, seed, kind), Pair(2, 2, seed + 9, "random")
        costs = cost_model((0.4 + source.choice([0.02, 0.3, 0.9], 30).cumsum()).tolist(), draft=0.1)
        said = {context: float(source.random()) for context in (*pair.q, *other.q)}

        def survival(*blocks: Context, said: dict[Context, float] = said) -> Tensor:
            """[R, gamma], 0 where a block is shorter than that."""
            rows = [np.cumprod([said[block[:k]] for k in range(len(block))]) for block in blocks]
            return torch.tensor(np.stack([np.pad(row, (0, gamma - len(row))) for row in rows])).float()

        def drafts(of: Pair) -> dict[Context, float]:
            blocks = itertools.product(range(of.vocabulary), repeat=of.gamma)
            return {block: float(np.prod([of.q[block[:k]][x] for k, x in enumerate(block)])) for block in blocks}

        committed: dict[Context, float] = {}
        laws: dict[tuple[int, ...], dict[Context, float]] = {}  # by how much of each block is verified
        before = drafts(other) if policy == "lagged" else {(0, 0): 1.0}
        for (earlier, chance), (beside, share) in itertools.product(before.items(), drafts(other).items()):

            def kept(
                draft: Context,
                earlier: Context = earlier,
                beside: Context = beside,
                costs: CostModel = costs,
                seed: int = seed,
            ) -> int:
                chosen, limits = built(policy, costs, count=1 + seed), [gamma, 2]
                if policy == "lagged":
                    for _ in range(2):  # the steps before: other blocks of the other request, and this one's likeliest
                        chosen.lengths(survival((0,) * gamma, earlier), limits, load(2))
                return chosen.lengths(survival(draft, beside), limits, load(2))[0]

            lengths = {draft: kept(draft) for draft in drafts(pair)}
            cuts |= set(lengths.values())
            which = tuple(lengths.values())
            if which not in laws:
                laws[which] = ratio_law(pair, lengths.__getitem__)
            for outcome, weight in laws[which].items():
                committed[outcome] = committed.get(outcome, 0.0) + chance * share * weight
        assert total_variation(pair, committed) <= 1e-12
    assert len(cuts) > 1


def test_lagged_counts_by_the_survivals_of_two_steps_ago() -> None:
    policy = build_selection("lagged", linear(1.0, 0.2))
    likely, hopeless = torch.full((1, 4), 0.99).cumprod(1), torch.full((1, 4), 0.01).cumprod(1)
    counts = [policy.lengths(survival, [4], load(1))[0] for survival in (hopeless, likely, likely, hopeless, likely)]
    assert counts == [4, 4, 0, 4, 4]


@pytest.mark.parametrize("policy", AWARE)
def test_a_floor_bounds_the_step(policy: str) -> None:
    costs = linear(0.1, 0.01)
    survival = torch.full((1, 8), 0.999).cumprod(1)

    def lengths(here: Load, floor: float | None) -> list[int]:
        chosen = build_selection(policy, costs, floor=floor)
        return [chosen.lengths(survival, [8], here)[0] for _ in range(3)]

    assert lengths(load(1), None) == [8] * 3
    assert lengths(load(1), 1 / 0.135) == [2] * 3  # 0.1 + 0.01 * (1 + 2) s
    assert lengths(Load(sampling=1, tokens=2, room=100), 1 / 0.135) == [1] * 3  # a token of a prompt beside it
    assert lengths(Load(sampling=1, tokens=50, room=100), 1 / 0.135) == [0] * 3
    assert within_floor(np.array([0.2, 0.3]), 1 / 0.1) == 0


def test_context_makes_tokens_dearer() -> None:
    costs = cost_model([1.0 + 0.01 * tokens for tokens in range(1, 40)], attention=1e-3)
    survival = torch.full((1, 8), 0.8).cumprod(1)
    policy = build_selection("causal", costs)
    near = policy.lengths(survival, [8], Load(1, 1, 100, context=1, pairs=1, per_draft=1))[0]
    far = policy.lengths(survival, [8], Load(1, 1, 100, context=1000, pairs=1000, per_draft=1000))[0]
    assert far < near


def test_a_prefill_chunk_does_not_make_drafts_look_cheap() -> None:
    """Drafts that do not pay without the chunk do not pay beside it."""
    costs = cost_model([1.0 + 0.1 * tokens for tokens in range(1, 400)])
    survival = torch.full((4, 4), 0.15).cumprod(1)
    policy = build_selection("causal", costs)
    assert policy.lengths(survival, [4] * 4, load(4)) == [0] * 4
    assert policy.lengths(survival, [4] * 4, Load(sampling=4, tokens=260, room=100)) == [0] * 4


def test_what_a_pass_costs_at_least_is_shared_with_prompts() -> None:
    """Where prompts fill passes past the corner of the roofline, a step that drafts save would not have been free."""
    costs = cost_model([max(200, tokens) / 200 for tokens in range(1, 600)])
    survival = torch.full((128, 1), 0.7)
    for policy, tokens, kept in (("causal", 128, 72), ("causal", 300, 0)):
        chosen = build_selection(policy, costs)
        lengths = chosen.lengths(survival, [1] * 128, Load(sampling=128, tokens=tokens, room=128))
        assert sum(lengths) == kept


@given(limits, st.integers(0, 60), st.integers(0, 2**32 - 1))
def test_choices_and_lengths_stay_within_limits_and_room(limits: list[int], room: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    verify = np.sort(generator.random(120)) + 0.01
    here = load(len(limits), room)
    for name in AWARE:
        policy: Selection = build_selection(name, cost_model(verify.tolist(), draft=float(generator.random()) + 1e-3))
        rows = [Candidate(limit, float(generator.random()), bool(generator.integers(2))) for limit in limits]
        choice = policy.drafting(rows, here)
        assert choice.drafting == sorted(set(choice.drafting))
        assert all(limits[index] > 0 for index in choice.drafting)
        assert choice.probing <= set(choice.drafting)
        taken = [limits[index] for index in choice.drafting]
        lengths = policy.lengths(falling(generator, len(taken), 7), taken, here)
        assert all(0 <= length <= limit for length, limit in zip(lengths, taken, strict=True))
        assert sum(lengths) <= room
