"""Records of steps for the dashboard, made on the step thread.

`AsyncEngine.watch` takes a `StepObserver`; without an open dashboard it is not called. It only writes, and the event
loop only reads, whole objects at a time, so that no lock is needed.

Texts are private: the record of a request that is not followed has lengths and probabilities, never a token.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from weakref import WeakKeyDictionary

import numpy as np

from dspark_server.engine.request import Request
from dspark_server.engine.trace import StepTrace
from dspark_server.speculation.cost_model import CostModel
from dspark_server.speculation.draft_block import DraftBlock, Source
from dspark_server.speculation.prefix_scheduler import Ranked, StepCost, theta_by_count

logger = logging.getLogger(__name__)

PICTURE_EVERY = 0.08  # seconds between two pictures of the whole batch
MAX_ROWS = 64  # requests of a picture
MAX_POINTS = 48  # of the Theta curve


@dataclass(frozen=True)
class Block:
    """One step of one followed request: token ids, and the survival a_k of every draft token, 0 to 1.

    The target verified the first `verified` tokens of `draft`, and accepted the first `accepted` of these. `committed`
    has all tokens of the step. The one after the accepted ones is the target's own; it is missing if a draft token
    ended the request.
    """

    draft: list[int]
    survival: list[float]
    copied: bool
    verified: int
    accepted: int
    committed: list[int]


@dataclass(frozen=True)
class Row:
    """One request in a picture, under a number used nowhere else; survival of each draft token in percent."""

    number: int
    length: int
    copied: bool
    survival: list[int]
    verified: int
    accepted: int


@dataclass(frozen=True)
class Picture:
    """One step of the whole batch.

    tokens: B of the pass, of which `prefill` are prompt tokens; each of `sampling` requests gets a token in any case.
    theta: (B, expected tokens per second) if the likeliest drafts up to B were verified; `expected`: for those chosen.
    rows: the first MAX_ROWS of the requests that sampled.
    """

    policy: str
    tokens: int
    prefill: int
    sampling: int
    drafting: int
    drafts: int
    committed: int
    expected: float | None
    theta: list[tuple[int, float]]
    rows: list[Row]


class StepObserver:
    """Makes the records (see the module). `picture` is the newest one, None before the first."""

    def __init__(self, cost_model: CostModel | None, clock: Callable[[], float] = monotonic) -> None:
        self.picture: Picture | None = None
        self._cost_model = cost_model
        self._clock = clock
        self._drawn = -PICTURE_EVERY
        self._followed: dict[str, deque[Block]] = {}
        self._numbers: WeakKeyDictionary[Request, int] = WeakKeyDictionary()
        self._next_number = itertools.count(1)
        self._failed = False

    # -- event loop --------------------------------------------------------------------------------------------------

    def follow(self, request_id: str) -> deque[Block]:
        """Keep every step of the request with this id, with its tokens. The reader takes blocks from the left.

        The deque holds at most one block per token of the request.
        """
        return self._followed.setdefault(request_id, deque())

    def unfollow(self, request_id: str) -> None:
        """Keep no more steps of the request, and drop those kept."""
        self._followed.pop(request_id, None)

    # -- step thread -------------------------------------------------------------------------------------------------

    def __call__(self, trace: StepTrace) -> None:
        """Record a step. Never raises, so that the dashboard cannot fail a step."""
        try:
            now = self._clock()
            due = now - self._drawn >= PICTURE_EVERY
            if due or self._followed:
                self._look(trace, due)
            if due:
                self._drawn = now
        except Exception:
            if not self._failed:
                logger.exception("a step could not be shown")
            self._failed = True

    def _look(self, trace: StepTrace, due: bool) -> None:
        requests, drafted = trace.verified.requests, trace.verified.rows
        committed = [_committed(trace, index) for index in range(len(requests))]
        accepted = [min(*each) for each in zip(trace.accepted.count.tolist(), map(len, committed), strict=True)]
        for request, row, tokens, count in zip(requests, drafted, committed, accepted, strict=True):
            blocks = self._followed.get(request.id)
            if blocks is not None and tokens:
                blocks.append(_block(trace.block, row, count, tokens))
        if due:
            rows = [
                self._row(request, trace.block, row, count)
                for request, row, count in zip(requests[:MAX_ROWS], drafted, accepted, strict=False)
            ]
            self.picture = self._picture(trace, rows, sum(map(len, committed)))

    def _row(self, request: Request, block: DraftBlock | None, row: int, accepted: int) -> Row:
        number = self._numbers.get(request)
        if number is None:
            number = self._numbers[request] = next(self._next_number)
        length = len(request.tokens)
        if block is None or row < 0:
            return Row(number, length, False, [], 0, 0)
        survival = [round(100 * chance) for chance in _chances(block, row)]
        return Row(number, length, _is_copy(block, row), survival, block.lengths[row], accepted)

    def _picture(self, trace: StepTrace, rows: list[Row], committed: int) -> Picture:
        block, load = trace.block, trace.load
        drafts = sum(block.lengths) if block else 0
        theta, expected = self._theta(trace, block, drafts) if block and self._cost_model else ([], None)
        return Picture(
            policy=trace.selection,
            tokens=load.tokens + drafts,
            prefill=load.tokens - load.sampling,
            sampling=load.sampling,
            drafting=len(block.requests) if block else 0,
            drafts=drafts,
            committed=committed,
            expected=expected,
            theta=theta,
            rows=rows,
        )

    def _theta(self, trace: StepTrace, block: DraftBlock, chosen: int) -> tuple[list[tuple[int, float]], float | None]:
        """Theta over B for this step's blocks, at the costs that passes have, and Theta of its choice."""
        assert self._cost_model is not None
        assert block.survival is not None
        ranked = Ranked.of(block.survival, block.limits)
        count = len(ranked.values)
        seconds = StepCost.of(self._cost_model, trace.load, block.by_drafter).upto(count)
        theta = theta_by_count(ranked.values, seconds, trace.load)
        points = np.unique(np.linspace(0, count, min(count + 1, MAX_POINTS)).round().astype(int))
        # The choice lies on this curve if the policy ranks all drafts together; near it for fixed and threshold.
        return (
            [(trace.load.tokens + int(point), round(float(theta[point]), 2)) for point in points],
            round(float(theta[min(chosen, count)]), 2),
        )


