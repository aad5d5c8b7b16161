"""Prefix selection: who drafts, and how many draft tokens of each request the target verifies (DSpark §3.2.2, §5.2).

A policy is a pure function of survivals, costs and load, and sees no token. Whether position k of a request is kept
may depend on other requests and on confidences up to k (which depend on tokens before k), never on x_k or later
(DSPARK.md, "Non-anticipating").

Shapes: R requests, gamma draft tokens each, a_{r,k} the chance that request r's prefix up to k survives. A step is
worth Theta = tau / seconds, tau the tokens it is expected to commit.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_server.errors import ConfigError
from dspark_server.speculation.capacity import Capacity

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

POLICIES = ("causal", "lagged", "fixed", "threshold", "none")
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
class Load:
    """What the pass holds before any draft: `tokens` to run, of which `sampling` give a token each.

    `context` sums the tokens of context of all runs, `pairs` those of all query tokens; `per_draft` is the mean context
    of those that could draft, `room` how many draft tokens may join.
    """

    sampling: int
    tokens: int
    room: int
    context: float = 0.0
    pairs: float = 0.0
    per_draft: float = 0.0


@dataclass(frozen=True)
class Choice:
    """Indices of the candidates that draft, and of those among them that only probe."""

    drafting: list[int]
    probing: frozenset[int] = frozenset()


class Selection(Protocol):
    """A verification policy."""

    name: str

    def drafting(self, candidates: Sequence[Candidate], load: Load) -> Choice:
        """Before the draft: who drafts at all."""

    def count(self, slots: int, load: Load) -> int | None:
        """Before a draft of `slots` tokens: how many `lengths` will keep, likeliest first; None: depends on them."""

    def lengths(self, survival: Tensor, limits: Sequence[int], load: Load, backbone: int | None = None) -> list[int]:
        """After the draft: the prefix length of each drafting request, at most its limit and `load.room` in all.

        `survival` [R, gamma] float32 is the calibrated chance that the prefix up to each position survives; `backbone`
        is how many of the blocks the drafter made (None: all), the others being copies.
        """


class Fixed:
    """Every drafting request verifies its whole block; when room is short the oldest requests go first."""

    name = "fixed"

    def drafting(self, candidates: Sequence[Candidate], load: Load) -> Choice:
        chosen: list[int] = []
        room = load.room
        for index, candidate in enumerate(candidates):
            if 0 < candidate.limit <= room:
                chosen.append(index)
                room -= candidate.limit
        return Choice(chosen)

    def count(self, slots: int, load: Load) -> int | None:
        return None

    def lengths(self, survival: Tensor, limits: Sequence[int], load: Load, backbone: int | None = None) -> list[int]:
        return list(limits)


class Threshold:
    """Each request verifies its prefix as long as its survival is at least `threshold` (figure 5 of the paper)."""

    name = "threshold"

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def drafting(self, candidates: Sequence[Candidate], load: Load) -> Choice:
        return Choice([index for index, candidate in enumerate(candidates) if candidate.limit > 0 and load.room > 0])

    def count(self, slots: int, load: Load) -> int | None:
        return None

    def lengths(self, survival: Tensor, limits: Sequence[int], load: Load, backbone: int | None = None) -> list[int]:
        ranked = Ranked.of(survival, limits)
        return ranked.first(min(load.room, int((ranked.values >= self._threshold).sum())))


class Off:
    """Nobody drafts; the drafter's context is still kept, so that it can be switched on at any step."""

    name = "none"

    def drafting(self, candidates: Sequence[Candidate], load: Load) -> Choice:
        return Choice([])

    def count(self, slots: int, load: Load) -> int | None:
        return None

    def lengths(self, survival: Tensor, limits: Sequence[int], load: Load, backbone: int | None = None) -> list[int]:
        return [0] * len(limits)


class Causal:
    """Algorithm 1: admit by falling survival, stop at the first token that does not raise Theta.

    The cost curve is the convex minorant of the measured one from the step's tokens on: on it this greedy walk ends at
    the global best.
    `floor` bounds the step so that every user gets at least that many steps, and so tokens, a second.
    """

    name = "causal"

    def __init__(self, capacity: Capacity, floor: float | None = None) -> None:
        self._capacity = capacity
        self._floor = floor
        self._purse = Purse()

    def drafting(self, candidates: Sequence[Candidate], load: Load) -> Choice:
        return choose_drafting(candidates, load, self._capacity, self._floor, self._purse)

    def count(self, slots: int, load: Load) -> int | None:
        return None

    def lengths(self, survival: Tensor, limits: Sequence[int], load: Load, backbone: int | None = None) -> list[int]:
        seconds = StepCost.of(self._capacity, load, _or(backbone, limits), convex=True)
        return admit(survival.tolist(), limits, load.sampling, seconds.room(load, self._floor), seconds).lengths


