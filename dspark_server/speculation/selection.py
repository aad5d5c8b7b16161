"""Prefix selection: how many draft tokens of each request the target verifies this step.

A policy is a pure function and sees no token. Whether position k of a request is kept may depend on other requests
and on confidences up to k (which depend on tokens before k), never on x_k or later (DSPARK, "Non-anticipating").
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dspark_server.errors import ConfigError


class Selection(Protocol):
    """A verification policy."""

    name: str

    def drafting(self, limits: Sequence[int], room: int) -> list[int]:
        """Before the draft: indices of the requests that draft at all.

        `limits[i]` is the longest prefix request i could use (0: none), `room` the draft tokens the pass has place for.
        """

    def lengths(self, survival: Tensor, limits: Sequence[int], room: int) -> list[int]:
        """After the draft: the prefix length of each drafting request, at most its limit and `room` in all.

        `survival` [R, gamma] float32 is the calibrated chance that the prefix up to each position survives.
        """


class Fixed:
    """Every drafting request verifies its whole block; when room is short the oldest requests go first."""

    name = "fixed"

    def drafting(self, limits: Sequence[int], room: int) -> list[int]:
        chosen: list[int] = []
        for index, limit in enumerate(limits):
            if 0 < limit <= room:
                chosen.append(index)
                room -= limit
        return chosen

    def lengths(self, survival: Tensor, limits: Sequence[int], room: int) -> list[int]:
        return list(limits)


class Off:
    """Nobody drafts; the drafter's context is still kept, so that it can be switched on at any step."""

    name = "none"

    def drafting(self, limits: Sequence[int], room: int) -> list[int]:
        return []

    def lengths(self, survival: Tensor, limits: Sequence[int], room: int) -> list[int]:
        return [0] * len(limits)


def build_selection(name: str) -> Selection:
    """The policy called `name`. Raises ConfigError for one that does not exist."""
    policies: dict[str, type[Selection]] = {"fixed": Fixed, "none": Off}
    if name not in policies:
        raise ConfigError(f"Selection policy {name!r} is not known; choose from {', '.join(policies)}.")
    return policies[name]()
