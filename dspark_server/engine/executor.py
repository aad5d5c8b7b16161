"""Interface of the step loop to a model. `TorchExecutor` runs real weights; tests and the simulator have their own."""

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
    """Verification with a fixed budget: the policy fixes the number of verified tokens before the draft (§5.2).

    With it an executor need not wait for the draft. `runs` are those of the pass, without draft tokens; run i takes
    draft tokens from row rows[i] of the block (-1: none). The `count` likeliest are verified, at most limits[r] of row
    r; recorded [R, gamma] float32 is their survival if the drafter reports none. `sampling` has a row for each of the
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
        """Maximum length of a block from the drafter itself; longer blocks are copies."""

    def draft(
        self,
        requests: list[DraftRequest],
        sampling: SamplingBatch,
        streams: Streams,
        rest: Callable[[], Rest] | None = None,
    ) -> DraftBlock:
        """Draft up to gamma tokens after each anchor. KV slots for anchor and block are reserved.

        Requests whose block is only copied come last; `sampling` has a row for each of the others. `rest` gives the
        verification that follows, if its budget is fixed.
        """

    def verify(self, runs: list[Run]) -> tuple[Tensor, list[int]]:
        """One target pass over all runs: logits [M, V] float32 and where each run's rows start (R + 1 entries)."""

    def finite_rows(self) -> list[int]:
        """Number of leading tokens of each run of the last `verify` with finite hidden states after the last layer.

        Their keys then hold no NaN, and their values neither NaN nor infinity, in every layer of the target: a token
        attends to itself, and the residual stream carries a non-finite value to its end. So the rows that a drafter
        observes are finite too; a NaN from its own projection of them costs drafts, but fails no request.
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
    """Whether each row of `hidden` [N, D] is finite, [N] bool; one whose sum overflows float32 counts as not finite."""
    return hidden.sum(-1, dtype=torch.float32).isfinite()


def leading(flags: Tensor, lengths: list[int]) -> list[int]:
    """Number of leading rows with true `flags` [at least N] bool in each of consecutive runs of `lengths` rows."""
    if bool(flags[: sum(lengths)].all()):
        return lengths
    each = flags[: sum(lengths)].split(lengths)
    return [int(run.long().cumprod(0).sum()) for run in each]


def asked_of_drafter(requests: list[DraftRequest]) -> list[DraftRequest]:
    """Requests whose block is not only copied: the first ones."""
    return [request for request in requests if not request.alone or request.match is None]


def add_copies(block: DraftBlock | None, requests: list[DraftRequest], gamma: int, drafter: Drafter) -> DraftBlock:
    """The drafter's `block` for `asked_of_drafter(requests)` (None: there were none), with the copies below it."""
    copied = [(request.match, request.copied) for request in requests if request.alone and request.match is not None]
    if drafter.copying is None:
        assert block is not None, "a drafter that may not copy was asked for copies alone"
        return block
    return with_copies(block, [match for match, _ in copied], [record for _, record in copied], gamma, drafter.copying)
