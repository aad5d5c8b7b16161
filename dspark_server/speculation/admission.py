"""Algorithm 1 and what it walks on: draft tokens ranked by survival, and what a step costs with so many of them.

Whether position k of a request is kept may depend on other requests and on confidences up to k (which depend on tokens
before k), never on x_k or later (DSPARK.md, "Non-anticipating").

Shapes: R requests, gamma draft tokens each, a_{r,k} the chance that request r's prefix up to k survives. A step is
worth Theta = tau / seconds, tau the tokens it is expected to commit (DSpark §3.2.2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_server.speculation.capacity import Capacity

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


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


@dataclass(frozen=True)
class StepCost:
    """Seconds that tau is bought with when so many draft tokens are verified.

    Prefill tokens in the pass make each draft token as dear as it then is, but what they cost themselves buys other
    tokens than tau: were it counted, any draft would look cheap beside a long chunk.
    """

    table: Floats  # seconds of the target pass, by draft tokens
    fixed: float
    each: float
    prefill: float = 0.0  # that the step takes besides, for prompts

    @classmethod
    def of(cls, capacity: Capacity, load: Load, requests: int, slots: int | None = None) -> "StepCost":
        """Of a step in which the drafter drafts for so many `requests`.

        With `slots`, on the convex minorant of the measured curve as far as they reach: how many draft tokens the
        blocks could have at most, which must be known before the draft. Without, on the measured curve itself.
        """
        raw = capacity.raw
        tokens, sampling = (min(count, len(raw) - 1) for count in (load.tokens, load.sampling))
        prefill = float(raw[tokens] - raw[sampling])
        fixed = capacity.draft(requests) + capacity.overhead + capacity.attention(load.context, load.pairs) - prefill
        each = capacity.attention(0.0, load.per_draft)
        table = raw[tokens:] if slots is None else capacity.convex(tokens, min(slots, load.room))
        return cls(table, fixed, each, prefill)

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
        return min(load.room, within_floor(self.upto(load.room) + self.prefill, floor)) if floor else load.room


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


def best_count(survivals: Floats, seconds: Floats, load: Load, room: int | None = None) -> int:
    """The count, at most `room` (None: the load's), whose Theta is greatest of all.

    Looks at every survival: not for the block that is being judged.
    """
    most = min(load.room if room is None else room, len(survivals))
    return int(np.argmax(theta_by_count(survivals, seconds, load)[: most + 1]))


def theta_by_count(survivals: Floats, seconds: Floats, load: Load) -> Floats:
    """Tokens a second [n + 1] when the first 0 .. n ranked draft tokens are verified."""
    return np.asarray((load.sampling + np.concatenate([[0.0], survivals.cumsum()])) / seconds)
