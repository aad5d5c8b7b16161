"""Records of a step: its verification, trace and outputs, shared by the step loop and its observers."""

from dataclasses import dataclass
from typing import NamedTuple

from dspark_kernels import Kernels
from torch import Tensor

from dspark_server.engine.batcher import Plan
from dspark_server.engine.logprobs import TokenLogprob, token_logprobs
from dspark_server.engine.request import Request
from dspark_server.speculation.acceptance import Accepted
from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.prefix_scheduler import Load


@dataclass(frozen=True)
class Verification:
    """Result of the target: rows of `requests[i]` are row_start[i] .. row_start[i+1]-1 of logits [M, V] float32.

    rows[i]: the request's row of the draft block, -1 without one.
    """

    requests: list[Request]
    logits: Tensor
    row_start: list[int]
    rows: list[int]


@dataclass(frozen=True)
class StepTrace:
    """All data of a step that samples, before its commit: for conformance, measurements, tests and the dashboard."""

    plan: Plan
    block: DraftBlock | None
    verified: Verification
    accepted: Accepted
    load: Load
    selection: str  # the policy's name

    @property
    def drafting(self) -> list[Request]:
        """The request of each row of the block."""
        return drafting(self.plan, self.block)


class StepOutput(NamedTuple):
    """The tokens one step committed to one request; `request.finish_reason` says whether they are its last.

    Log-probabilities, if requested: of the tokens, and of the prompt together with the first of them. The target
    accepted `accepted` of its `drafted` draft tokens; both are 0 in a step without a draft.
    """

    request: Request
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    drafted: int = 0
    accepted: int = 0


def drafting(plan: Plan, block: DraftBlock | None) -> list[Request]:
    """The request of each row of the block; none without one."""
    return [plan.scheduled[asked.run].request for asked in block.requests] if block else []


def output_of(
    request: Request,
    taken: list[int],
    logits: Tensor,
    row: int,
    drafted: int,
    accepted: int,
    kernels: Kernels | None = None,
) -> StepOutput:
    """Output of a commit of `taken` [n]; the first came from row `row` of logits [M, V], the others from the next.

    `kernels`, if given, compute log-probabilities.
    """
    asked, logprobs = request.params, None
    if asked.logprobs is not None and taken:
        logprobs = token_logprobs(logits[row : row + len(taken)], taken, asked.logprobs, kernels)
    first = len(request.tokens) - len(taken) == request.prompt_length
    prompt = request.prompt_logprobs if first and asked.prompt_logprobs is not None else None
    return StepOutput(request, taken, logprobs, prompt, drafted, accepted)
