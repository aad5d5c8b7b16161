"""Algorithm 1 and its inputs: draft tokens ranked by survival, and the cost of a step by number of draft tokens.

Whether position k of a request is kept may depend on other requests and on confidences up to k (which depend on tokens
before k), never on x_k or later (DSPARK.md, "Non-anticipating").

Shapes: R requests, gamma draft tokens each, a_{r,k} the probability that request r's prefix up to k survives. A step
has Theta = tau / seconds, tau being the expected number of committed tokens (DSpark §3.2.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_server.speculation.cost_model import CostModel

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

LEAST = 1e-9  # seconds of a step, however small its corrected costs


@dataclass(frozen=True)
class Load:
    """The pass before any draft: `tokens` to run, of which `sampling` give a token each.

    `context` sums the tokens of context of all runs, `pairs` those of all query tokens; `per_draft` is the mean context
    of the requests that could draft, `room` the number of draft tokens that may be added.
    """

    sampling: int
    tokens: int
    room: int
    context: float = 0.0
    pairs: float = 0.0
    per_draft: float = 0.0


@dataclass(frozen=True)
class Ranked:
    """All (request, position) within their limits by falling survival, ties to the earlier position of a request.

    values [n] survivals; request [n]: the request of each. The first entries, up to any count, are a prefix of every
    block.
    """

    values: Floats
    request: Integers
    requests: int

    @classmethod
    def of(cls, survival: Tensor, limits: Sequence[int]) -> "Ranked":
        """Rank survivals [R, gamma]; no row rises."""
        return cls.rank(survival.double().numpy(), limits)

    @classmethod
    def rank(cls, survival: Floats, limits: Sequence[int]) -> "Ranked":
        """The same from an array."""
        inside = np.arange(survival.shape[1]) < np.asarray(limits, dtype=np.int64).reshape(-1, 1)
        # A NaN says nothing about any token: it ranks last, and so do all positions after it.
        falling = np.minimum.accumulate(np.nan_to_num(survival, nan=0.0), axis=1)
        values, request = falling[inside], np.nonzero(inside)[0]
        order = np.argsort(-values, kind="stable")
        return cls(values[order], request[order], len(limits))

    def first(self, count: int) -> list[int]:
        """Each request's prefix length when the first `count` are kept."""
        lengths: list[int] = np.bincount(self.request[:count], minlength=self.requests).tolist()
        return lengths


def keep_likeliest(survival: Tensor, limits: Tensor, count: Tensor) -> Tensor:
    """`Ranked.first` in torch, without reading anything on the host: prefix lengths [R] int64 if `count` [1] are kept.

    survival [R, gamma] float32, limits [R] int64.
    """
    inside = torch.arange(survival.shape[1], device=survival.device) < limits.unsqueeze(1)
    falling = survival.nan_to_num(nan=0.0).cummin(dim=1).values
    order = torch.where(inside, falling, -1.0).flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return ((rank.view_as(inside) < count) & inside).sum(1)


@dataclass(frozen=True)
class StepCost:
    """Seconds that a step takes for its tau, by number of draft tokens verified.

    Prefill tokens in the pass raise the cost of each draft token, and that is counted. Their own cost is not, as it
    produces none of tau: if it were counted, any draft would look cheap beside a long chunk. Nor do decoding tokens
    bear alone what a pass costs at least: prefill tokens are charged what as many more would cost, at most their share.
    """

    table: Floats  # seconds of the target pass, by number of draft tokens: a convex bound, or as measured
    measured: Floats
    fixed: float
    each: float
    prefill: float = 0.0  # seconds that the step takes in addition, for prompts
    tokens: int = 0  # of the pass before any draft
    stairs: Integers | None = None  # CostModel.stairs
    recorded: int = 0  # draft tokens, at most, of a recorded pass

    @classmethod
    def of(
        cls, cost_model: CostModel, load: Load, requests: int, slots: int | None = None, *, apart: bool = False
    ) -> "StepCost":
        """The cost of a step in which the drafter drafts for `requests` requests.

        `slots` is the largest number of draft tokens that the blocks could have, known before the draft: costs are then
        on the convex minorant of the measured curve up to there (`apart`: see CostModel). None: on the measured curve.
        """
        raw, most = cost_model.raw, len(cost_model.raw) - 1
        tokens = min(load.tokens, most)
        prefill = _prefill(raw, tokens, min(load.sampling, tokens))
        fixed = (
            cost_model.draft(requests) + cost_model.overhead + cost_model.attention(load.context, load.pairs) - prefill
        )
        each = cost_model.attention(0.0, load.per_draft)
        measured = raw[tokens:]
        if slots is None:
            table = measured
        else:
            table = (cost_model.convex_apart if apart else cost_model.convex)(tokens, min(slots, load.room))
        recorded = cost_model.largest_recorded - tokens
        return cls(table, measured, fixed, each, prefill, tokens, cost_model.stairs, recorded)

    def __call__(self, count: int) -> float:
        """Seconds with `count` draft tokens. Without `min` and `max`, whose calls took most of its time."""
        table, last = self.table, len(self.table) - 1
        seconds = table.item(count if count < last else last) + self.fixed + count * self.each
        return seconds if seconds > LEAST else LEAST

    def full(self, count: int) -> int:
        """Number of draft tokens, at least `count`, that the pass with `count` of them has rows for."""
        if self.stairs is None:
            return count
        place = self.tokens + count
        return int(self.stairs[place]) - self.tokens if place < len(self.stairs) else count

    def upto(self, drafts: int) -> Floats:
        """[drafts + 1] seconds with 0 .. drafts draft tokens."""
        return self._seconds(self.table, drafts)

    def as_run(self, drafts: int) -> Floats:
        """The same, as measured."""
        return self._seconds(self.measured, drafts)

    def _seconds(self, table: Floats, drafts: int) -> Floats:
        count = np.arange(drafts + 1)
        seconds = table[np.minimum(count, len(table) - 1)] + self.fixed + count * self.each
        return np.asarray(np.maximum(seconds, LEAST))

    def room(self, load: Load, floor: float | None) -> int:
        """Number of draft tokens that may be added; with `floor`, so that the step, as measured, takes no longer than
        1 / floor seconds.
        """
        if not floor:
            return load.room
        return min(load.room, within_floor(self.as_run(load.room) + self.prefill, floor))


