"""Who drafts in a step: decided before any noise is drawn, from load and from what earlier drafts came to.

A draft costs the drafter's pass and the verification of what is kept of it, and brings what survives. Sees no token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from dspark_server.speculation.admission import Load, StepCost, admit
from dspark_server.speculation.capacity import Capacity

PROBING = 0.02  # of the steps' seconds, what may be spent on drafts that only find out whether a request's drafts pay
OPTIMISM = 0.95  # survival that a probe may hope for: where even that does not pay, load is the reason, not the request


class Candidate(NamedTuple):
    """A request that could draft: its longest useful prefix (0: none), the survival expected of each next token.

    `copies`: its draft is copied from its own context and costs next to nothing; `rate` is its first token's.
    """

    limit: int
    rate: float = 1.0
    probe_due: bool = False
    copies: bool = False


@dataclass(frozen=True)
class Choice:
    """Indices of the candidates that draft, and of those among them that only probe."""

    drafting: list[int]
    probing: frozenset[int] = frozenset()


class Purse:
    """Seconds there are for probes: a share of the steps in which some are due, saved until it pays for one.

    Without a bound, requests that come and go faster than they can be known make a busy machine pay for getting to know
    them: with 16 greedy requests of 96 tokens a third of the steps drafted, and every draft was a probe
    (docs/experiments.md).
    """

    def __init__(self, share: float = PROBING) -> None:
        self._share = share
        self._saved = 0.0

    def afford(self, due: int, seconds: float, cost: Callable[[int], float]) -> int:
        """How many of the `due` requests may probe in a step of `seconds`; `cost(n)`: seconds that n of them draft for.

        No more is saved than all of them would need.
        """
        self._saved = min(self._saved + self._share * seconds, cost(due))
        return max((size for size in _sizes(due) if cost(size) <= self._saved), default=0)

    def spend(self, seconds: float) -> None:
        """So much has a step's probing cost."""
        self._saved -= seconds


def choose_drafting(
    candidates: Sequence[Candidate],
    load: Load,
    capacity: Capacity,
    floor: float | None = None,
    purse: Purse | None = None,
) -> Choice:
    """Before any noise is drawn: the requests whose drafts are expected to pay for themselves, best histories first.

    Theta is predicted for growing subsets, with survivals rate^k, the draft's own cost, and the count that selection
    would keep. Requests left out for long enough draft too, if a good draft could pay at this load at all and the
    `purse` (None: a full one) allows. Copies cost next to nothing to draft: they do wherever a first token could pay.
    """
    if load.room <= 0 or not candidates:
        return Choice([])
    seconds = StepCost.of(capacity, load, 0, slots=sum(candidate.limit for candidate in candidates))
    best, drafting = load.sampling / seconds(0), 0

    def hopeless(rate: float) -> bool:
        """Not even a first token that costs no draft would pay; later ones cost no less, as the curve is convex."""
        return (load.sampling + rate) / seconds(1) <= best

    there = [index for index, candidate in enumerate(candidates) if candidate.limit > 0]
    copies = [index for index in there if candidates[index].copies and not hopeless(candidates[index].rate)]
    able = [index for index in there if not candidates[index].copies]
    if not able:
        return Choice(copies)
    able.sort(key=lambda index: -candidates[index].rate)

    if not hopeless(candidates[able[0]].rate):
        sizes = _sizes(len(able))
        thetas = predicted_thetas([candidates[i] for i in able], len(able), sizes, load, capacity, floor, best)
        if max(thetas) > best:
            drafting, best = sizes[thetas.index(max(thetas))], max(thetas)
    chosen = able[:drafting]
    due = [index for index in able[drafting:] if candidates[index].probe_due]
    if not chosen and hopeless(OPTIMISM):
        due = []

    def cost(more: int) -> float:
        return capacity.draft(drafting + more) - capacity.draft(drafting)

    if due and purse:
        due = due[: purse.afford(len(due), seconds(0), cost)]
    if due:
        sizes = [drafting + size for size in _sizes(len(due))]
        thetas = predicted_thetas([candidates[i] for i in chosen + due], drafting, sizes, load, capacity, floor, best)
        # As many probes as could pay together: were it all or none, a crowd of newcomers would never find out.
        probing = max((size for size, theta in zip(sizes, thetas, strict=True) if theta > best), default=drafting)
        due = due[: probing - drafting]
        if purse:
            purse.spend(cost(len(due)))
    return Choice(sorted([*copies, *chosen, *due]), frozenset(due))


def predicted_thetas(
    candidates: Sequence[Candidate],
    known: int,
    sizes: Sequence[int],
    load: Load,
    capacity: Capacity,
    floor: float | None = None,
    above: float = 0.0,
) -> list[float]:
    """Theta [S] if the first sizes[s] candidates draft and `Causal` then selects; survivals are rate^k.

    Of the candidates after the first `known` nothing is known, and OPTIMISM is taken for their rate. 0 where a bound
    says that Theta is not `above`: on a busy machine that is most of them, and the walk is what takes time.
    """
    rates = [candidate.rate if index < known else OPTIMISM for index, candidate in enumerate(candidates)]
    limits = [candidate.limit for candidate in candidates]
    slots = list(accumulate(limits))
    # No draft token costs less than the first, on a convex curve, and it least on the longest: what one must bring, and
    # what each block could at best have left over after that, for what its draft costs.
    bare = StepCost.of(capacity, load, 0, slots[-1])
    price = above * (bare(1) - bare(0))
    left = list(accumulate(_left_over(rate, limit, price) for rate, limit in zip(rates, limits, strict=True)))
    thetas = [0.0] * len(sizes)
    for index, size in enumerate(sizes):
        if left[size - 1] >= above * (bare(0) + capacity.draft(size)) * (1 - 1e-9) - load.sampling:
            cost, block = StepCost.of(capacity, load, size, slots[size - 1]), zip(rates[:size], limits, strict=False)
            survival = [[rate**k for k in range(1, limit + 1)] for rate, limit in block]
            thetas[index] = admit(survival, limits[:size], load.sampling, cost.room(load, floor), cost).theta
    return thetas


def _left_over(rate: float, limit: int, price: float) -> float:
    """What a block of survivals rate^k brings at most, in tokens, if each of those kept costs `price` tokens."""
    total, survival = 0.0, rate
    for _ in range(limit):
        if survival <= price:
            break
        total += survival - price
        survival *= rate
    return total


def _sizes(count: int) -> list[int]:
    """1, 2, 4, ... and `count` itself: enough to see where drafting stops paying."""
    return sorted({*(1 << power for power in range(count.bit_length())), count} - {0})
