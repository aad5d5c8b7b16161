"""Verification policies: the requests that draft, and the number of draft tokens of each that the target verifies.

A policy is a function of survivals, costs and load, of this step and of earlier ones (`lagged`'s counts, the budgets
for probes and for exploring), and sees no token (DSpark §3.2.2, §5.2). The choice of drafting requests is in
`drafting`, steps that explore in `exploration`, Algorithm 1 in `admission`; shapes as in the latter.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from dspark_server.errors import ConfigError
from dspark_server.speculation.cost_model import CostModel
from dspark_server.speculation.drafting import Candidate, DraftPlan, ProbeBudget, choose_drafting
from dspark_server.speculation.exploration import Exploration
from dspark_server.speculation.prefix_scheduler import Floats, Load, Ranked, StepCost, admit, best_count

POLICIES = ("causal", "lagged", "fixed", "threshold", "none")


class Selection(Protocol):
    """A verification policy."""

    name: str

    def drafting(self, candidates: Sequence[Candidate], load: Load) -> DraftPlan:
        """Before the draft: choose the requests that draft."""

    def count(self, slots: int, load: Load, backbone: int = 0) -> int | None:
        """Before a draft of `slots` tokens, `backbone` of its blocks the drafter's: number that `lengths` will keep.

        None: it depends on the draft. Otherwise the likeliest are kept.
        """
        return None

    def lengths(
        self,
        survival: Tensor,
        limits: Sequence[int],
        load: Load,
        *,
        by_drafter: int | None = None,
        slots: int | None = None,
    ) -> list[int]:
        """After the draft: the prefix length of each drafting request, at most its limit and `load.room` in all.

        `survival` [R, gamma] float32 is the calibrated probability that the prefix up to each position survives.
        Known before the blocks, which may have lowered limits: the number of rows that are the drafter's (None: all)
        and of draft tokens (None: limits are unchanged).
        """


class Fixed(Selection):
    """Every drafting request verifies its whole block; when room is short the oldest requests go first."""

    name = "fixed"

    def drafting(self, candidates: Sequence[Candidate], load: Load) -> DraftPlan:
        chosen: list[int] = []
        room = load.room
        for index, candidate in enumerate(candidates):
            if 0 < candidate.limit <= room:
                chosen.append(index)
                room -= candidate.limit
        return DraftPlan(chosen)

    def lengths(
        self,
        survival: Tensor,
        limits: Sequence[int],
        load: Load,
        *,
        by_drafter: int | None = None,
        slots: int | None = None,
    ) -> list[int]:
        return list(limits)


class Threshold(Selection):
    """Each request verifies its prefix as long as its survival is at least `threshold` (figure 5 of the paper)."""

    name = "threshold"

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def drafting(self, candidates: Sequence[Candidate], load: Load) -> DraftPlan:
        return DraftPlan([index for index, candidate in enumerate(candidates) if candidate.limit > 0 and load.room > 0])

    def lengths(
        self,
        survival: Tensor,
        limits: Sequence[int],
        load: Load,
        *,
        by_drafter: int | None = None,
        slots: int | None = None,
    ) -> list[int]:
        ranked = Ranked.of(survival, limits)
        return ranked.first(min(load.room, int((ranked.values >= self._threshold).sum())))


class Off(Selection):
    """No request drafts; the drafter's context is still kept, so that it can be switched on at any step."""

    name = "none"

    def drafting(self, candidates: Sequence[Candidate], load: Load) -> DraftPlan:
        return DraftPlan([])

    def lengths(
        self,
        survival: Tensor,
        limits: Sequence[int],
        load: Load,
        *,
        by_drafter: int | None = None,
        slots: int | None = None,
    ) -> list[int]:
        return [0] * len(limits)


class LoadAware(Selection):
    """Requests draft if that is expected to pay. `floor`: steps per second, and so tokens, that every user must get."""

    def __init__(self, cost_model: CostModel, floor: float | None = None) -> None:
        self._cost_model = cost_model
        self._floor = floor
        self._budget = ProbeBudget()
        self._exploration = Exploration(cost_model, floor)

    def drafting(self, candidates: Sequence[Candidate], load: Load) -> DraftPlan:
        choice = choose_drafting(candidates, load, self._cost_model, self._floor, self._budget)
        return self._exploration.extend(choice, candidates, load)


