"""The executor of a device with a queue: draft, pass and acceptance are queued; the host waits only for their results.

A step waits twice: for the draft, because its survivals determine the prefix lengths, and for the accepted tokens. If
the policy fixes the number of verified tokens before the draft (`Budget`), it waits once: draft tokens stay on the
device, which picks the likeliest, lays out the pass, runs it and its acceptance. Drafts and passes up to the largest
graph size are replayed (runtime/graphs.py); larger ones, and those that need the slot-by-slot sampler, run eagerly. All
of them are the same functions over the same buffers.

Shapes: R requests of a step, at most Rd; gamma draft tokens of the drafter; N token slots of a pass, T at most.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from dspark_kernels import Kernels
from torch import Tensor

from dspark_server.config import EngineConfig
from dspark_server.engine.device_acceptance import DeviceAcceptance
from dspark_server.engine.device_draft import DeviceDraft, Drafted, Queued
from dspark_server.engine.executor import Budget, Clock, are_finite, leading, row_starts, with_drafts
from dspark_server.models.decoder import Decoder
from dspark_server.runtime.batch import Run
from dspark_server.runtime.device import Device
from dspark_server.runtime.graphs import Graphs, Results, up_to
from dspark_server.runtime.kv import KVPool
from dspark_server.runtime.layout import lay_out, staged_tables, table_fields
from dspark_server.runtime.paging import BlockTable, tables_for
from dspark_server.runtime.staging import Staging
from dspark_server.speculation.acceptance import Accepted
from dspark_server.speculation.copy_drafter import Copying, by_drafter
from dspark_server.speculation.draft_block import DraftBlock, DraftRequest
from dspark_server.speculation.drafter import Drafter
from dspark_server.speculation.estimates import Shifts
from dspark_server.speculation.model_drafter import ModelDrafter
from dspark_server.speculation.noise import CounterStreams, Streams
from dspark_server.speculation.prefix_scheduler import keep_likeliest
from dspark_server.speculation.sampling import SamplingBatch

I64, F32 = torch.int64, torch.float32


class DeviceExecutor:
    """Target and drafter on `device`; implements `Executor` as the module describes.

    `sizes` are the token counts that get CUDA graphs; none: everything runs eagerly. `jointly` as in `accept`. The
    buffers serve one step at a time: a cycle ends before the next one begins.
    """

    def __init__(
        self,
        target: Decoder,
        drafter: Drafter,
        pool: KVPool,
        device: Device,
        kernels: Kernels,
        *,
        max_tokens: int,
        max_requests: int,
        sizes: Sequence[int],
        jointly: bool = True,
    ) -> None:
        self.gamma = drafter.gamma
        self.block = drafter.block
        self.target = target
        self.drafter = drafter
        self.pool = pool
        self.device = device
        self.passes = Graphs(device, up_to(sizes, max_tokens))
        self.drafts = Graphs(device, up_to(sizes, max_requests))
        self.recorded = tuple(self.passes.sizes), tuple(self.drafts.sizes)

        wide, most = max(1, drafter.block), max_requests
        tables = table_fields(pool.groups, most, target.max_model_len, max_tokens + self.gamma + 1)
        self.drafted = Drafted.empty(device, most, wide)
        model = drafter.inner if isinstance(drafter, Copying) else drafter
        self.model = None
        if isinstance(model, ModelDrafter):
            self.model = DeviceDraft(model, pool, device, self.drafted, self.drafts, tables)
        self.runs = Staging(
            device,
            {
                "tokens": ((max_tokens,), I64),
                "count": ((most,), I64),
                "context": ((most,), I64),
                "rows": ((most,), I64),
                "draft_row": ((most,), I64),
                "keep": ((1,), I64),
                "limits": ((most,), I64),
                "recorded": ((most, wide), F32),
                "gains": ((most,), F32),
                "shifts": ((most, wide), F32),
                **tables,
            },
        )
        self.acceptance = DeviceAcceptance(device, kernels, most, max(1, self.gamma), jointly=jointly)

    def cycle(self, runs: list[Run], streams: Streams, clock: Clock) -> "DeviceCycle":
        return DeviceCycle(self, runs, streams)

    @torch.inference_mode()
    def capture(self) -> None:
        """Record every graph, the largest first: the others reuse its memory pool. Writes scratch only."""
        if self.model is not None:
            self.model.capture()
        for size in reversed(self.passes.sizes):
            self.launch([], size=size)

    @torch.inference_mode()
    def rehearse(self, tokens: int, requests: int) -> None:
        """Run the largest possible step over arbitrary pool contents; its result is discarded.

        All ranks do it together; only rank 0 drafts and samples.
        """
        runs = [Run([0] * tokens, 0, self._some_tables(tokens), tokens)]
        sampling = SamplingBatch.of(position=[1] * requests, key=[0] * requests, top_k=[1] * requests)
        cycle = self.cycle(runs, CounterStreams(), perf_counter)
        if self.model is not None:
            tables = self._some_tables(self.gamma + 2)
            cycle.draft([DraftRequest(0, 0, 0, tables, self.block)] * requests, sampling)
        logits, _ = cycle.verify(None)
        if self.target.group.rank == 0:
            few = min(requests, tokens)
            cycle.accept(logits, range(few + 1), None, [-1] * few, sampling.select(torch.arange(few)))

    def _some_tables(self, tokens: int) -> list[BlockTable]:
        return tables_for(self.pool.groups, itertools.cycle(range(self.pool.num_blocks)), 0, tokens)

    # -- pass --------------------------------------------------------------------------------------------------------

    def launch(
        self, runs: list[Run], requests: Sequence[DraftRequest] = (), budget: Budget | None = None, size: int = 0
    ) -> tuple[Tensor, ...]:
        """Queue a pass over `runs`, and with a budget over the likeliest tokens of the last draft, of `requests`.

        Gives logits [N, V] float32, row_start [R+1] and drafted [R] as in `Layout`, and which tokens have finite hidden
        states [N] bool, on the device.
        """
        size = max(size, sum(len(run.tokens) for run in runs) + (budget.count if budget else 0))
        wide, draft_row = self.drafted.survival.shape[1], [0] * len(runs) if budget else []
        for row, request in enumerate(requests):
            draft_row[request.run] = row + 1
        self.runs.upload(
            {
                "tokens": [token for run in runs for token in run.tokens],
                "count": [len(run.tokens) for run in runs],
                "context": [run.context_len for run in runs],
                "rows": [run.logits_rows for run in runs],
                "draft_row": draft_row,
                "keep": [budget.count if budget else 0],
                "limits": [request.limit for request in requests],
                "recorded": budget.recorded[:, :wide] if budget else [],
                "gains": budget.corrections.gains if budget else [],
                "shifts": budget.corrections.shifts[:, :wide] if budget else [],
                **staged_tables(self.pool.groups, [run.tables for run in runs]),
            },
            rows=len(runs),
        )
        results = self.passes.run(size, self._pass)
        assert all(result is not None for result in results)
        return tuple(result for result in results if result is not None)

    def _pass(self, size: int) -> Results:
        staged, pool, drafted = self.runs.there, self.pool, self.drafted
        stated = torch.where(drafted.survival.isnan(), staged["recorded"], drafted.survival)
        survival = Shifts(staged["gains"], staged["shifts"]).applied(stated)
        kept = keep_likeliest(survival, drafted.usable.minimum(staged["limits"]), staged["keep"])
        layout = lay_out(size, staged, drafted.tokens, kept, pool.groups, pool.scratch)
        taps_and_last = (*self.drafter.taps, self.target.config.num_layers - 1)
        hidden, (*taps, last) = self.target.forward(layout.batch, pool.layers(0), taps_and_last)
        # For every token of every request, speculating or not: a later prefix hit must find its draft rows.
        self.drafter.observe(taps, layout.batch, pool)
        return self.target.logits(hidden), layout.row_start, layout.drafted, are_finite(last)


class DeviceCycle:
    """A step whose draft, pass and acceptance are queued; see `Cycle`. The logits stay on the device."""

    def __init__(self, executor: DeviceExecutor, runs: list[Run], streams: Streams) -> None:
        self._executor = executor
        self._device = executor.device
        self._runs = runs
        self._streams = streams
        self._marks: list[Any] = []  # before the draft, after it, after the pass
        self._waited = False
        self._verified: tuple[Tensor, list[int]] | None = None  # logits and row starts of the pass, once queued
        self._accepted: Accepted | None = None  # outcome of a pass that was queued together with its draft
        self._finite = torch.empty(0)  # [N] bool on the device: which of the pass's tokens have finite hidden states
        self._landed: Tensor | None = None  # the same on the host, once fetched

    @property
    def seconds(self) -> tuple[float, float]:
        """Of the device: the host is done with a call before the device is."""
        if not self._waited:
            return 0.0, 0.0
        spans = [self._device.seconds(begun, ended) for begun, ended in pairwise(self._marks)]
        return (spans[0], spans[1]) if len(spans) == 2 else (0.0, spans[0])

    def draft(
        self, requests: Sequence[DraftRequest], sampling: SamplingBatch, budget: Budget | None = None
    ) -> DraftBlock:
        """See `Cycle.draft`. The block's fields are on the host, except `q` and `columns`."""
        self._marks = [self._device.mark()]
        own, drafter, model = by_drafter(requests), self._executor.drafter, self._executor.model
        block = None
        if own:
            assert model is not None, "the engine must not draft without a drafter"
            copies = model.copies(own, sampling)
            if model.takes_whole_blocks(sampling, copies):
                queued = model.whole(own, sampling, self._streams, copies)
                self._marks.append(self._device.mark())
                if budget is not None and len(own) == len(requests) and self._may_go_on(budget):
                    block = self._go_on(own, budget, queued)
                else:
                    block = queued.block(self._device.fetch(queued.wanted), own, [])
            else:
                block = model.slot_by_slot(own, sampling, self._streams, copies)
                self._marks.append(self._device.mark())
        if isinstance(drafter, Copying):
            return drafter.complete(block, requests)
        assert block is not None, "the engine must not draft without a drafter"
        return replace(block, requests=requests)

    def _may_go_on(self, budget: Budget) -> bool:
        """Whether acceptance takes one call for all requests, and no prompt is scored."""
        if not budget.sampling.at_once or not len(budget.sampling):
            return False
        return all(run.logits_rows <= 1 for run in self._runs)

    def _go_on(self, requests: Sequence[DraftRequest], budget: Budget, queued: Queued) -> DraftBlock:
        """Run pass and acceptance of a draft that the host has not seen; its block and their outcome, in one wait."""
        executor = self._executor
        logits, starts, drafted, self._finite = executor.launch(self._runs, requests, budget)
        self._marks.append(self._device.mark())
        block = DraftBlock(executor.drafted.tokens, executor.drafted.usable, queued.q, queued.columns)
        sampled = [run for run, share in enumerate(self._runs) if share.logits_rows]
        row = executor.runs.there["draft_row"] - 1
        outcome = executor.acceptance.ahead(
            logits, starts, drafted, block, row, sampled, budget.sampling, self._streams
        )
        *landed, taken, stood, token, failed, self._landed = self._device.fetch(
            [*queued.wanted, drafted, outcome.count, outcome.token, outcome.failed, self._finite]
        )
        block = queued.block(landed, requests, [int(taken[request.run]) for request in requests])
        self._runs = with_drafts(self._runs, block)
        starts_here = row_starts(self._runs)
        self._verified = logits[: starts_here[-1]], starts_here
        self._accepted, self._waited = Accepted(stood, token, failed), True
        return block

    def verify(self, block: DraftBlock | None) -> tuple[Tensor, list[int]]:
        """See `Cycle.verify`; the logits may not be computed yet."""
        if self._verified is None:
            self._runs = with_drafts(self._runs, block)
            if not self._marks:
                self._marks = [self._device.mark()]
            logits, _, _, self._finite = self._executor.launch(self._runs)
            self._marks.append(self._device.mark())
            starts = row_starts(self._runs)
            self._verified = logits[: starts[-1]], starts
        return self._verified

    def accept(
        self,
        logits: Tensor,
        row_start: Sequence[int],
        block: DraftBlock | None,
        rows: Sequence[int],
        sampling: SamplingBatch,
    ) -> Accepted:
        if self._accepted is None:
            self._accepted, self._landed = self._executor.acceptance(
                logits, row_start, block, rows, sampling, self._streams, self._finite
            )
            self._waited = True
        return self._accepted

    def finite_rows(self) -> list[int]:
        """See `Cycle.finite_rows`; waits for the pass if its acceptance was not run."""
        if self._landed is None:
            (self._landed,) = self._device.fetch([self._finite])
        return leading(self._landed, self._runs)


def working_bytes(executor_of: Callable[[int], Any], config: EngineConfig, target: Decoder) -> int:
    """Bytes of the largest step beyond weights and KV pool: a full pass with logits for every token, a full draft.

    `executor_of` builds an executor over a number of KV blocks. Graphs are not counted: they use the memory that
    --gpu-memory-utilization leaves free.
    """
    length = min(config.max_num_batched_tokens, target.max_model_len)
    executor = executor_of(-(-length // config.block_size) + 2)
    assert isinstance(executor, DeviceExecutor)
    return executor.device.peak(lambda: executor.rehearse(length, config.max_num_seqs))
