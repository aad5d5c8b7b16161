"""Estimates corrected by outcomes: right where the drafter is wrong, for one tenant's requests of one kind alone."""

import random
from math import exp

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.request import SamplingParams
from dspark_server.engine.trace import StepTrace
from dspark_server.speculation.estimates import CONTEXTS, Correction, Estimates, Kind, Shifts, logit

from ..engine.support import FIXTURES, SMOLLM2_COSTS, prompts, still

GAMMA = 7


def corrected(survival: torch.Tensor, corrections: list[Correction | None]) -> torch.Tensor:
    return Shifts.of(corrections, survival.shape[1]).applied(survival)


def blocks(
    correction: Correction, source: random.Random, count: int, truth: "Truth", keep: float
) -> tuple[float, float]:
    """Draft, select and judge `count` blocks: (predicted, observed) survivals of all the judged prefixes."""
    predicted = observed = 0.0
    for _ in range(count):
        said = [source.betavariate(3, 1.4) for _ in range(GAMMA)]
        stated = torch.tensor([said]).cumprod(1)
        mine = corrected(stated, [correction])[0].tolist()
        verified = next((k for k, chance in enumerate(mine) if chance < keep), GAMMA)
        accepted = 0
        while accepted < verified and source.random() < truth(logit(said[accepted]), accepted):
            accepted += 1
        predicted += sum(mine[:verified])
        observed += accepted
        correction.judged(stated[0].tolist(), verified, accepted)
    return predicted, observed


class Truth:
    """The true chance of a token: a function of the logit that the drafter states, and of the position."""

    def __init__(self, gain: float, offset: float, by_position: float = 0.0) -> None:
        self.gain, self.offset, self.by_position = gain, offset, by_position

    def __call__(self, stated: float, position: int) -> float:
        return 1 / (1 + exp(-self.gain * stated - self.offset - self.by_position * position))


@pytest.mark.parametrize("keep", [0.0, 0.3])
@pytest.mark.parametrize(
    "truth",
    [Truth(1, 0), Truth(1, -1.5), Truth(0.4, -0.5), Truth(1, 1.0), Truth(0.0, 0.4), Truth(1, 0.5, -0.4)],
    ids=["right", "too sure", "blunt", "too shy", "blind", "worse from slot to slot"],
)
def test_the_gap_closes_within_500_blocks(truth: Truth, keep: float) -> None:
    """Of what is verified, and whatever part of a block that is: under 3 points between stated and observed."""
    source, correction = random.Random(4), Correction()
    blocks(correction, source, 500, truth, keep)
    predicted, observed = blocks(correction, source, 1500, truth, keep)
    verified = max(1.0, predicted)
    assert abs(predicted - observed) / max(verified, observed, 1.0) < 0.1
    judged = 1500 * GAMMA if keep == 0 else verified
    assert abs(predicted - observed) / judged < 0.03


@pytest.mark.parametrize("seed", range(3))
def test_no_position_is_overstated_where_a_noisy_estimate_selects(seed: int) -> None:
    """A record of few outcomes says little, and selection favours what it overstates: the gain must learn it."""
    source, correction = random.Random(seed), Correction()
    sums = [[0.0, 0.0, 0.0] for _ in range(GAMMA)]
    for number in range(4000):
        if number % 25 == 0:
            guess = min(max(source.gauss(0.7, 0.12), 0.3), 0.95)  # of the next request, the truth being the same
        stated = [guess ** (k + 1) for k in range(GAMMA)]
        mine = corrected(torch.tensor([stated]), [correction])[0].tolist()
        verified = next((k for k, chance in enumerate(mine) if chance < 0.3), GAMMA)
        accepted = 0
        while accepted < verified and source.random() < 0.7:
            accepted += 1
        correction.judged(stated, verified, accepted)
        for k in range(verified if number >= 500 else 0):
            sums[k][0] += mine[k]
            sums[k][1] += accepted > k
            sums[k][2] += 1
    gaps = [(predicted - observed) / count for predicted, observed, count in sums if count > 300]
    assert len(gaps) >= 3
    assert max(map(abs, gaps)) < 0.05
    assert correction.gain < 0.5


def test_an_estimate_that_forbids_drafts_does_not_last() -> None:
    """Bad blocks bring it under a threshold, where nothing is verified and so nothing learnt; it is tried again."""
    correction, stated = Correction(), [0.8 ** (k + 1) for k in range(GAMMA)]
    for _ in range(40):
        correction.judged(stated, 1, 0)
    before = correction.offset
    assert corrected(torch.tensor([stated]), [correction])[0, 0] < 0.5
    unheard = 0
    while corrected(torch.tensor([stated]), [correction])[0, 0] < 0.5 and unheard < 1000:
        correction.unheard()
        unheard += 1
    assert 120 < unheard < 600
    assert before < correction.offset < 0


