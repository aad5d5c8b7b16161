"""Measures of a drafter from its blocks: acceptance length, acceptance by position, calibration. Pure functions.

Shapes: N blocks of gamma draft tokens; slot k counts from 0. A slot whose outcome is unknown counts nowhere.
"""

import numpy as np
import numpy.typing as npt

from dspark_server.evaluation.collect import Blocks, Floats

BINS = 15


def tau(blocks: Blocks) -> float:
    """Tokens committed per cycle, the bonus token included; NaN without blocks."""
    return _mean(blocks.committed)


def acceptance_rate(blocks: Blocks) -> float:
    """Share of verified draft tokens that were accepted."""
    return float(blocks.accepted.sum() / max(1, blocks.judged.sum()))


def conditional_acceptance(blocks: Blocks) -> list[float]:
    """By position: acceptance of the token, given that those before it were accepted (figure 2 of the paper)."""
    reached = [(blocks.accepted >= k) & (blocks.judged > k) for k in range(blocks.gamma)]
    return [_mean(blocks.accepted[mask] > k) for k, mask in enumerate(reached)]


def prefix_survived(blocks: Blocks) -> npt.NDArray[np.bool_]:
    """[N, gamma]: whether the prefix up to each slot was accepted."""
    return np.asarray(blocks.accepted[:, None] > np.arange(blocks.gamma))


def judged(blocks: Blocks) -> npt.NDArray[np.bool_]:
    """[N, gamma]: whether each slot's outcome counts."""
    return np.asarray(blocks.judged[:, None] > np.arange(blocks.gamma))


def expected_calibration_error(predicted: Floats, observed: npt.NDArray[np.bool_]) -> float:
    """Mean over BINS equal bins of |mean predicted - share observed|, weighted by their sizes. Both [N].

    Entries with predicted NaN are left out; NaN if all are.
    """
    said = ~np.isnan(predicted)
    predicted, observed = predicted[said], observed[said]
    if not len(predicted):
        return float("nan")
    index = np.minimum((predicted * BINS).astype(int), BINS - 1)
    gap = np.bincount(index, predicted - observed, BINS)
    return float(np.abs(gap).sum() / len(predicted))


def ece_by_position(survival: Floats, blocks: Blocks) -> list[float]:
    """ECE of the cumulative survival a_k [N, gamma], by position."""
    stood, known = prefix_survived(blocks), judged(blocks)
    return [expected_calibration_error(survival[m, k], stood[m, k]) for k, m in enumerate(known.T)]


def auc(predicted: Floats, observed: npt.NDArray[np.bool_]) -> float:
    """Probability that a survivor got a higher prediction than a casualty, ties counting half; NaN if one kind is
    absent.
    """
    positive, negative = int(observed.sum()), int((~observed).sum())
    if not positive or not negative:
        return float("nan")
    _, inverse, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[observed].sum() - positive * (positive + 1) / 2) / (positive * negative))


def auc_by_position(survival: Floats, blocks: Blocks) -> list[float]:
    """AUC of a_k, by position."""
    stood, known = prefix_survived(blocks), judged(blocks)
    return [auc(survival[m, k], stood[m, k]) for k, m in enumerate(known.T)]


def reliability(survival: Floats, blocks: Blocks, slot: int) -> list[tuple[float, float, int]]:
    """(mean predicted, share accepted, blocks) of each non-empty bin of a_k at one slot."""
    known = judged(blocks)[:, slot]
    predicted, stood = survival[known, slot], prefix_survived(blocks)[known, slot]
    index = np.minimum((predicted * BINS).astype(int), BINS - 1)
    return [
        (float(predicted[index == b].mean()), float(stood[index == b].mean()), int((index == b).sum()))
        for b in range(BINS)
        if (index == b).any()
    ]


def threshold_sweep(blocks: Blocks, thresholds: Floats) -> list[dict[str, float]]:
    """Results of verifying only while a_k >= threshold (figure 5): acceptance rate, tau, verified draft tokens.

    Exact at each threshold: whether a slot is kept depends only on tokens before it, and blocks were verified whole.
    """
    rows = []
    for threshold in thresholds:
        kept = np.minimum((blocks.survival >= threshold).astype(int).cumprod(axis=1).sum(axis=1), blocks.judged)
        stood = np.minimum(blocks.accepted, kept)
        ended = blocks.committed <= blocks.accepted  # the request ended inside the block: no token after it
        rows.append(
            {
                "threshold": float(threshold),
                "acceptance_rate": float(stood.sum() / max(1, kept.sum())),
                "tau": _mean(np.where(ended & (kept >= blocks.judged), stood, stood + 1)),
                "verified": _mean(kept),
            }
        )
    return rows


def _mean(values: npt.NDArray[np.generic]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")  # type: ignore[arg-type]