def _prefill(raw: Floats, tokens: int, sampling: int) -> float:
    """Seconds of a pass over `tokens` tokens that are its prefill's: all that they add, or that as many more would."""
    if tokens <= sampling or not sampling:
        return 0.0
    prompts, further = tokens - sampling, min(tokens + sampling, len(raw) - 1)
    slope = (raw[further] - raw[tokens]) / (further - tokens) if further > tokens else 0.0
    return float(max(raw[tokens] - raw[sampling], min(prompts * slope, raw[tokens] * prompts / tokens)))


def within_floor(seconds: Floats, floor: float | None) -> int:
    """Number of draft tokens that a step may verify without taking longer than 1 / floor seconds."""
    if not floor:
        return len(seconds) - 1
    return int(np.searchsorted(seconds[1:], 1 / floor, side="right"))


class Admitted(NamedTuple):
    """Prefix lengths [R], and tokens per second with them."""

    lengths: list[int]
    theta: float


def admit(
    survival: Sequence[Sequence[float]],
    limits: Sequence[int],
    sampling: int,
    room: int,
    cost: StepCost,
    usual: Floats | None = None,
) -> Admitted:
    """Algorithm 1 over blocks of survivals [R][gamma]: add the likeliest token left, until Theta no longer rises.

    The step gives `sampling` tokens without drafts, and `room` draft tokens may be added. Ties go to the earlier
    request, and so to the earlier position of a request. Plain numbers: few tokens are looked at, and the pass has
    evicted the code of array operations from the caches.

    Where passes are recorded, the rows of a recorded pass that are left cost nothing and are filled without asking. So
    a larger one has to pay by all of its tokens, of which only the first is looked at: the others are taken to fall
    from there as `usual` does, the ranked survivals [n] of an earlier step (None: the first must pay on the minorant).
    Whether a token is kept still depends on none that ranks below it, nor on its own value.
    """
    lengths = [0] * len(limits)
    heads = [(-_at_most(1.0, block[0]), row) for row, block in enumerate(survival) if limits[row] > 0]
    heapify(heads)
    gained, best, rows = 0.0, sampling / cost(0), cost.full(0)
    for count in range(1, room + 1):
        if not heads:
            break
        negative, row = heads[0]
        if count > rows:
            if usual is not None and count <= cost.recorded + 1:
                if not _pays(usual[count - 1 : room], -negative, sampling + gained, cost.as_run(room)[count - 1 :]):
                    break
            elif (theta := (sampling + (gained - negative)) / cost(count)) <= best:
                break
            else:
                best = theta
            rows = cost.full(count)
        gained -= negative
        if count == rows and cost.stairs is not None:
            best = (sampling + gained) / cost(count)
        lengths[row] += 1
        if lengths[row] < limits[row]:
            heapreplace(heads, (-_at_most(-negative, survival[row][lengths[row]]), row))
        else:
            heappop(heads)
    return Admitted(lengths, best)


def _pays(usual: Floats, first: float, tau: float, seconds: Floats) -> bool:
    """Whether more draft tokens are expected to raise Theta: the next survives with `first`, the rest fall as `usual`.

    `tau` tokens are expected without them; seconds [n + 1] with 0 .. n of them.
    """
    if not len(usual) or usual[0] <= 0:
        return False
    gained = np.minimum(first, usual * (first / usual[0])).cumsum()
    return bool(((tau + gained) / seconds[1 : len(usual) + 1]).max() > tau / seconds[0])


def _at_most(most: float, value: float) -> float:
    """A NaN says nothing about any token: it ranks last, and so do all positions after it."""
    if value <= most:
        return value
    return most if value == value else 0.0


def best_count(survivals: Floats, seconds: Floats, load: Load, room: int | None = None) -> int:
    """The count, at most `room` (None: the load's), with the greatest Theta of all; the largest of several.

    Looks at every survival: not allowed for the block that is being verified.
    """
    most = min(load.room if room is None else room, len(survivals))
    return most - int(np.argmax(theta_by_count(survivals, seconds, load)[most::-1]))


def theta_by_count(survivals: Floats, seconds: Floats, load: Load) -> Floats:
    """Tokens per second [n + 1] when the first 0 .. n ranked draft tokens are verified."""
    return np.asarray((load.sampling + np.concatenate([[0.0], survivals.cumsum()])) / seconds)
