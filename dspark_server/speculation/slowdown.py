"""Times of steps against the profile of the start: their ratio, and a warning when it reaches five."""

import logging
import math

logger = logging.getLogger(__name__)

SLOW = 5.0  # times the profile's seconds
OVER = 2.5  # below this, steps are no longer slow
PATIENCE = 5.0  # seconds of steps over which the ratio is averaged, and for which it must stay
LONGEST = 1.0  # seconds that a step counts for at most: one step held up for a minute does not yet mean a slow machine
EXTREME = math.log(100)  # bound on the log ratio of one step


class Slowdown:
    """`ratio`: recent seconds of steps for each second that the profile gives for them, 1 before the first.

    `slow`: steps have taken SLOW times as long for PATIENCE seconds, and have not been below OVER times for as long
    since. Logged once at either end. Without steps nothing changes.
    """

    def __init__(self) -> None:
        self.slow = False
        self._log = 0.0
        self._contrary = 0.0  # seconds for which the ratio has contradicted `slow`

    @property
    def ratio(self) -> float:
        return math.exp(self._log)

    def observe(self, ratio: float, seconds: float) -> None:
        """Add a step that took `seconds`, `ratio` times the profile's."""
        seconds = min(seconds, LONGEST)
        log = min(max(math.log(ratio), -EXTREME), EXTREME)
        self._log -= math.expm1(-seconds / PATIENCE) * (log - self._log)
        contrary = self.ratio < OVER if self.slow else self.ratio > SLOW
        self._contrary = self._contrary + seconds if contrary else 0.0
        if self._contrary >= PATIENCE:
            self._turn()

    def _turn(self) -> None:
        self.slow, self._contrary = not self.slow, 0.0
        if self.slow:
            logger.warning(
                "steps take %.1f times what the cost profile says: look for busy neighbours and CPU limits; if it "
                "stays so, start with --measure-costs-again",
                self.ratio,
            )
        else:
            logger.warning("steps are no longer slow: they take %.1f times what the cost profile says", self.ratio)
