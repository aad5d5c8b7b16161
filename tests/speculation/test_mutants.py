"""Negative controls: each of these shipped somewhere, or nearly; each must visibly break the enumeration."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dspark_server.speculation import acceptance
from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.law import distribution, sample
from dspark_server.speculation.noise import Purpose
from dspark_server.speculation.sampling import SamplingBatch
from tests.speculation.enumeration import coupled_cycles, ratio_cycles
from tests.speculation.support import Law, State, TableStreams, World, distance, worlds, worst_distance

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
    monkeypatch.setattr(acceptance, "residual", lambda *args: torch.softmax(honest(*args), -1))
    assert worst_distance(WORLDS[name], ratio_cycles(WORLDS[name])) > VISIBLE


def test_residual_drawn_from_p(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "residual", lambda p, *_: p)
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
    assert worst_distance(world, ratio_cycles(world, claimed=before_filters)) > VISIBLE


# ---- shared noise: one uniform serves two purposes, so both must be enumerated together -------------------------


def first_token(world: World, state: State, shared: tuple[Purpose, Purpose] | None) -> Law:
    """The law of the first committed token (gamma = 1); `shared`: the second purpose is fed the first's uniform."""
    v = world.vocabulary
    p, q = torch.tensor(world.p(state), dtype=torch.float64), torch.tensor(world.q(state[1]), dtype=torch.float64)
    left = (p - q).clamp(min=0)
    # Cells fine enough for every use of a uniform: drafts, coins, residuals, bonus tokens.
    marks = torch.cat([q.cumsum(0), p.cumsum(0), (left / left.sum()).cumsum(0), p / q])
    marks = torch.cat([torch.tensor([0.0, 1.0]), marks[(marks > 0) & (marks < 1)]]).unique()
    width, middle = marks.diff(), (marks[1:] + marks[:-1]) / 2

    purposes = (Purpose.DRAFT, Purpose.COIN, Purpose.RESIDUAL)
    free = [purpose for purpose in purposes if shared is None or purpose is not shared[1]]
    cell = torch.tensor(list(itertools.product(range(len(middle)), repeat=len(free))))
    noise = {purpose: middle[cell[:, column]] for column, purpose in enumerate(free)}
    if shared:
        noise[shared[1]] = noise[shared[0]]

    n = len(cell)
    context = torch.tensor([state]).expand(n, 2)
    drafted, law = sample(world.draft[context[:, 1]], world.sampling(n), noise[Purpose.DRAFT], TableStreams())
    assert law is not None
    logits, row_start = world.verify_logits(context, drafted[:, None], torch.ones(n, dtype=torch.int64))
    draft = DraftBlock.of(drafted[:, None], law[:, None])
    streams = TableStreams({purpose: u[:, None].expand(-1, 2) for purpose, u in noise.items()})
    done = acceptance.accept(logits, row_start, draft, range(n), world.sampling(n), streams)
    token = torch.where(done.count == 1, drafted, done.token)
    weight = width[cell].prod(1)
    return {(each,): math.fsum(weight[token == each].tolist()) for each in range(v)}


@pytest.mark.parametrize("name", ["V2-gamma1", "V4-gamma1"])
@pytest.mark.parametrize(
    "shared", [None, (Purpose.DRAFT, Purpose.COIN), (Purpose.COIN, Purpose.RESIDUAL), (Purpose.DRAFT, Purpose.RESIDUAL)]
)
def test_noise_shared_between_purposes(name: str, shared: tuple[Purpose, Purpose] | None) -> None:
    world = WORLDS[name]
    distances = []
    for state in world.states:
        target = {(token,): share for token, share in enumerate(world.p(state))}
        distances.append(distance(first_token(world, state, shared), target))
    if shared is None:
        assert max(distances) <= 1e-12
    elif name == "V4-gamma1":
        # With two tokens the residual has one candidate, so noise shared with it has nothing to bend.
        assert max(distances) > VISIBLE
    elif Purpose.RESIDUAL not in shared:
        assert max(distances) > VISIBLE
