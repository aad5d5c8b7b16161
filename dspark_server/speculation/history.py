"""What a request's own drafts have come to: how likely its next ones are to survive, and when to try again."""

from collections.abc import Sequence
from dataclasses import dataclass

MEMORY = 0.9  # of what was seen before, this much counts after one more draft
PRIOR_WEIGHT = 6.0  # the prior counts like so many draft tokens
LONGEST_WAIT = 64  # steps between two probes of a request that does not draft


@dataclass
class SurvivalHistory:
    """One request's record. All of it is known before the next draft's noise is drawn, so selection may read it.

    What confidence says of a draft is kept rather than what became of it, where there is a confidence: the chances of
    its tokens tell as much as several throws of their coins, and a draft that selection dropped has them too.
    """

    stood: float = 0.0
    tried: float = 0.0
    idle: int = 0  # steps since the last draft
    wait: int = 1  # idle steps until the next probe
    memory: float = MEMORY

    def rate(self, prior: float, weight: float = PRIOR_WEIGHT) -> float:
        """Expected survival of a draft token whose predecessors survived; `prior` counts like `weight` draft tokens."""
        return (self.stood + weight * prior) / (self.tried + weight)

    @property
    def probe_due(self) -> bool:
        """It has been left out long enough."""
        return self.idle >= self.wait

    def expected(self, survival: Sequence[float]) -> None:
        """A draft was made whose prefixes [gamma] survive with these chances."""
        self._add(sum(survival), 1 + sum(survival[:-1]))

    def judged(self, verified: int, accepted: int) -> None:
        """Of a draft `verified` tokens were looked at, of which `accepted` stood."""
        if verified:
            self._add(accepted, min(verified, accepted + 1))

    def _add(self, stood: float, tried: float) -> None:
        self.stood = self.memory * self.stood + stood
        self.tried = self.memory * self.tried + tried

    def drafted(self, *, probing: bool) -> None:
        """It drafts in this step because it pays, or to see whether it would: then the next wait is twice as long."""
        self.idle = 0
        self.wait = min(2 * self.wait, LONGEST_WAIT) if probing else 1

    def left_out(self) -> None:
        """It does not draft in this step."""
        self.idle += 1
