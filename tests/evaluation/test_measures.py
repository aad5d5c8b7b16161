"""Measures on blocks worked out by hand, and calibration on a world whose truth is known."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from dspark_server.evaluation import measures
from dspark_server.evaluation.calibrate import fit_temperatures, scaled
from dspark_server.evaluation.collect import Blocks
from dspark_server.evaluation.evaluate import uncalibrated


def blocks(accepted: list[int], gamma: int = 3, confidence: object = None, **fields: list[int]) -> Blocks:
    n = len(accepted)
    logits = np.zeros((n, gamma)) if confidence is None else np.array(confidence, dtype=float)
    own = Blocks(
        group=np.array(fields.get("group", [0] * n)),
        confidence=logits,
        survival=np.asarray((1 / (1 + np.exp(-logits))).cumprod(axis=1)),
        accepted=np.array(accepted),
        judged=np.array(fields.get("judged", [gamma] * n)),
        committed=np.array(fields.get("committed", [each + 1 for each in accepted])),
    )
    return own


def test_tau_acceptance_and_positions() -> None:
    four = blocks([3, 1, 0, 2], judged=[3, 3, 3, 2], committed=[4, 2, 1, 2])  # the last ended with its second token
    assert measures.tau(four) == pytest.approx(9 / 4)
    assert measures.acceptance_rate(four) == pytest.approx(6 / 11)
    assert_allclose(measures.conditional_acceptance(four), [3 / 4, 2 / 3, 1.0])


def test_calibration_error_is_the_weighted_gap_of_the_bins() -> None:
    predicted = np.array([0.02, 0.04, 0.91, 0.93])
    observed = np.array([False, True, True, True])
    assert measures.expected_calibration_error(predicted, observed) == pytest.approx((abs(0.06 - 1) + 0.16) / 4)


def test_auc_counts_pairs() -> None:
    predicted, observed = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True])
    assert measures.auc(predicted, observed) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert np.isnan(measures.auc(predicted, np.ones(4, dtype=bool)))


def test_threshold_sweep_cuts_at_the_first_slot_below() -> None:
    two = blocks([2, 0], confidence=[[5.0, 0.0, 5.0], [-5.0, 5.0, 5.0]])
    rows = measures.threshold_sweep(two, np.array([0.0, 0.6]))
    assert rows[0] == {"threshold": 0.0, "acceptance_rate": 2 / 6, "tau": 2.0, "verified": 3.0}
    assert rows[1] == {"threshold": 0.6, "acceptance_rate": 1.0, "tau": 1.5, "verified": 0.5}


def test_temperatures_of_a_known_world_are_found() -> None:
    """Logits twice too sharp at every position: STS finds 2 everywhere and the error nearly vanishes."""
    noise = np.random.default_rng(1)
    n, gamma = 60_000, 4
    truth = noise.normal(0.8, 1.2, (n, gamma))
    stands = noise.random((n, gamma)) < 1 / (1 + np.exp(-truth))
    accepted = stands.cumprod(axis=1).sum(axis=1)
    world = blocks(accepted.tolist(), gamma, 2 * truth)
    assert max(measures.ece_by_position(uncalibrated(world), world)) > 0.05
    temperatures = fit_temperatures(world)
    assert_allclose(temperatures, 2.0, rtol=0.12)
    assert max(measures.ece_by_position(scaled(world.confidence, temperatures), world)) < 0.012
