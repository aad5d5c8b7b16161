"""Records of a step: its drafts, verification, trace and outputs, shared by the step loop and its observers."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dspark_server.engine.logprobs import TokenLogprob, token_logprobs
from dspark_server.engine.request import Request
from dspark_server.speculation.acceptance import Accepted
from dspark_server.speculation.admission import Load
from dspark_server.speculation.copying import Match
from dspark_server.speculation.drafter import DraftBlock


@dataclass(frozen=True)
class Asked:
    """Requests that draft, each at most `limits[i]` tokens; `matches[i]`: earlier occurrence of the end of its text.

    The drafter makes the first `backbone` rows, the others are copied from their matches.
    """

    requests: list[Request]
    limits: list[int]
    matches: list[Match | None]
    backbone: int


@dataclass(frozen=True)
class Drafted:
    """A step's draft block: row i belongs to `requests[i]`, the first `lengths[i]` of its tokens are verified.

    survival [R, gamma] float32: the estimates that selection used, of the block or from each request's history. The
    drafter made the first `backbone` rows, the others are copies. At most `limits[i]` tokens of row i could have been
    verified; `slots`: sum of the limits as they were before the draft.
    """

    requests: list[Request]
    block: DraftBlock
    survival: Tensor
    lengths: list[int]
    backbone: int
    limits: list[int]
    slots: int

    def prefix_of(self) -> dict[Request, list[int]]:
        """The draft tokens to verify, by request."""
        rows = self.block.tokens.tolist()
        return {r: row[:length] for r, row, length in zip(self.requests, rows, self.lengths, strict=True)}


@dataclass(frozen=True)
class Verification:
    """Result of the target: rows of `requests[i]` are row_start[i] .. row_start[i+1]-1 of logits [M, V] float32."""

    requests: list[Request]
    logits: Tensor
    row_start: list[int]


@dataclass(frozen=True)
class StepTrace:
    """All data of a step that samples, before its commit: for conformance, measurements, tests and the dashboard."""

    drafted: Drafted | None
    verified: Verification
    accepted: Accepted
    load: Load
    selection: str  # the policy's name


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


def output_of(request: Request, taken: list[int], logits: Tensor, row: int, drafted: int, accepted: int) -> StepOutput:
    """Output of a commit of `taken` [n]; the first came from row `row` of logits [M, V], the others from the next."""
    asked, logprobs = request.params, None
    if asked.logprobs is not None and taken:
        logprobs = token_logprobs(logits[row : row + len(taken)], taken, asked.logprobs)
    first = len(request.tokens) - len(taken) == request.prompt_length
    prompt = request.prompt_logprobs if first and asked.prompt_logprobs is not None else None
    return StepOutput(request, taken, logprobs, prompt, drafted, accepted)
