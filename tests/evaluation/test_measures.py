"""Measures on blocks worked out by hand, and calibration on a world whose truth is known."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from dspark_server.evaluation import measures
from dspark_server.evaluation.calibrate import Scaling, fit_copying, fit_scaling, predicted
from dspark_server.evaluation.collect import Blocks
from dspark_server.evaluation.evaluate import uncalibrated
from dspark_server.speculation.copying import BUCKETS, CopyTables


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
        alone=np.zeros(n, dtype=bool),
        match=np.zeros((n, gamma), dtype=np.int64),
        odds=np.zeros((n, gamma)),
        repeated=np.full((n, gamma), np.nan),
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
    unsaid = np.array([np.nan, np.nan])
    with_unsaid = np.concatenate([predicted, unsaid]), np.concatenate([observed, [True, False]])
    expected = measures.expected_calibration_error(predicted, observed)
    assert measures.expected_calibration_error(*with_unsaid) == expected
    assert np.isnan(measures.expected_calibration_error(unsaid, np.array([True, False])))


def test_auc_counts_pairs() -> None:
    predicted, observed = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True])
    assert measures.auc(predicted, observed) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert np.isnan(measures.auc(predicted, np.ones(4, dtype=bool)))


def test_threshold_sweep_cuts_at_the_first_slot_below() -> None:
    two = blocks([2, 0], confidence=[[5.0, 0.0, 5.0], [-5.0, 5.0, 5.0]])
    rows = measures.threshold_sweep(two, np.array([0.0, 0.6]))
    assert rows[0] == {"threshold": 0.0, "acceptance_rate": 2 / 6, "tau": 2.0, "verified": 3.0}
    assert rows[1] == {"threshold": 0.6, "acceptance_rate": 1.0, "tau": 1.5, "verified": 0.5}


def test_the_scaling_of_a_known_world_is_found() -> None:
    """Logits twice too sharp and a unit too high at every position: that is found, and the error nearly vanishes."""
    noise = np.random.default_rng(1)
    n, gamma = 60_000, 4
    truth = noise.normal(0.8, 1.2, (n, gamma))
    stands = noise.random((n, gamma)) < 1 / (1 + np.exp(-truth))
    accepted = stands.cumprod(axis=1).sum(axis=1)
    world = blocks(accepted.tolist(), gamma, 2 * truth + 1)
    assert max(measures.ece_by_position(uncalibrated(world), world)) > 0.05
    scaling = fit_scaling(world, world.gamma)
    assert_allclose(scaling.temperatures, 2.0, rtol=0.1)
    assert_allclose(scaling.offsets, -0.5, atol=0.08)
    assert max(measures.ece_by_position(predicted(world, scaling, CopyTables(), 1.0), world)) < 0.012


def test_copies_are_believed_as_far_as_the_text_repeats_itself() -> None:
    """A world where a matched token follows with log odds (the draft's own + 2), and drafts stand by another law."""
    noise, n, length = np.random.default_rng(5), 20_000, 5
    odds, confidence = noise.normal(-1, 2, n), noise.normal(0, 1, n)
    repeated = noise.random(n) < 1 / (1 + np.exp(-odds - 2))
    stood = noise.random(n) < 1 / (1 + np.exp(-0.5 * confidence - 0.25 * odds - 1))
    plain = blocks(stood.astype(int).tolist(), gamma=1, confidence=confidence[:, None])
    world = replace(plain, match=np.full((n, 1), length), odds=odds[:, None], repeated=repeated[:, None].astype(float))
    bucket = BUCKETS.index(length)
    for greedy in (True, False):
        tables = fit_copying(world, CopyTables(), greedy=greedy)
        bias, trust = (
            (tables.greedy_bias, tables.greedy_trust) if greedy else (tables.sampled_bias, tables.sampled_trust)
        )
        assert bias[bucket] == 2.0
        assert_allclose([trust[0], trust[1], trust[2 + bucket]], [0.5, 0.25, 1.0], atol=0.06)
        # Where the blocks tell nothing, the tables stay as they were.
        assert bias[bucket + 1] == getattr(CopyTables(), "greedy_bias" if greedy else "sampled_bias")[bucket + 1]
        seen = predicted(world, Scaling((1.0,), (0.0,)), tables, 0.0 if greedy else 1.0)
        assert max(measures.ece_by_position(seen, world)) < 0.012


def test_lone_copies_are_counted_by_the_length_of_their_match() -> None:
    """Slot k of a copy has a match k tokens longer; blocks of the drafter's own do not count."""
    three = blocks([2, 0, 1, 2])
    match = np.array([[4, 5, 6]] * 3 + [[0, 0, 0]])
    world = replace(three, alone=np.array([True, True, True, False]), match=match)
    before, after = CopyTables(), fit_copying(world, CopyTables(), greedy=True)
    at = [BUCKETS.index(length) for length in (4, 5, 6)]
    wanted = [
        (stood + 5 * before.alone[i]) / (tried + 5) for i, stood, tried in zip(at, (2, 1, 0), (3, 2, 1), strict=True)
    ]
    assert_allclose([after.alone[i] for i in at], wanted, atol=1e-4)
    assert after.alone[at[-1] + 1 :] == before.alone[at[-1] + 1 :]
