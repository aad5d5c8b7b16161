"""Exploring steps, larger or smaller than pays by the cost table: steps chosen by a wrong cost may never measure it.

The number of draft tokens that such a step verifies is known before its blocks exist, so it is as lossless as `lagged`.
"""

import math
from collections.abc import Sequence

from dspark_server.speculation.cost_model import CostModel
from dspark_server.speculation.drafting import Candidate, DraftPlan, ProbeBudget
from dspark_server.speculation.prefix_scheduler import Load, StepCost

EXPLORING = 0.005  # probe budget for steps larger than pays, as a share of the steps' seconds
PLAIN = 0.03  # the same for steps without drafts
KNOWN = 0.15  # standard deviation of the log of a cost that counts as known
DEVIATIONS = 2.0  # standard deviations by which the cost of a step without drafts may be too dear


class Exploration:
    """Decides when a step explores.

    A larger step has up to twice the drafting requests and twice the tokens of the usual one, and may verify at least 2
    draft tokens. Where drafts are usual, a plain step has none: the gain of drafts is measured against it. `count` is
    the number of draft tokens that the present step verifies to explore, None if it is not a larger one.
    """

    def __init__(self, cost_model: CostModel, floor: float | None) -> None:
        self.count: int | None = None
        self._cost_model = cost_model
        self._floor = floor
        self._budget = ProbeBudget(EXPLORING)
        self._plain = ProbeBudget(PLAIN)
        self._usual = 0  # draft tokens verified by the last step that did not explore

    def extend(self, choice: DraftPlan, candidates: Sequence[Candidate], load: Load) -> DraftPlan:
        """The requests that draft in this step: `choice`, or others if it explores. Runs before any noise is drawn."""
        self.count = None
        if not choice.drafting:
            self._usual = 0
        elif self._wants_plain(choice, load):
            return DraftPlan([])
        chosen = set(choice.drafting)
        others = [i for i, each in enumerate(candidates) if each.limit > 0 and not each.copies and i not in chosen]
        backbone = sum(not candidates[index].copies for index in chosen)
        more = sorted(others, key=lambda index: -candidates[index].rate)[: max(1, backbone)]
        drafting = [*choice.drafting, *more]
        room = StepCost.of(self._cost_model, load, backbone + len(more)).room(load, self._floor)
        slots = sum(candidates[index].limit for index in drafting)
        count = min(room, slots, max(2, load.tokens + 2 * self._usual))
        if count <= self._usual:
            return choice
        usual = load.tokens + self._usual
        step, price = self._prices(usual, load.tokens + count, backbone, backbone + len(more))
        if price <= 0 or not self._budget.afford(1, step, lambda _: price):
            return choice
        self._budget.spend(price)
        self.count = count
        return DraftPlan(sorted(drafting), choice.probing | frozenset(more))

    def _wants_plain(self, choice: DraftPlan, load: Load) -> bool:
        """Whether this step does without drafts, because that could well be faster: its cost was not measured lately.

        Its whole time counts as the price, though it commits tokens too.
        """
        raw, most = self._cost_model.raw, len(self._cost_model.raw) - 1
        price = float(raw[min(load.tokens, most)])
        step = float(raw[min(load.tokens + self._usual, most)])
        doubt = self._cost_model.doubt(load.tokens)
        promising = doubt > KNOWN and choice.gain < math.exp(DEVIATIONS * doubt)
        wanted = self._plain.afford(1, step, lambda _: price) > 0 and promising
        if wanted:
            self._plain.spend(price)
        return wanted

    def verified(self, lengths: Sequence[int]) -> None:
        """Record the prefix lengths that this step verifies."""
        if self.count is None:
            self._usual = sum(lengths)

    def _prices(self, usual: int, tokens: int, backbone: int, drafting: int) -> tuple[float, float]:
        """Seconds of the usual step, and extra seconds of one with `tokens` tokens and `drafting` drafting requests.

        The extra time is at most one usual pass per usual pass's worth of tokens, whatever the table says, and a draft
        is shorter than a pass: an error of the table must not make its own discovery too expensive.
        """
        raw, most = self._cost_model.raw, len(self._cost_model.raw) - 1
        there, draft = float(raw[min(usual, most)]), self._cost_model.draft(backbone)
        verify = min(float(raw[min(tokens, most)]) - there, there * -(-(tokens - usual) // usual))
        return there + draft, verify + min(self._cost_model.draft(drafting) - draft, there)
