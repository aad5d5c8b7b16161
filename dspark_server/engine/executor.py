"""What the step loop asks of a model. The torch executor runs real weights; tests and the simulator bring their own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dspark_server.models.decoder import Decoder
from dspark_server.runtime.batch import Batch, Run
from dspark_server.runtime.kv import KVPool
from dspark_server.speculation.copying import WIDTH
from dspark_server.speculation.drafter import DraftBlock, Drafter, DraftRequest, with_copies
from dspark_server.speculation.noise import Streams
from dspark_server.speculation.sampling import SamplingBatch

__all__ = ["DraftRequest", "Executor", "Rest", "TorchExecutor"]


@dataclass(frozen=True)
class Rest:
    """What follows a draft, where the policy has fixed before it how many draft tokens are verified (§5.2).

    With it an executor may go on without a look at the draft. `runs` are the pass's without draft tokens; run i takes
    its own from row rows[i] of the block (-1: none), in all the `count` likeliest, of row r at most limits[r];
    recorded [R, gamma] float32 is their survival where the drafter does not say. `sampling` has a row for each of the
    runs that sample, `sampled`.
    """

    runs: list[Run]
    rows: list[int]
    limits: list[int]
    recorded: Tensor
    count: int
    sampling: SamplingBatch
    sampled: list[int]


class Executor(Protocol):
    """One draft and one verification per step."""

    gamma: int  # most draft tokens of a block

    @property
    def block(self) -> int:
        """Most that the drafter itself makes of a block; what is longer is a copy."""

    def draft(
        self,
        requests: list[DraftRequest],
        sampling: SamplingBatch,
        streams: Streams,
        rest: Callable[[], Rest] | None = None,
    ) -> DraftBlock:
        """Draft up to gamma tokens after each anchor. KV slots for anchor and block are reserved.

        Requests whose block is copied alone come last; `sampling` has a row for each of the others. `rest`: what will
        be asked for next, if that is certain.
        """

    def verify(self, runs: list[Run]) -> tuple[Tensor, list[int]]:
        """One target pass over all runs: logits [M, V] float32 and where each run's rows start (R + 1 entries)."""

    def finite_rows(self) -> list[int]:
        """Of each run of the last `verify`, how many leading tokens have finite hidden states after the last layer.

        Their keys hold no NaN then, and their values neither NaN nor infinity, in every layer of the target: a token
        attends to itself, and the residual stream keeps what is not finite to its end. So the rows that a drafter is
        given are finite too; a NaN that its own projection makes of them costs drafts, and no request.
        """


class TorchExecutor:
    """Target and drafter over one paged KV pool: layer group 0 is the target's, group 1 the drafter's."""

    def __init__(self, target: Decoder, drafter: Drafter, pool: KVPool) -> None:
        self.gamma = max(drafter.gamma, WIDTH) if drafter.copying else drafter.gamma
        self.target = target
        self.drafter = drafter
        self.pool = pool
        self._lengths: list[int] = []
        self._last = torch.empty(0)  # of the last pass: its runs' tokens, and hidden states [N, D] after the last layer

    @property
    def block(self) -> int:
        return self.drafter.gamma

    def draft(
        self,
        requests: list[DraftRequest],
        sampling: SamplingBatch,
        streams: Streams,
        rest: Callable[[], Rest] | None = None,
    ) -> DraftBlock:
        asked = asked_of_drafter(requests)
        block = None
        if asked:
            block = self.drafter.propose(asked, sampling, streams, self.pool)
        return add_copies(block, requests, self.gamma, self.drafter)

    def verify(self, runs: list[Run]) -> tuple[Tensor, list[int]]:
        batch = Batch.of(runs, self.pool.block_size)
        last = self.target.config.num_layers - 1
        hidden, (*taps, self._last) = self.target.forward(batch, self.pool.layers(0), (*self.drafter.taps, last))
        self._lengths = [len(run.tokens) for run in runs]
        # For every token of every request, speculating or not: a later prefix hit must find its draft rows.
        self.drafter.observe(taps, batch, self.pool)
        return self.target.logits(hidden), batch.row_start

    def finite_rows(self) -> list[int]:
        return leading(are_finite(self._last), self._lengths)


def are_finite(hidden: Tensor) -> Tensor:
    """Whether each row of `hidden` [N, D] is finite, [N] bool; one whose sum overflows float32 is taken not to be."""
    return hidden.sum(-1, dtype=torch.float32).isfinite()


def leading(flags: Tensor, lengths: list[int]) -> list[int]:
    """Of runs of so many rows, one after another, how many lead each of which `flags` [at least N] bool holds."""
    if bool(flags[: sum(lengths)].all()):
        return lengths
    each = flags[: sum(lengths)].split(lengths)
    return [int(run.long().cumprod(0).sum()) for run in each]


def asked_of_drafter(requests: list[DraftRequest]) -> list[DraftRequest]:
    """Those whose block is not copied alone: the first ones."""
    return [request for request in requests if not request.alone or request.match is None]


def add_copies(block: DraftBlock | None, requests: list[DraftRequest], gamma: int, drafter: Drafter) -> DraftBlock:
    """What the drafter made of `asked_of_drafter(requests)` (None: there were none), and below it the copies."""
    copied = [(request.match, request.copied) for request in requests if request.alone and request.match is not None]
    if drafter.copying is None:
        assert block is not None, "a drafter that may not copy was asked for copies alone"
        return block
    return with_copies(block, [match for match, _ in copied], [record for _, record in copied], gamma, drafter.copying)