class Lagged:
    """§5.2: how many tokens are verified is decided by the survivals of two steps ago, which ones by today's.

    The number K is then fixed before this step's blocks exist, so that a search over all of them, on the measured curve
    as it is, stays lossless; the next pass's shape is known before its draft is.
    """

    name = "lagged"
    LAG = 2

    def __init__(self, capacity: Capacity, floor: float | None = None) -> None:
        self._capacity = capacity
        self._floor = floor
        self._purse = Purse()
        self._shares: deque[float] = deque(maxlen=self.LAG)

    def drafting(self, candidates: Sequence[Candidate], load: Load) -> Choice:
        return choose_drafting(candidates, load, self._capacity, self._floor, self._purse)

    def lengths(self, survival: Tensor, limits: Sequence[int], load: Load, backbone: int | None = None) -> list[int]:
        ranked = Ranked.of(survival, limits)
        seconds = StepCost.of(self._capacity, load, _or(backbone, limits), convex=False).upto(len(ranked.values))
        best = best_count(ranked.values, seconds, load, self._floor)
        # Counted in whole blocks, not in usable slots: whether a slot is usable is known from this block's own tokens.
        slots = survival.numel()
        kept = self.count(slots, load)
        self._shares.append(best / max(1, slots))
        return ranked.first(kept)

    def count(self, slots: int, load: Load) -> int:
        share = self._shares[0] if len(self._shares) == self.LAG else 1.0
        return min(load.room, round(share * slots))


@dataclass(frozen=True)
class Ranked:
    """All (request, position) within their limits by falling survival, ties to the earlier position of a request.

    values [n] survivals; request [n]: whose each is. Any first count of them is a prefix of every block.
    """

    values: Floats
    request: Integers
    requests: int

    @classmethod
    def of(cls, survival: Tensor, limits: Sequence[int]) -> "Ranked":
        """Rank survivals [R, gamma], of which each row never rises."""
        return cls.rank(survival.double().numpy(), limits)

    @classmethod
    def rank(cls, survival: Floats, limits: Sequence[int]) -> "Ranked":
        """The same from an array."""
        inside = np.arange(survival.shape[1]) < np.asarray(limits, dtype=np.int64).reshape(-1, 1)
        # A NaN says nothing of any token: it is last, and so is all that follows it.
        falling = np.minimum.accumulate(np.nan_to_num(survival, nan=0.0), axis=1)
        values, request = falling[inside], np.nonzero(inside)[0]
        order = np.argsort(-values, kind="stable")
        return cls(values[order], request[order], len(limits))

    def first(self, count: int) -> list[int]:
        """Each request's prefix length when the first `count` are kept."""
        lengths: list[int] = np.bincount(self.request[:count], minlength=self.requests).tolist()
        return lengths


def keep_likeliest(survival: Tensor, limits: Tensor, count: Tensor) -> Tensor:
    """`Ranked.first` in torch, reading nothing on the host: the prefix lengths [R] int64 when `count` [1] are kept.

    survival [R, gamma] float32, limits [R] int64.
    """
    inside = torch.arange(survival.shape[1], device=survival.device) < limits.unsqueeze(1)
    falling = survival.nan_to_num(nan=0.0).cummin(dim=1).values
    order = torch.where(inside, falling, -1.0).flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return ((rank.view_as(inside) < count) & inside).sum(1)


def _or(backbone: int | None, limits: Sequence[int]) -> int:
    return len(limits) if backbone is None else backbone


@dataclass(frozen=True)
class StepCost:
    """Seconds that tau is bought with when so many draft tokens are verified.

    Prefill tokens in the pass make each draft token as dear as it then is, but what they cost themselves buys other
    tokens than tau: were it counted, any draft would look cheap beside a long chunk.
    """

    table: Floats  # seconds of the target pass, by draft tokens
    fixed: float
    each: float

    @classmethod
    def of(cls, capacity: Capacity, load: Load, requests: int, *, convex: bool) -> "StepCost":
        """Of a step in which `requests` draft; `convex`: on the minorant of the measured curve from its tokens on."""
        raw = capacity.raw
        tokens, sampling = (min(count, len(raw) - 1) for count in (load.tokens, load.sampling))
        prefill = float(raw[tokens] - raw[sampling])
        fixed = capacity.draft(requests) + capacity.overhead + capacity.attention(load.context, load.pairs) - prefill
        each = capacity.attention(0.0, load.per_draft)
        return cls(capacity.convex(tokens) if convex else raw[tokens:], fixed, each)

    def __call__(self, count: int) -> float:
        """Seconds with `count` draft tokens."""
        return max(float(self.table[min(count, len(self.table) - 1)]) + self.fixed + count * self.each, 1e-9)

    def upto(self, drafts: int) -> Floats:
        """[drafts + 1] seconds with 0 .. drafts draft tokens."""
        count = np.arange(drafts + 1)
        seconds = self.table[np.minimum(count, len(self.table) - 1)] + self.fixed + count * self.each
        return np.asarray(np.maximum(seconds, 1e-9))

    def room(self, load: Load, floor: float | None) -> int:
        """How many draft tokens may join; with `floor`, so that the step takes no longer than 1 / floor seconds."""
        return min(load.room, within_floor(self.upto(load.room), floor)) if floor else load.room


