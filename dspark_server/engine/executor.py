"""Interface of the step loop to a model. `TorchExecutor` runs real weights; tests and the simulator have their own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from dspark_kernels import Kernels
from torch import Tensor

from dspark_server.models.decoder import Decoder
from dspark_server.runtime.batch import Batch, Run
from dspark_server.runtime.kv import KVPool
from dspark_server.speculation.acceptance import Accepted, accept
from dspark_server.speculation.draft_block import DraftBlock, DraftRequest
from dspark_server.speculation.drafter import Drafter
from dspark_server.speculation.estimates import Shifts
from dspark_server.speculation.noise import Streams
from dspark_server.speculation.sampling import SamplingBatch

Clock = Callable[[], float]  # in seconds


@dataclass(frozen=True)
class Budget:
    """Known before a draft, where the policy fixes the number of verified tokens (§5.2): the rest of the step.

    The `count` likeliest draft tokens are verified; recorded [R, gamma] float32 is their survival if the drafter has no
    confidence, `corrections` are those of their rows either way. `sampling` has a row for each run of the pass that
    samples.
    """

    count: int
    recorded: Tensor
    corrections: Shifts
    sampling: SamplingBatch


class Cycle(Protocol):
    """One step on the hardware: a draft or none, the pass, acceptance, in this order. Measures its own time."""

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds of draft and pass, known after acceptance; (0, 0) for a step that was not waited for."""

    def draft(
        self, requests: Sequence[DraftRequest], sampling: SamplingBatch, budget: Budget | None = None
    ) -> DraftBlock:
        """Draft up to gamma tokens for each request. KV slots for anchor and block are reserved.

        Copies come last; `sampling` has a row for each of the others. With a `budget` an executor need not wait for its
        draft: it may run pass and acceptance at once. The block then has its lengths.
        """

    def verify(self, block: DraftBlock | None) -> tuple[Tensor, list[int]]:
        """The one target pass: all runs, with the draft tokens that `block` says.

        Gives logits [M, V] float32 and where each run's rows start (R + 1 entries).
        """

    def accept(
        self,
        logits: Tensor,
        row_start: Sequence[int],
        block: DraftBlock | None,
        rows: Sequence[int],
        sampling: SamplingBatch,
    ) -> Accepted:
        """`acceptance.accept`, with its outcome on the host. `logits` may be written."""

    def finite_rows(self) -> list[int]:
        """Number of leading tokens of each run of the pass with finite hidden states after the last layer.

        Their keys then hold no NaN, and their values neither NaN nor infinity, in every layer of the target: a token
        attends to itself, and the residual stream carries a non-finite value to its end. So the rows that a drafter
        observes are finite too; a NaN from its own projection of them costs drafts, but fails no request.
        """


class Executor(Protocol):
    """Runs steps."""

    gamma: int  # most draft tokens of a block

    @property
    def block(self) -> int:
        """Most draft tokens of a block that a model drafts; longer ones are copies."""

    @property
    def recorded(self) -> tuple[Sequence[int], Sequence[int]]:
        """Sizes of recorded passes, in tokens, and of recorded drafts, in requests; see `Profile.recorded`."""
        return (), ()

    def cycle(self, runs: list[Run], streams: Streams, clock: Clock) -> Cycle:
        """Begin a step over `runs`, which hold the committed tokens of its pass."""


class TorchExecutor:
    """Target and drafter over one paged KV pool; its owner 0 is the target, owner 1 the drafter.

    `jointly` as in `acceptance.accept`.
    """

    def __init__(
        self, target: Decoder, drafter: Drafter, pool: KVPool, kernels: Kernels | None = None, *, jointly: bool = True
    ) -> None:
        self.gamma = drafter.gamma
        self.block = drafter.block
        self.target = target
        self.drafter = drafter
        self.pool = pool
        self.kernels = kernels
        self.jointly = jointly
        self.recorded = (), ()

    def cycle(self, runs: list[Run], streams: Streams, clock: Clock) -> "TorchCycle":
        return TorchCycle(self, runs, streams, clock)


class TorchCycle:
    """A step on the CPU, whose every call is done when it returns."""

    def __init__(self, executor: TorchExecutor, runs: list[Run], streams: Streams, clock: Clock) -> None:
        self._executor = executor
        self._runs = runs
        self._streams = streams
        self._clock = clock
        self._draft = self._pass = 0.0
        self._last = torch.empty(0)  # hidden states [N, D] after the last layer

    @property
    def seconds(self) -> tuple[float, float]:
        return self._draft, self._pass

    def draft(
        self, requests: Sequence[DraftRequest], sampling: SamplingBatch, budget: Budget | None = None
    ) -> DraftBlock:
        began = self._clock()
        block = self._executor.drafter.propose(requests, sampling, self._streams, self._executor.pool)
        self._draft = self._clock() - began
        return block

    def verify(self, block: DraftBlock | None) -> tuple[Tensor, list[int]]:
        began = self._clock()
        target, drafter, pool = self._executor.target, self._executor.drafter, self._executor.pool
        self._runs = with_drafts(self._runs, block)
        batch = Batch.of(self._runs, pool.groups)
        last = target.config.num_layers - 1
        hidden, (*taps, self._last) = target.forward(batch, pool.layers(0), (*drafter.taps, last))
        # For every token of every request, speculating or not: a later prefix hit must find its draft rows.
        drafter.observe(taps, batch, pool)
        logits = target.logits(hidden)
        self._pass = self._clock() - began
        return logits, batch.row_start

    def accept(
        self,
        logits: Tensor,
        row_start: Sequence[int],
        block: DraftBlock | None,
        rows: Sequence[int],
        sampling: SamplingBatch,
    ) -> Accepted:
        executor = self._executor
        return accept(
            logits, row_start, block, rows, sampling, self._streams, executor.kernels, jointly=executor.jointly
        )

    def finite_rows(self) -> list[int]:
        return leading(are_finite(self._last), self._runs)


def with_drafts(runs: list[Run], block: DraftBlock | None) -> list[Run]:
    """The runs with the draft tokens to verify; each needs one more row of logits."""
    if block is None:
        return runs
    whole = list(runs)
    for index, tokens in block.prefixes.items():
        run = whole[index]
        whole[index] = run._replace(tokens=run.tokens + tokens, logits_rows=run.logits_rows + len(tokens))
    return whole


def row_starts(runs: list[Run]) -> list[int]:
    """Start of each run's rows of logits, and the end of the last run's."""
    return list(accumulate((run.logits_rows for run in runs), initial=0))


def are_finite(hidden: Tensor) -> Tensor:
    """Whether each row of `hidden` [N, D] is finite, [N] bool; one whose sum overflows float32 counts as not finite."""
    return hidden.sum(-1, dtype=torch.float32).isfinite()


def leading(flags: Tensor, runs: list[Run]) -> list[int]:
    """Number of leading tokens of each run with true `flags` [at least N] bool, of the N tokens of all runs."""
    lengths = [len(run.tokens) for run in runs]
    if bool(flags[: sum(lengths)].all()):
        return lengths
    each = flags[: sum(lengths)].split(lengths)
    return [int(run.long().cumprod(0).sum()) for run in each]