def test_a_correction_stays_where_some_blocks_are_verified() -> None:
    """Of a drafter that is wrong by half, a few blocks at a time are verified: the estimate is right all the same."""
    draws = random.Random(3)
    correction, stated = Correction(), [0.6, 0.36]
    predicted, survived = 0.0, 0
    for block in range(3000):
        stood = draws.random() < 0.3
        if block % 10 == 0:
            chance = float(corrected(torch.tensor([stated]), [correction])[0, 0])
            if block > 1000:
                predicted, survived = predicted + chance, survived + stood
            correction.judged(stated, 1, int(stood))
        else:
            correction.unheard()
    assert predicted / survived == pytest.approx(1, abs=0.1)


def test_a_new_context_changes_nothing() -> None:
    survival = torch.tensor([[0.9, 0.5, 0.1], [0.99, 0.98, 0.2]])
    torch.testing.assert_close(corrected(survival, [Correction(), None]), survival)


LOGITS = st.floats(-3, 3)


@given(st.lists(st.tuples(*[st.floats(0.01, 0.99)] * 4), min_size=2, max_size=5), LOGITS, st.floats(0, 2), st.data())
def test_a_survival_depends_on_those_before_it_alone(
    rows: list[tuple[float, ...]], offset: float, gain: float, data: st.DataObject
) -> None:
    """Not on later ones, which know its token, nor on other rows; and it falls from slot to slot."""
    survival = torch.tensor(rows).cumprod(1)
    corrections = [Correction(gain, offset, [0.3, -0.2]), *[Correction(gain)] * (len(rows) - 1)]
    mine = corrected(survival, corrections)
    assert bool((mine.diff(dim=1) <= 1e-7).all())
    row, slot = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, 2))
    other = survival.clone()
    other[row, slot + 1 :] *= 0.5
    other[[each for each in range(len(rows)) if each != row]] *= 0.7
    assert torch.equal(corrected(other, corrections)[row, : slot + 1], mine[row, : slot + 1])
    other[row, slot + 1] = torch.nan
    assert torch.equal(corrected(other, corrections)[row, : slot + 1], mine[row, : slot + 1])
    assert bool(corrected(other, corrections)[row, slot + 1].isnan())


def test_kinds_of_requests() -> None:
    def kind(temperature: float, *, ruled: bool = False, grammar: bool = False, seeded: bool = False) -> Kind:
        return Kind.of(temperature, ruled=ruled, grammar=grammar, seeded=seeded)

    assert len({kind(t) for t in (0.0, 0.3, 0.6, 0.7, 1.0, 1.5)}) == 4
    assert len({kind(1.0), kind(1.0, ruled=True), kind(1.0, ruled=True, grammar=True)}) == 3
    assert kind(1.0, seeded=True) != kind(1.0), "a seed has another rule of acceptance"
    assert kind(0.0, seeded=True) == kind(0.0) == kind(1e-6)


def test_the_contexts_used_last_are_kept() -> None:
    estimates, kind = Estimates(), Kind(0, 0, seeded=False)
    first = estimates.of("first", kind)
    for index in range(2 * CONTEXTS):
        estimates.of(f"tenant {index}", kind)
        assert estimates.of("first", kind) is first
    assert len(estimates._corrections) == CONTEXTS


def decisions(core: EngineCore, tenant: str) -> list[tuple[int, ...]]:
    """Prefix lengths of a tenant's blocks, step by step."""
    seen: list[tuple[int, ...]] = []

    def look(trace: StepTrace) -> None:
        if trace.block is not None:
            seen.append(tuple(trace.block.lengths))

    core.loop.watch(look)
    params = SamplingParams(max_tokens=40, temperature=0.0, frequency_penalty=0.5, ignore_eos=True)
    for index, prompt in enumerate(prompts(3)):
        request = core.new_request(prompt, params, nonce=index, tenant=tenant)
        core.batcher.add(request)
        while core.loop.has_work:
            core.loop.step()
    core.loop.watch(None)
    return seen


def test_one_tenants_flood_moves_no_decision_of_another() -> None:
    """Whose own outcomes do."""

    def load() -> EngineCore:
        pair = FIXTURES / "dspark_qwen3_vanilla"
        draft = SpeculativeConfig(model=str(pair / "draft"), copying=False)
        config = EngineConfig(str(pair / "target"), dtype="float32", num_blocks=256, speculative=draft)
        return EngineCore.load(config, SMOLLM2_COSTS, clock=still)

    fresh, flooded = load(), load()
    for _ in range(6):
        decisions(flooded, "flood")
    flooded.select("causal")  # sizes of steps are explored by turns, whoever's they are: from the first turn again
    assert decisions(flooded, "quiet") == decisions(fresh, "quiet")
    assert decisions(flooded, "flood") != decisions(load(), "flood")
