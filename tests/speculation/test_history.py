"""A request's record of its drafts."""

import numpy as np
import pytest

from dspark_server.speculation.history import LONGEST_WAIT, SurvivalHistory


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
