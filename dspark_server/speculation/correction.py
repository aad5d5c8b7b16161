"""Corrections of measured costs by the times of steps: a factor for each cost, including costs never tried.

A Gaussian process over the logs of the factors, updated by a Kalman filter. A factor is the sum of three unknowns: the
speed of the machine, common to all costs; the cost of one table (passes, attention, drafts) against the others; and the
shape of the table, a walk over the logs of the sizes. So one step corrects most the costs that it measures, and every
other by its correlation with them. Corrections fade: a cost that has not been measured for long, such as a draft's
while drafts do not pay, follows its next measurement nearly at once.

Shapes: K costs of all tables, one after the other.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Prior standard deviations of the log factors: SPEED makes a factor of 8 two standard deviations.
SPEED = 1.0
TABLE = 0.7
SHAPE = 0.7
REACH = 2.0  # doublings of size over which the shape's correlation falls to 1 / e
STEP = 0.3  # of the noise of a step's log ratio
MEMORY = 60.0  # seconds of steps after which a correction has faded to 1 / e
LIMIT = math.log(10)  # bound on the log ratio of one step


class Correction:
    """`factors` [K]: recent times of steps relative to the measured costs."""

    def __init__(self, tables: Sequence[Sequence[int]]) -> None:
        """`tables`: the measured sizes of each table."""
        place = np.log2([size for sizes in tables for size in sizes])
        table = np.repeat(np.arange(len(tables)), [len(sizes) for sizes in tables])
        near = np.exp(-np.abs(place[:, None] - place[None, :]) / REACH)
        same = table[:, None] == table[None, :]
        self._prior = SPEED**2 + same * (TABLE**2 + SHAPE**2 * near)
        self._covariance = self._prior.copy()
        self._logs = np.zeros(len(place))

    @property
    def factors(self) -> Floats:
        """[K] 1 where the profile was right."""
        return np.exp(self._logs)

    @property
    def certainty(self) -> Floats:
        """[K] one over the variance of each factor's log: large where steps have been measured lately."""
        return np.asarray(1 / self._covariance.diagonal())

    def variance(self, parts: Floats) -> float:
        """Variance of the log of the factor of a cost with these parts [K]."""
        return float(parts @ self._covariance @ parts)

    def update(self, parts: Floats, log_ratio: float, seconds: float) -> None:
        """Learn, after `seconds` more of serving, from a step of exp(`log_ratio`) times the expected time.

        parts [K]: each cost's share of the expected time; their sum is 1.
        """
        fading = -math.expm1(-seconds / MEMORY)
        self._covariance += fading * (self._prior - self._covariance)
        along = self._covariance @ parts
        gain = along / (parts @ along + STEP**2)
        self._logs += gain * min(max(log_ratio, -LIMIT), LIMIT)
        self._covariance -= gain[:, None] * along


class Sieve:
    """Chooses the steps to learn from: of every two of about the same size the faster, as disturbances only add time.

    Steps of one size are compared with each other: among steps of other sizes, a rare one whose cost is wrong would
    look disturbed each time. A step that took less than half of the expected time counts at once.
    """

    FAST = -math.log(2)

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, Floats]] = {}

    def add(self, nearest: int, log_ratio: float, parts: Floats) -> tuple[float, Floats] | None:
        """Add a step; returns the one to learn from now, or None.

        `nearest`: index of the cost that contributes most, which tells sizes apart; the others as in
        `Correction.update`.
        """
        before = self._seen.pop(nearest, None)
        if log_ratio < self.FAST:
            return log_ratio, parts
        if before is None:
            self._seen[nearest] = log_ratio, parts
            return None
        return min(before, (log_ratio, parts), key=lambda seen: seen[0])
