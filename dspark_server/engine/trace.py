"""What a step draws, sees and gives: the records that pass between the step loop and those who watch it."""

from dataclasses import dataclass

from torch import Tensor

from dspark_server.engine.logprobs import TokenLogprob, token_logprobs
from dspark_server.engine.request import Request
from dspark_server.speculation.acceptance import Accepted
from dspark_server.speculation.admission import Load
from dspark_server.speculation.copying import Match
from dspark_server.speculation.drafter import DraftBlock


@dataclass(frozen=True)
class Asked:
    """Who drafts in a step: `requests[i]` at most `limits[i]` tokens; `matches[i]` is where its text stood before.

    The drafter makes the first `backbone` rows, the others are copied from their matches.
    """

    requests: list[Request]
    limits: list[int]
    matches: list[Match | None]
    backbone: int


@dataclass(frozen=True)
class Drafted:
    """A step's draft block: `requests[i]` owns row i and has the first `lengths[i]` of its tokens verified.

    survival [R, gamma] float32 is what selection went by: the block's own, or each request's record. The drafter made
    the first `backbone` rows, the others are copies. At most `limits[i]` tokens of row i could have been verified,
    before the draft `slots` of all rows.
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
    """What the target said: rows of `requests[i]` are row_start[i] .. row_start[i+1]-1 of logits [M, V] float32."""

    requests: list[Request]
    logits: Tensor
    row_start: list[int]


@dataclass(frozen=True)
class StepTrace:
    """Everything a sampling step saw, before it is committed: for conformance, measures, tests and the dashboard."""

    drafted: Drafted | None
    verified: Verification
    accepted: Accepted
    load: Load
    selection: str  # the policy's name


@dataclass(frozen=True)
class StepOutput:
    """The tokens one step committed to one request; `request.finish_reason` says whether they are its last.

    logprobs of the tokens, and of the prompt together with the first of them, where the request asked for them.
    `accepted` of its `drafted` draft tokens survived; both are 0 in a step without a draft.
    """

    request: Request
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    drafted: int = 0
    accepted: int = 0


def output_of(request: Request, taken: list[int], logits: Tensor, drafted: int, accepted: int) -> StepOutput:
    """What a commit of `taken` [n] says; logits [n, V] are the target's rows they came from."""
    asked = request.params
    logprobs = None if asked.logprobs is None or not taken else token_logprobs(logits, taken, asked.logprobs)
    first = len(request.tokens) - len(taken) == request.prompt_length
    prompt = request.prompt_logprobs if first and asked.prompt_logprobs is not None else None
    return StepOutput(request, taken, logprobs, prompt, drafted, accepted)