class Causal(LoadAware):
    """Algorithm 1: admit by falling survival, stop at the first token that does not raise Theta.

    The cost curve is the convex minorant of the measured one from the step's tokens to about the end of all its drafts:
    on it this greedy walk ends at the global best. Where passes are recorded, see `admit`.
    """

    name = "causal"

    def __init__(self, cost_model: CostModel, floor: float | None = None) -> None:
        super().__init__(cost_model, floor)
        self._last: Floats | None = None

    def _usual(self, survival: Tensor, limits: Sequence[int]) -> Floats | None:
        """Ranked survivals of the last step that drafted, for as many slots as this one has; keeps this one's."""
        if self._cost_model.stairs is None:
            return None
        last, self._last = self._last, _ranked(survival, limits)
        return None if last is None else _stretched(last, survival.numel())

    def lengths(
        self,
        survival: Tensor,
        limits: Sequence[int],
        load: Load,
        *,
        by_drafter: int | None = None,
        slots: int | None = None,
    ) -> list[int]:
        usual = self._usual(survival, limits)
        if self._exploration.count is not None:
            return Ranked.of(survival, limits).first(self._exploration.count)
        backbone = len(limits) if by_drafter is None else by_drafter
        slots = sum(limits) if slots is None else slots
        seconds = StepCost.of(self._cost_model, load, backbone, slots, apart=True)
        room = seconds.room(load, self._floor)
        lengths = admit(survival.tolist(), limits, load.sampling, room, seconds, usual).lengths
        self._exploration.verified(lengths)
        return lengths


class Lagged(LoadAware):
    """§5.2: survivals of two steps ago decide how many tokens are verified, and today's decide which.

    The number K is then fixed before this step's blocks exist, so that a search over every number, on the measured
    curve itself and at this step's load, stays lossless; the next pass's shape is known before its draft is.
    """

    name = "lagged"
    LAG = 2

    def __init__(self, cost_model: CostModel, floor: float | None = None) -> None:
        super().__init__(cost_model, floor)
        self._past: deque[Floats] = deque(maxlen=self.LAG)  # survivals of recent steps, falling, 0 where unusable

    def lengths(
        self,
        survival: Tensor,
        limits: Sequence[int],
        load: Load,
        *,
        by_drafter: int | None = None,
        slots: int | None = None,
    ) -> list[int]:
        ranked = Ranked.of(survival, limits)
        # Counted in whole blocks, not in usable slots: whether a slot is usable is known from this block's own tokens.
        whole = survival.numel()
        kept = self.count(whole, load, len(limits) if by_drafter is None else by_drafter)
        self._past.append(_ranked(survival, limits))
        lengths = ranked.first(kept)
        self._exploration.verified(lengths)
        return lengths

    def count(self, slots: int, load: Load, backbone: int = 0) -> int:
        if self._exploration.count is not None:
            return self._exploration.count
        seconds = StepCost.of(self._cost_model, load, backbone)
        room = min(slots, seconds.room(load, self._floor))
        if len(self._past) < self.LAG:
            return room
        return best_count(_stretched(self._past[0], slots), seconds.upto(slots), load, room)


def _ranked(survival: Tensor, limits: Sequence[int]) -> Floats:
    """Survivals [R gamma], falling, 0 beyond limits."""
    values = Ranked.of(survival, limits).values
    return np.pad(values, (0, survival.numel() - len(values)))


def _stretched(survivals: Floats, slots: int) -> Floats:
    """Survivals [slots], falling, that are distributed as `survivals` are."""
    if not len(survivals):
        return np.zeros(slots)
    return survivals[((np.arange(slots) + 0.5) * len(survivals) / max(1, slots)).astype(np.int64)]


def build_selection(
    name: str, cost_model: CostModel | None = None, *, threshold: float = 0.5, floor: float | None = None
) -> Selection:
    """The policy called `name`; the load-aware ones need the cost model. Raises ConfigError for an unknown name."""
    if name == "fixed":
        return Fixed()
    if name == "threshold":
        return Threshold(threshold)
    if name == "none":
        return Off()
    if name not in POLICIES:
        raise ConfigError(f"Selection policy {name!r} is not known; choose from {', '.join(POLICIES)}.")
    assert cost_model is not None, f"selection {name} reads a cost model"
    return Causal(cost_model, floor) if name == "causal" else Lagged(cost_model, floor)
