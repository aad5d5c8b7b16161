"""A request's record of its own drafts: the expected survival of its next ones, and the time of its next probe."""

from collections.abc import Sequence
from dataclasses import dataclass

MEMORY = 0.9  # weight of the record so far after one more draft
PRIOR_WEIGHT = 6.0  # weight of the prior, in draft tokens
LONGEST_WAIT = 64  # steps between two probes of a request that does not draft


@dataclass
class SurvivalHistory:
    """One request's record. All of it is known before the next draft's noise is drawn, so selection may read it.

    With a confidence head the record keeps the estimated survival instead of the outcome: the probabilities of its
    tokens tell as much as several outcomes would, and a draft that selection dropped has them too.
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
        """The request has been left out long enough to probe."""
        return self.idle >= self.wait

    def expected(self, survival: Sequence[float]) -> None:
        """Record a draft whose prefixes [gamma] survive with these probabilities."""
        self._add(sum(survival), 1 + sum(survival[:-1]))

    def judged(self, verified: int, accepted: int) -> None:
        """Record a draft of which `verified` tokens were verified and `accepted` accepted."""
        if verified:
            self._add(accepted, min(verified, accepted + 1))

    def _add(self, stood: float, tried: float) -> None:
        self.stood = self.memory * self.stood + stood
        self.tried = self.memory * self.tried + tried

    def drafted(self, *, probing: bool) -> None:
        """It drafts in this step, because that pays or as a probe; after a probe the next wait is twice as long."""
        self.idle = 0
        self.wait = min(2 * self.wait, LONGEST_WAIT) if probing else 1

    def left_out(self) -> None:
        """It does not draft in this step."""
        self.idle += 1
