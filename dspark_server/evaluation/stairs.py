"""Recorded passes as the simulator's truth: a machine whose passes run at a few sizes, and the best that could be done.

Shapes: B tokens of a pass, R drafting requests, n ranked draft tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from dspark_server.engine.profile import measured_sizes
from dspark_server.evaluation.roofline import Machine
from dspark_server.speculation.cost_model import CostModel, Profile
from dspark_server.speculation.curves import dense
from dspark_server.speculation.drafting import Candidate, DraftPlan
from dspark_server.speculation.prefix_scheduler import Floats, Load, Ranked, StepCost, best_count, theta_by_count
from dspark_server.speculation.selection import Selection


def stepped(machine: Machine, recorded: Sequence[int], eager: float = 0.0) -> Machine:
    """`machine` with passes and drafts recorded at `recorded` sizes (tokens; requests).

    A pass past the largest takes `eager` seconds more than the machine's profile says: its launches.
    """
    costs = machine.costs
    sizes = measured_sizes(costs.tokens[-1], recorded)
    requests = measured_sizes(costs.requests[-1], recorded)
    verify = dense(costs.tokens, np.asarray(costs.verify), np.asarray(sizes))
    verify += eager * (np.asarray(sizes) > recorded[-1])
    draft = dense(costs.requests, np.asarray(costs.draft), np.asarray(requests))
    return replace(
        machine,
        costs=replace(
            costs,
            tokens=tuple(sizes),
            verify=tuple(verify.tolist()),
            requests=tuple(requests),
            draft=tuple(draft.tolist()),
            recorded=tuple(recorded),
            recorded_drafts=tuple(recorded),
        ),
    )


def smoothed(machine: Machine) -> Profile:
    """The costs of `machine` as one would believe them who knows no recorded sizes: measured at sizes that double."""
    costs = machine.costs
    truth = CostModel(costs, costs.tokens[-1], costs.requests[-1])
    sizes, requests = measured_sizes(costs.tokens[-1]), measured_sizes(costs.requests[-1])
    return replace(
        costs,
        tokens=tuple(sizes),
        verify=tuple(truth.raw[sizes].tolist()),
        requests=tuple(requests),
        draft=tuple(map(truth.draft, requests)),
        recorded=(),
        recorded_drafts=(),
    )


class Oracle(Selection):
    """Not lossless, for comparison alone: tries every number of drafting requests, then every number of draft tokens.

    The latter with the survivals of the very blocks that it cuts.
    """

    name = "oracle"

    def __init__(self, cost_model: CostModel, rates: Callable[[], Sequence[float]]) -> None:
        """`cost_model` is the truth, and so are `rates`: each candidate's chance that a next token survives."""
        self._cost_model = cost_model
        self._rates = rates

    def drafting(self, candidates: Sequence[Candidate], load: Load) -> DraftPlan:
        """The best rates first, as many as give the greatest Theta with the number of tokens that suits them best."""
        rates = self._rates()
        able = sorted((i for i, each in enumerate(candidates) if each.limit), key=lambda i: -rates[i])
        if not able or load.room <= 0:
            return DraftPlan([])
        assert len(rates) == len(candidates)
        longest = max(candidates[index].limit for index in able)
        powers: Floats = np.array([rates[i] for i in able])[:, None] ** np.arange(1, longest + 1)
        limits = np.array([candidates[i].limit for i in able])
        best, count = load.sampling / StepCost.of(self._cost_model, load, 0)(0), 0
        for size in range(1, len(able) + 1):
            inside = np.arange(longest) < limits[:size, None]
            values: Floats = np.sort(powers[:size][inside])[::-1]
            seconds = StepCost.of(self._cost_model, load, size).upto(len(values))
            theta = float(theta_by_count(values, seconds, load)[: load.room + 1].max())
            if theta > best:
                best, count = theta, size
        return DraftPlan(sorted(able[:count]))

    def lengths(
        self,
        survival: Tensor,
        limits: Sequence[int],
        load: Load,
        *,
        by_drafter: int | None = None,
        slots: int | None = None,
    ) -> list[int]:
        """The best number of tokens on the measured curve."""
        ranked = Ranked.of(survival, limits)
        seconds = StepCost.of(self._cost_model, load, len(limits) if by_drafter is None else by_drafter)
        return ranked.first(best_count(ranked.values, seconds.upto(len(ranked.values)), load))