def _chances(block: DraftBlock, row: int) -> list[float]:
    """Survivals of the slots that may be verified."""
    assert block.survival is not None
    chances: list[float] = block.survival[row, : block.limits[row]].nan_to_num().tolist()
    return chances


def _is_copy(block: DraftBlock, row: int) -> bool:
    return block.requests[row].source is Source.COPY


def _committed(trace: StepTrace, index: int) -> list[int]:
    """The tokens that commit will append to the request at `index`; none if it failed."""
    if bool(trace.accepted.failed[index]):
        return []
    draft: list[int] = []
    row = trace.verified.rows[index]
    if trace.block is not None and row >= 0:
        draft = trace.block.tokens[row, : int(trace.accepted.count[index])].tolist()
    return _until_end([*draft, int(trace.accepted.token[index])], trace.verified.requests[index].stop_ids)


def _block(block: DraftBlock | None, row: int, accepted: int, committed: list[int]) -> Block:
    if block is None or row < 0:
        return Block([], [], False, 0, 0, committed)
    chances = _chances(block, row)
    draft = block.tokens[row, : len(chances)].tolist()
    return Block(draft, chances, _is_copy(block, row), block.lengths[row], accepted, committed)


def _until_end(tokens: Sequence[int], stop_ids: frozenset[int]) -> list[int]:
    """The tokens up to and including the first stop token, as commit appends them."""
    end = next((index for index, token in enumerate(tokens, 1) if token in stop_ids), len(tokens))
    return list(tokens[:end])
