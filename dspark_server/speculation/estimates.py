"""Survival estimates corrected by outcomes: what a drafter says of its tokens, and what became of tokens like them.

A confidence head is calibrated on some traffic; at other temperatures, under penalties or masks, or in other languages
it is wrong by as much as a factor of two. Without a head the estimate is a request's own record. Either way the chance
c_k that token k + 1 survives if those before it do is corrected on the logit scale, by a gain and by an offset for each
position, which are learnt online for each *context*: one tenant's requests of one kind (`Kind`). So one tenant's
traffic does not move another's estimates, and drafts that are judged by other rules do not mix.

Copies from the context have corrections of their own: they fail for other reasons.

Only outcomes of blocks that are committed are learnt from, so an estimate sees no token of its own block. A prefix that
selection cut says nothing of its tail: only the tokens up to the first rejection are judged.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_server.speculation.history import SurvivalHistory
from dspark_server.speculation.sampling import GREEDY_BELOW

MEMORY = 0.9995  # weight of the past after one more judged token: about the last 2,000 count
PRIOR = 10.0  # information that the calibration counts for, in judged tokens of chance 1/2 times 1/4
POSITION_PRIOR = 60.0  # the same for an offset of one position alone, and for the gain
POPULATION_MEMORY = 0.995  # as history.MEMORY, for all requests of a context together
PATIENCE = 100  # blocks in a row of which nothing was verified, before a correction fades
UNHEARD = 0.99  # what is left of it after each block from then on, so that none is final
FARTHEST = 8.0  # greatest logit
CONTEXTS = 4096  # the contexts used last are kept


class Kind(NamedTuple):
    """A class of requests that are accepted alike: by temperature, rules and seed."""

    temperature: int  # 0: greedy; 1: up to 0.6; 2: up to 1.1; 3: higher
    rules: int  # 0: none, or min_tokens; 1: penalties, biases or forbidden tokens; 2: a grammar
    seeded: bool  # sampled with a seed: accepted by another rule than without
    copied: bool = False  # copied from the context, without the drafter

    @classmethod
    def of(cls, temperature: float, *, ruled: bool, grammar: bool, seeded: bool) -> "Kind":
        """Of a sampling temperature, whether there are rules, a grammar among them, and whether there is a seed."""
        sampled = temperature >= GREEDY_BELOW
        rules = 2 if grammar else int(ruled)
        return cls(int(sampled) + (temperature > 0.6) + (temperature > 1.1), rules, seeded and sampled)


@dataclass(eq=False)
class Correction:
    """Of one context: logit(c_k) becomes gain * logit(c_k) + offset + by_position[k].

    Online logistic regression: a step of Newton's method for each judged token, with the information so far, which
    fades, for its size. Gain and offset take it together: logits far from 0 leave hardly any difference between the
    two, and alone each would make up for the other's error.
    """

    gain: float = 1.0
    offset: float = 0.0
    by_position: list[float] = field(default_factory=list)
    everyone: SurvivalHistory = field(default_factory=lambda: SurvivalHistory(memory=POPULATION_MEMORY))
    _unheard: int = 0  # blocks in a row of which nothing was verified
    _information: tuple[float, float, float] = (POSITION_PRIOR / 4, 0.0, PRIOR / 4)  # of gain, both and offset
    _by_position: list[float] = field(default_factory=list)

    def shifts(self, gamma: int) -> list[float]:
        """The shifts of the logit at each of `gamma` positions."""
        known = [self.offset + each for each in self.by_position[:gamma]]
        return known + [self.offset] * (gamma - len(known))

    def judged(self, stated: Sequence[float], verified: int, accepted: int) -> None:
        """Learn from a block of which `verified` tokens were verified and the first `accepted` accepted.

        stated [gamma]: the survivals a_k of its prefixes before the correction.
        """
        self._unheard = 0
        missing = verified - len(self.by_position)
        if missing > 0:
            self.by_position += [0.0] * missing
            self._by_position += [POSITION_PRIOR / 4] * missing
        before, gain, offset = 1.0, self.gain, self.offset
        of_gain, of_both, of_offset = self._information
        for k, survival in enumerate(stated[: min(verified, accepted + 1)]):
            x = logit(survival / before if before > 0 else 0.0)
            before = survival
            chance = sigmoid(gain * x + offset + self.by_position[k])
            error, weight = (k < accepted) - chance, max(chance * (1 - chance), 0.01)
            of_gain, of_both = MEMORY * of_gain + weight * x * x, MEMORY * of_both + weight * x
            of_offset = MEMORY * of_offset + weight
            along, across = of_gain + POSITION_PRIOR / 4, of_offset + PRIOR / 4
            step = error / (along * across - of_both * of_both)  # positive: both priors are
            gain = min(max(gain + step * (across * x - of_both), 0.0), 3.0)
            offset += step * (along - of_both * x)
            self._by_position[k] = MEMORY * self._by_position[k] + weight
            self.by_position[k] += error / (self._by_position[k] + POSITION_PRIOR / 4)
        self.gain, self.offset = gain, offset
        self._information = of_gain, of_both, of_offset

    def unheard(self) -> None:
        """Fade after many blocks in a row of which nothing was verified: none that forbids drafts lasts for ever.

        Where some blocks are verified, it stays: fading would pull it back to what it has found to be wrong.
        """
        self._unheard += 1
        if self._unheard <= PATIENCE:
            return
        self.gain += (1 - UNHEARD) * (1 - self.gain)
        self.offset *= UNHEARD
        self.by_position = [UNHEARD * each for each in self.by_position]


class Estimates:
    """The corrections of all contexts; those used last are kept."""

    def __init__(self) -> None:
        self._corrections: OrderedDict[tuple[str, Kind], Correction] = OrderedDict()

    def of(self, tenant: str, kind: Kind) -> Correction:
        """The correction of a context; a new one changes no chance whose logit is within FARTHEST."""
        found = self._corrections.get((tenant, kind))
        if found is None:
            found = self._corrections[tenant, kind] = Correction()
            if len(self._corrections) > CONTEXTS:
                self._corrections.popitem(last=False)
        else:
            self._corrections.move_to_end((tenant, kind))
        return found


class Shifts(NamedTuple):
    """Corrections of R rows: gains [R] and shifts [R, gamma] float32; a gain of NaN leaves its row as it is."""

    gains: Tensor
    shifts: Tensor

    @classmethod
    def of(cls, corrections: Sequence[Correction | None], gamma: int) -> "Shifts":
        """Of these corrections; None: no correction."""
        distinct = {each: index for index, each in enumerate(dict.fromkeys(corrections))}  # many rows, few contexts
        gains = [float("nan") if each is None else each.gain for each in distinct]
        shifts = [[0.0] * gamma if each is None else each.shifts(gamma) for each in distinct]
        rows = torch.tensor([distinct[each] for each in corrections], dtype=torch.int64)
        return cls(torch.tensor(gains)[rows], torch.tensor(shifts).view(len(gains), gamma)[rows])

    def applied(self, survival: Tensor) -> Tensor:
        """Survivals a_k [R, gamma] corrected. NaN stays where it is. Reads nothing on the host."""
        before = torch.cat([torch.ones_like(survival[:, :1]), survival[:, :-1]], dim=1)
        chance = (survival / before).nan_to_num(0.0).clamp(0.0, 1.0)
        gains = self.gains.unsqueeze(1)
        logits = torch.logit(chance, eps=1e-6).clamp(-FARTHEST, FARTHEST) * gains + self.shifts
        kept = torch.sigmoid(logits).cumprod(dim=1)
        return torch.where(gains.isnan() | survival.isnan(), survival, kept)


def logit(chance: float) -> float:
    """log(c / (1 - c)), at most FARTHEST either way."""
    chance = min(max(chance, 1e-6), 1 - 1e-6)
    return min(max(log(chance / (1 - chance)), -FARTHEST), FARTHEST)


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + exp(-x)) if x > -30 else 0.0
