"""Corrections of measured costs by what steps take: by which factor each is off, those never tried included.

A Gaussian process over the logs of the factors, updated by a Kalman filter. A factor is the sum of three unknowns: the
speed of the machine, common to all costs; the cost of one table (passes, attention, drafts) against the others; and the
shape of the table, a walk over the logs of the sizes. So one step corrects what it measures most, and everything else
by what it has in common with that. What was learnt fades: a cost that has long not been measured, as that of a draft
where drafts do not pay, follows its next measurement nearly at once.

Shapes: K costs of all tables, one after the other.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Standard deviations of logs, of a profile that nothing is known of: a factor of 8 is two of the first.
SPEED = 1.0
TABLE = 0.7
SHAPE = 0.7
REACH = 2.0  # doublings of size over which the shape's correlation falls to 1 / e
STEP = 0.3  # of what a step takes, around what it should
MEMORY = 60.0  # seconds of steps after which 1 / e of what was learnt counts
LIMIT = math.log(10)  # nothing that one step says counts for more


class Correction:
    """`factors` [K] times the measured costs are what steps lately took."""

    def __init__(self, tables: Sequence[Sequence[int]]) -> None:
        """The measured sizes of each table."""
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
        """[K] one by the variance of each factor's log: much where steps have lately been measured."""
        return np.asarray(1 / self._covariance.diagonal())

    def variance(self, parts: Floats) -> float:
        """Of the log of the factor of a cost that is made of these parts [K]."""
        return float(parts @ self._covariance @ parts)

    def update(self, parts: Floats, log_ratio: float, seconds: float) -> None:
        """After `seconds` more of serving a step took exp(`log_ratio`) times what was expected.

        parts [K]: each cost's part of what was expected; their sum is 1.
        """
        fading = -math.expm1(-seconds / MEMORY)
        self._covariance += fading * (self._prior - self._covariance)
        along = self._covariance @ parts
        gain = along / (parts @ along + STEP**2)
        self._logs += gain * min(max(log_ratio, -LIMIT), LIMIT)
        self._covariance -= np.outer(gain, along)


class Sieve:
    """Which steps are listened to: the median of each three, so that one that was disturbed says nothing.

    Disturbances only add time. So a step that took less than half of what was expected counts at once.
    """

    FAST = -math.log(2)

    def __init__(self) -> None:
        self._seen: list[tuple[float, Floats]] = []

    def add(self, log_ratio: float, parts: Floats) -> tuple[float, Floats] | None:
        """A step; gives the one to learn from now, if there is one. Arguments as of `Correction.update`."""
        if log_ratio < self.FAST:
            return log_ratio, parts
        self._seen.append((log_ratio, parts))
        if len(self._seen) < 3:
            return None
        median = sorted(self._seen, key=lambda seen: seen[0])[1]
        self._seen.clear()
        return median
