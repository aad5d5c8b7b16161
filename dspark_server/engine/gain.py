"""Estimate of what drafting gains: the time of steps against the time of the same tokens without drafts.

The estimate compares a step that was run with one that was not, so it takes the ratio of the two from the cost table
and the scale from the clock: a slow minute of the machine slows both and does not change the gain.
"""

from dataclasses import dataclass
from math import exp

from dspark_server.speculation.cost_model import CostModel
from dspark_server.speculation.prefix_scheduler import Load

WINDOW = 20.0  # seconds of steps after which an observation counts 1 / e of a new one


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: the draft, the target pass, and everything else."""

    draft: float
    verify: float
    host: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.draft + self.verify + self.host


def seconds_without_drafts(
    cost_model: CostModel, load: Load, drafts: int, committed: int, took: StepTime, drafting: int = 0
) -> float:
    """Seconds that steps without drafts would take for the tokens of this step.

    `load` is the step before its drafts, `drafts` the number of draft tokens verified, `committed` that of tokens
    committed, `drafting` that of requests for which the drafter drafted. Without drafts each of `load.sampling`
    requests gets one token a step, so the step is run committed / sampling times: the pass at the size without drafts,
    and the host time less what drafts add to it. Prompt tokens of the pass are computed once either way.
    """
    if not load.sampling:
        return took.verify + took.host
    plain = _pass_seconds(cost_model, load, 0)
    scale = took.verify / _pass_seconds(cost_model, load, drafts)
    last = len(cost_model.raw) - 1
    prompts = scale * float(cost_model.raw[min(load.tokens, last)] - cost_model.raw[min(load.sampling, last)])
    host = max(0.0, took.host - cost_model.drafting_overhead(drafting))
    return prompts + (scale * plain + host - prompts) * committed / load.sampling


def _pass_seconds(cost_model: CostModel, load: Load, drafts: int) -> float:
    """Seconds of the target pass with `drafts` draft tokens, by the cost table."""
    tokens = min(load.tokens + drafts, len(cost_model.raw) - 1)
    return float(cost_model.raw[tokens]) + cost_model.attention(load.context, load.pairs + drafts * load.per_draft)


class Gain:
    """Ratio of throughput with drafts to throughput without, over the last WINDOW seconds of steps.

    The step thread calls `observe`; any thread may read `ratio`.
    """

    def __init__(self) -> None:
        self.ratio: float | None = None  # None before the first step
        self._took = 0.0
        self._without = 0.0

    def observe(self, took: float, without: float) -> None:
        """Count a step that took `took` seconds, and would have taken `without` seconds without drafts."""
        if took <= 0:
            return
        kept = exp(-took / WINDOW)
        self._took = kept * self._took + took
        self._without = kept * self._without + without
        self.ratio = self._without / self._took
