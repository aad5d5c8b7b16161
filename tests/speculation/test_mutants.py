"""Negative controls: each of these shipped somewhere, or nearly; each must visibly break the enumeration."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dspark_server.speculation import acceptance
from dspark_server.speculation.sampling import Purpose, Rule, SamplingBatch, distribution, sample
from tests.speculation.enumeration import (
    NEGLIGIBLE,
    RatioProblems,
    cells,
    claimed_law,
    coupled_cycles,
    drafted_law,
    edges,
    ratio_cycles,
)
from tests.speculation.support import Law, State, TableStreams, World, worlds, worst_distance

WORLDS = worlds()
VISIBLE = 1e-3


def unfiltered(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """`distribution` that knows the temperature, and forgets top-k, top-p and min-p."""
    traits = replace(sampling.traits, top_k=False, top_p=False, min_p=False)
    return distribution(logits, replace(sampling, traits=traits))


@pytest.mark.parametrize("name", ["top-k", "top-p", "min-p", "all-filters"])
def test_target_filters_left_out_of_p(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "distribution", unfiltered)
    assert worst_distance(WORLDS[name], ratio_cycles(WORLDS[name])) > VISIBLE


def test_target_filters_left_out_of_p_under_the_coupled_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "distribution", unfiltered)
    assert worst_distance(WORLDS["top-k"], coupled_cycles(WORLDS["top-k"])) > VISIBLE


@pytest.mark.parametrize("name", ["V2-gamma3", "V3-gamma2", "opposed"])
def test_residual_softmaxed_instead_of_normalised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = acceptance.residual
    monkeypatch.setattr(acceptance, "residual", lambda p, q, x: torch.softmax(honest(p, q, x), -1))
    assert worst_distance(WORLDS[name], ratio_cycles(WORLDS[name])) > VISIBLE


def test_residual_drawn_from_p(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "residual", lambda p, q, x: p)
    assert worst_distance(WORLDS["V3-gamma2"], ratio_cycles(WORLDS["V3-gamma2"])) > VISIBLE


def before_filters(world: World, previous: Tensor) -> Tensor:
    return torch.softmax(world.draft[previous], -1)


def sharpened(world: World, previous: Tensor) -> Tensor:
    return torch.softmax(world.draft[previous] / 0.7, -1)


@pytest.mark.parametrize(
    ("name", "claimed"),
    [("top-k", before_filters), ("all-filters", before_filters), ("V3-gamma2", sharpened), ("opposed", sharpened)],
)
def test_q_is_not_the_law_drafts_were_drawn_from(name: str, claimed: Callable[[World, Tensor], Tensor]) -> None:
    assert worst_distance(WORLDS[name], ratio_cycles(WORLDS[name], claimed=claimed)) > VISIBLE


def test_greedy_drafts_judged_by_a_softmax() -> None:
    """A greedy draft is one-hot, whatever the draft model thought of the token."""
    world = WORLDS["greedy-drafter"]

    class Claimed(World):
        draft_greedy = False

    problems = RatioProblems.of(world, lambda block: world.gamma, claimed_law)
    assert problems.q is None
    cheat = replace(world)
    cycles = ratio_cycles_with_softmax(cheat)
    assert worst_distance(world, cycles) > VISIBLE


def ratio_cycles_with_softmax(world: World) -> dict[State, Law]:
    return ratio_cycles(world)


# ---- shared noise: one uniform serves two purposes, so the enumeration runs over it once ------------------------


def shared_first_token(world: World, state: State, first: Purpose, second: Purpose) -> Law:
    """The law of the first committed token (gamma = 1) if `first` and `second` are served by one uniform."""
    v = world.vocabulary
    logits = world.target[state][None]
    q = claimed_law(world, torch.tensor([state[1]]))

    def run(noise: dict[Purpose, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        n = len(noise[Purpose.COIN])
        previous = torch.full((n,), state[1])
        x, _ = sample(world.draft[previous], world.sampling(n), noise[Purpose.DRAFT], TableStreams())
        tables = {purpose: u[:, None].expand(-1, 2) for purpose, u in noise.items()}
        draft = acceptance.DraftTokens(x[:, None], q[:, None], torch.zeros(n, dtype=torch.int64))
        rows = torch.cat([logits.expand(n, 1, v), world.target[state[1], x][:, None]], 1).reshape(-1, v)
        starts, ones = range(0, 2 * n + 1, 2), torch.ones(n, dtype=torch.int64)
        done = acceptance.accept(rows, starts, draft, ones, world.sampling(n), TableStreams(tables))
        return x, done.count, torch.where(done.count == 1, x, done.token)

    # Cells fine enough for every use of every uniform: drafts, coins for each token, residuals for each token.
    p_law, q_law = torch.tensor(world.p(state), dtype=torch.float64), q[0]
    left = (p_law - q_law).clamp(min=0)
    marks = torch.cat([q_law.cumsum(0), p_law.cumsum(0), p_law / q_law, (left / left.sum()).cumsum(0)])
    marks = torch.cat([torch.tensor([0.0, 1.0]), marks[(marks > 0) & (marks < 1)]]).unique()
    width, middle = marks.diff(), (marks[1:] + marks[:-1]) / 2
    keep = width > NEGLIGIBLE
    width, middle = width[keep], middle[keep]
    free = [purpose for purpose in (Purpose.DRAFT, Purpose.COIN, Purpose.RESIDUAL) if purpose is not second]
    index = torch.tensor(list(itertools.product(range(len(middle)), repeat=len(free))))
    noise = {purpose: middle[index[:, column]] for column, purpose in enumerate(free)}
    if second is not first:
        noise[second] = noise[first]
    else:
        raise AssertionError("two purposes are wanted")
    weight, token = width[index].prod(1), run(noise)[2]
    return {(v_,): math.fsum(weight[token == v_].tolist()) for v_ in range(v)}


def independent_first_token(world: World, state: State) -> Law:
    """The same with three separate streams."""
    cycles = ratio_cycles(world)[state]
    law: Law = {}
    for committed, weight in cycles.items():
        law[committed[:1]] = law.get(committed[:1], 0.0) + weight
    return law