def within_floor(seconds: Floats, floor: float | None) -> int:
    """How many draft tokens a step may verify that must not take longer than 1 / floor seconds."""
    if not floor:
        return len(seconds) - 1
    return int(np.searchsorted(seconds[1:], 1 / floor, side="right"))


class Admitted(NamedTuple):
    """Prefix lengths [R], and tokens a second with them."""

    lengths: list[int]
    theta: float


def admit(
    survival: Sequence[Sequence[float]],
    limits: Sequence[int],
    sampling: int,
    room: int,
    seconds: Callable[[int], float],
) -> Admitted:
    """Algorithm 1 over blocks of survivals [R][gamma]: the likeliest token left is next, until Theta fails to rise.

    The step gives `sampling` tokens without drafts, and `room` draft tokens may join.
    Ties go to the earlier request, and so to the earlier position of a request. `seconds` as StepCost has it. Plain
    numbers: the few tokens looked at are no work for arrays, whose code a pass has driven out of the caches.
    """
    lengths = [0] * len(limits)
    heads = [(-_at_most(1.0, block[0]), row) for row, block in enumerate(survival) if limits[row] > 0]
    heapify(heads)
    gained, best = 0.0, sampling / seconds(0)
    for count in range(1, room + 1):
        if not heads:
            break
        negative, row = heads[0]
        theta = (sampling + (gained - negative)) / seconds(count)
        if theta <= best:
            break
        gained, best = gained - negative, theta
        lengths[row] += 1
        if lengths[row] < limits[row]:
            heapreplace(heads, (-_at_most(-negative, survival[row][lengths[row]]), row))
        else:
            heappop(heads)
    return Admitted(lengths, best)


def _at_most(most: float, value: float) -> float:
    """A NaN says nothing of any token: it is last, and so is all that follows it."""
    return min(most, value) if value == value else 0.0


def best_count(survivals: Floats, seconds: Floats, load: Load, floor: float | None = None) -> int:
    """The count whose Theta is greatest of all. Looks at every survival: not for the block that is being judged."""
    most = min(load.room, within_floor(seconds, floor), len(survivals))
    return int(np.argmax(theta_by_count(survivals, seconds, load)[: most + 1]))


def theta_by_count(survivals: Floats, seconds: Floats, load: Load) -> Floats:
    """Tokens a second [n + 1] when the first 0 .. n ranked draft tokens are verified."""
    return np.asarray((load.sampling + np.concatenate([[0.0], survivals.cumsum()])) / seconds)


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
        """How many of the `due` requests probe in a step of `seconds`; `cost(n)`: seconds that n of them draft for."""
        self._saved = min(self._saved + self._share * seconds, cost(due))
        probing = max((size for size in _sizes(due) if cost(size) <= self._saved), default=0)
        self._saved -= cost(probing)
        return probing


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
    seconds = StepCost.of(capacity, load, 0, convex=True)
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
    if due and (chosen or not hopeless(OPTIMISM)):
        sizes = [drafting + size for size in _sizes(len(due))]
        thetas = predicted_thetas([candidates[i] for i in chosen + due], drafting, sizes, load, capacity, floor, best)
        # As many probes as could pay together: were it all or none, a crowd of newcomers would never find out.
        probing = max((size for size, theta in zip(sizes, thetas, strict=True) if theta > best), default=drafting)
        due = due[: probing - drafting]
        if due and purse:
            alone = capacity.draft(drafting)
            due = due[: purse.afford(len(due), seconds(0), lambda more: capacity.draft(drafting + more) - alone)]
    else:
        due = []
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
    costs = [StepCost.of(capacity, load, size, convex=True) for size in sizes]
    # No draft token costs less than the first, on a convex curve: what one must bring, and what each block could at
    # best have left over after that, for what its draft costs.
    price = above * (costs[0](1) - costs[0](0))
    left = list(accumulate(_left_over(rate, limit, price) for rate, limit in zip(rates, limits, strict=True)))
    wanted = [above * cost(0) * (1 - 1e-9) - load.sampling for cost in costs]
    pays = [left[size - 1] >= want for size, want in zip(sizes, wanted, strict=True)]
    most = max((size for size, may in zip(sizes, pays, strict=True) if may), default=0)
    blocks = [[rate**k for k in range(1, limit + 1)] for rate, limit in zip(rates[:most], limits, strict=False)]
    return [
        admit(blocks[:size], limits[:size], load.sampling, cost.room(load, floor), cost).theta if may else 0.0
        for size, cost, may in zip(sizes, costs, pays, strict=True)
    ]


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


def build_selection(
    name: str, capacity: Capacity | None = None, *, threshold: float = 0.5, floor: float | None = None
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
    assert capacity is not None, f"selection {name} reads a cost model"
    return Causal(capacity, floor) if name == "causal" else Lagged(capacity, floor)
