"""Steps that explore: when, how far, and what they may cost."""

import pytest
import torch

from dspark_server.speculation.drafting import Candidate
from dspark_server.speculation.exploration import EXPLORING
from dspark_server.speculation.selection import LoadAware, build_selection
from tests.speculation.costs import cost_model, load

HOPELESS = [0.1 * tokens for tokens in range(1, 200)]  # a draft token costs what an anchor does, and its draft


@pytest.mark.parametrize("policy", ["causal", "lagged"])
def test_where_drafts_do_not_pay_they_are_tried_now_and_then(policy: str) -> None:
    costs, here, rows = cost_model(HOPELESS, draft=0.05), load(4), [Candidate(7, rate) for rate in (0.5, 0.9, 0.4, 0.3)]
    chosen = build_selection(policy, costs)
    assert isinstance(chosen, LoadAware)
    explored, spent, seconds = 0, 0.0, 0.0
    for _ in range(4000):
        choice = chosen.drafting(rows, here)
        seconds += costs.raw[4]
        if choice.drafting:
            assert choice.drafting == [1]  # the best record
            assert choice.probing == {1}
            assert chosen.lengths(torch.full((1, 7), 0.01).cumprod(1), [7], here) == [4]  # as many again as anchors
            explored += 1
            spent += costs.draft(1) + costs.raw[8] - costs.raw[4]
            seconds += costs.draft(1) + costs.raw[8] - costs.raw[4]
    assert explored > 10
    assert 0.8 * EXPLORING < spent / seconds <= EXPLORING


def test_a_size_that_is_believed_far_too_dear_is_tried_as_often() -> None:
    """An error of the table must not make its own discovery too dear: one more pass for the tokens of one more."""
    costs, here = cost_model([0.1] * 4 + [99.0] * 100, draft=0.01), load(4)
    chosen = build_selection("causal", costs)
    tries = [bool(chosen.drafting([Candidate(4, 0.9)] * 4, here).drafting) for _ in range(1000)]
    assert 3 <= sum(tries) <= 1000 * EXPLORING


@pytest.mark.parametrize(("draft", "explores"), [(0.1, False), (2.4, True)])
def test_where_whole_blocks_are_verified_only_steps_without_drafts_are_left_to_explore(
    draft: float, explores: bool
) -> None:
    """And those only where drafts gain little (here 1.2 times, not 3.7), so that a step without could be faster."""
    costs, here, rows = (
        cost_model([1.0 + 0.001 * n for n in range(1, 99)], draft=draft),
        load(3),
        [Candidate(4, 0.9)] * 3,
    )
    chosen, plain = build_selection("causal", costs), []
    for _ in range(1000):
        choice = chosen.drafting(rows, here)
        plain.append(not choice.drafting)
        requests = len(choice.drafting)
        assert requests in (0, 3)
        drafts = sum(chosen.lengths(torch.full((3, 4), 0.9).cumprod(1), [4] * 3, here)) if requests else 0
        seconds, drafted = float(costs.raw[3 + drafts]), costs.draft(requests)
        costs.observe(
            tokens=3 + drafts, context=0.0, pairs=0.0, verify=seconds, requests=requests, draft=drafted, overhead=0.0
        )
    assert 0 < sum(plain) <= 31 if explores else not any(plain)
    assert plain[:30] == [False] * 30


def test_a_step_without_drafts_is_not_tried_where_its_cost_is_known() -> None:
    """As where some requests have just begun: steps of their prompts have as many tokens and no drafts."""
    costs, here, rows = cost_model([1.0 + 0.001 * n for n in range(1, 99)], draft=0.1), load(3), [Candidate(4, 0.9)] * 3
    chosen = build_selection("causal", costs)
    for _ in range(1000):
        costs.observe(tokens=3, context=0.0, pairs=0.0, verify=float(costs.raw[3]), requests=0, draft=0.0, overhead=0.0)
        assert len(chosen.drafting(rows, here).drafting) == 3
        assert sum(chosen.lengths(torch.full((3, 4), 0.9).cumprod(1), [4] * 3, here)) > 0


def test_no_draft_beyond_limits_room_and_floor() -> None:
    costs = cost_model(HOPELESS, draft=0.01)

    def explores(rows: list[Candidate], room: int = 100, floor: float | None = None) -> set[int]:
        chosen, here = build_selection("causal", costs, floor=floor), load(4, room)
        found = set()
        for _ in range(2000):
            drafting = chosen.drafting(rows, here).drafting
            if drafting:
                limits = [rows[index].limit for index in drafting]
                found.add(sum(chosen.lengths(torch.full((len(limits), 7), 0.1), limits, here)))
        return found

    assert explores([Candidate(7, 0.5)] * 4) == {4}
    assert explores([Candidate(3, 0.5)] * 4) == {3}
    assert explores([Candidate(7, 0.5)] * 4, room=2) == {2}
    assert explores([Candidate(7, 0.5)] * 4, floor=1 / 0.61) == {1}  # 0.4 for the anchors, 0.01 for the draft
    assert explores([Candidate(7, 0.5)] * 4, floor=1 / 0.45) == set()
    assert explores([Candidate(7, 0.5)] * 4, room=0) == set()
    assert explores([Candidate(0)] * 4) == set()
    assert explores([Candidate(12, 0.1, copies=True)] * 4) == set()
    assert explores([]) == set()
