"""Live acceptance against what the drafter's calibration promises: their ratio, and a warning when it is far below."""

import logging

logger = logging.getLogger(__name__)

MEMORY = 0.999  # weight of the past for each verified draft token: about the last thousand count
ENOUGH = 1000.0  # predicted survivals below which there is no verdict
LOW = 0.6  # ratio below which calibration is not believed
AGAIN = 0.8  # ratio above which it is believed again


class Trust:
    """`ratio`: draft tokens that survived for each that was predicted to, 1 before the first; of the last thousands.

    `low`: it has fallen below LOW, and not risen above AGAIN since. Logged once at either end. A drafter made for other
    weights looks like this, and so does text that is unlike the one it was calibrated on.
    """

    def __init__(self) -> None:
        self.low = False
        self._predicted = 0.0
        self._survived = 0.0
        self._seen = 0.0

    @property
    def ratio(self) -> float:
        return self._survived / self._predicted if self._predicted else 1.0

    def observe(self, predicted: float, survived: int, tokens: int) -> None:
        """Add a block: `tokens` verified draft tokens, the sum of their predicted survivals, those that survived."""
        memory = MEMORY**tokens
        self._predicted = memory * self._predicted + predicted
        self._survived = memory * self._survived + survived
        self._seen += predicted
        if self._seen < ENOUGH or (self.ratio >= LOW if not self.low else self.ratio <= AGAIN):
            return
        self.low = not self.low
        if self.low:
            logger.warning(
                "draft tokens survive %.2f times as often as the drafter's calibration says: is it made for these "
                "weights? If it is, run dspark-server calibrate with prompts like those served",
                self.ratio,
            )
        else:
            logger.warning("draft tokens survive %.2f times as often as calibration says: as it should be", self.ratio)
