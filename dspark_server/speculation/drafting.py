"""Choice of the requests that draft in a step: made before any noise is drawn, from load and results of earlier drafts.

A draft costs the drafter's pass and the verification of its kept tokens, and gains the accepted ones. Sees no token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from dspark_server.speculation.cost_model import CostModel
from dspark_server.speculation.prefix_scheduler import Load, StepCost, admit

PROBING = 0.02  # probe budget, a share of the steps' seconds: drafts that only find out whether a request's drafts pay
OPTIMISM = 0.95  # survival assumed for a probe: if even that does not pay, the reason is the load, not the request


class Candidate(NamedTuple):
    """A request that could draft: its longest useful prefix (0: none), the survival expected of each next token.

    `copies`: its draft is copied from its own context and costs next to nothing; `rate` is its first token's.
    """

    limit: int
    rate: float = 1.0
    probe_due: bool = False
    copies: bool = False


@dataclass(frozen=True)
class DraftPlan:
    """Indices of the candidates that draft, and of those among them that are probes.

    `gain`: tokens per second that they are expected to give, over those of a step without drafts.
    """

    drafting: list[int]
    probing: frozenset[int] = frozenset()
    gain: float = 1.0


class ProbeBudget:
    """Probe budget in seconds: a share of the steps in which probes are due, saved until it pays for one.

    Without a bound, requests that come and go before their acceptance is known make a busy machine spend its time on
    probes: with 16 greedy requests of 96 tokens a third of the steps drafted, and every draft was a probe
    (docs/experiments.md).
    """

    def __init__(self, share: float = PROBING) -> None:
        self._share = share
        self._saved = 0.0

    def afford(self, due: int, seconds: float, cost: Callable[[int], float]) -> int:
        """Number of the `due` requests that may probe in a step of `seconds`; `cost(n)`: seconds that n of them take.

        The budget saved is never more than all of them would need.
        """
        self._saved = min(self._saved + self._share * seconds, cost(due))
        return max((size for size in _sizes(due) if cost(size) <= self._saved), default=0)

    def spend(self, seconds: float) -> None:
        """Subtract the cost of a step's probes."""
        self._saved -= seconds


def choose_drafting(
    candidates: Sequence[Candidate],
    load: Load,
    cost_model: CostModel,
    floor: float | None = None,
    budget: ProbeBudget | None = None,
) -> DraftPlan:
    """The requests whose drafts are expected to pay, best histories first. Decided before any noise is drawn.

    Theta is predicted for growing subsets, with survivals rate^k, the draft's own cost, and the count that selection
    would keep. Requests left out for long enough draft too, if a good draft could pay at this load at all and the probe
    budget `budget` (None: no bound) allows. Copies cost next to nothing to draft: they draft wherever a first token
    could pay.
    """
    if load.room <= 0 or not candidates:
        return DraftPlan([])
    seconds = StepCost.of(cost_model, load, 0, slots=sum(candidate.limit for candidate in candidates))
    plain = best = load.sampling / seconds(0)
    drafting = 0

    def hopeless(rate: float) -> bool:
        """Not even a first token whose draft is free would pay; later ones cost no less, as the curve is convex."""
        return (load.sampling + rate) / seconds(1) <= best

    there = [index for index, candidate in enumerate(candidates) if candidate.limit > 0]
    copies = [index for index in there if candidates[index].copies and not hopeless(candidates[index].rate)]
    able = [index for index in there if not candidates[index].copies]
    copied = (load.sampling + sum(candidates[index].rate for index in copies)) / seconds(len(copies))
    if not able:
        return DraftPlan(copies, gain=copied / plain)
    able.sort(key=lambda index: -candidates[index].rate)

    if not hopeless(candidates[able[0]].rate):
        # A draft runs at a recorded size too: those that fill it cost nothing more.
        sizes = sorted({min(cost_model.full_draft(size), len(able)) for size in _sizes(len(able))})
        thetas = predicted_thetas([candidates[i] for i in able], len(able), sizes, load, cost_model, floor, best)
        if max(thetas) > best:
            drafting, best = sizes[thetas.index(max(thetas))], max(thetas)
    chosen = able[:drafting]
    due = [index for index in able[drafting:] if candidates[index].probe_due]
    if not chosen and hopeless(OPTIMISM):
        due = []

    def cost(more: int) -> float:
        return cost_model.draft(drafting + more) - cost_model.draft(drafting)

    if due and budget:
        due = due[: budget.afford(len(due), seconds(0), cost)]
    if due:
        sizes = [drafting + size for size in _sizes(len(due))]
        thetas = predicted_thetas([candidates[i] for i in chosen + due], drafting, sizes, load, cost_model, floor, best)
        # As many probes as could pay together: were it all or none, a crowd of new requests would never be probed.
        probing = max((size for size, theta in zip(sizes, thetas, strict=True) if theta > best), default=drafting)
        due = due[: probing - drafting]
        if budget:
            budget.spend(cost(len(due)))
    return DraftPlan(sorted([*copies, *chosen, *due]), frozenset(due), max(best, copied) / plain)


def predicted_thetas(
    candidates: Sequence[Candidate],
    known: int,
    sizes: Sequence[int],
    load: Load,
    cost_model: CostModel,
    floor: float | None = None,
    above: float = 0.0,
) -> list[float]:
    """Theta [S] if the first sizes[s] candidates draft and `Causal` then selects; survivals are rate^k.

    The candidates after the first `known` have no history, and OPTIMISM is taken for their rate. 0 where a bound shows
    that Theta is not `above`: on a busy machine that holds for most of them, and the walk takes most of the time.
    """
    rates = [candidate.rate if index < known else OPTIMISM for index, candidate in enumerate(candidates)]
    limits = [candidate.limit for candidate in candidates]
    slots = list(accumulate(limits))
    # On a convex curve no draft token costs less than the first, and the first costs least on the longest curve. From
    # it follow the least gain that pays, and the most that each block could gain above the cost of its tokens.
    bare = StepCost.of(cost_model, load, 0, slots[-1])
    price = above * (bare(1) - bare(0))
    left = list(accumulate(_left_over(rate, limit, price) for rate, limit in zip(rates, limits, strict=True)))
    thetas = [0.0] * len(sizes)
    survival: list[list[float]] = []  # of the first candidates: `sizes` rise
    for index, size in enumerate(sizes):
        if left[size - 1] >= above * (bare(0) + cost_model.draft(size)) * (1 - 1e-9) - load.sampling:
            cost, there = StepCost.of(cost_model, load, size, slots[size - 1]), len(survival)
            further = zip(rates[there:size], limits[there:size], strict=True)
            survival += [[rate**k for k in range(1, limit + 1)] for rate, limit in further]
            room = cost.room(load, floor)
            thetas[index] = admit(survival, limits[:size], load.sampling, room, cost).theta
    return thetas


def _left_over(rate: float, limit: int, price: float) -> float:
    """The most that a block of survivals rate^k can gain, in tokens, if each token kept costs `price` tokens."""
    total, survival = 0.0, rate
    for _ in range(limit):
        if survival <= price:
            break
        total += survival - price
        survival *= rate
    return total


def _sizes(count: int) -> list[int]:
    """1, 2, 4, ... and `count` itself: enough to find the number of drafts that still pays."""
    return sorted({*(1 << power for power in range(count.bit_length())), count} - {0})
