"""The executor of a device with a queue: draft, pass and acceptance are queued; the host waits only for their results.

A step waits twice: for the draft, because its survivals determine the prefix lengths, and for the accepted tokens. If
the policy fixes the number of verified tokens before the draft (`Rest`), it waits once: draft tokens stay on the
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
from dspark_kernels import Favour, Filters, Kernels
from torch import Tensor

from dspark_server.config import EngineConfig
from dspark_server.engine.device_acceptance import DeviceAcceptance
from dspark_server.engine.executor import Budget, Clock, are_finite, leading, row_starts, with_drafts
from dspark_server.models.decoder import Decoder
from dspark_server.runtime.batch import Run
from dspark_server.runtime.device import Device
from dspark_server.runtime.graphs import Graphs, Results, up_to
from dspark_server.runtime.kv import KVPool
from dspark_server.runtime.layout import lay_out, lay_out_blocks
from dspark_server.runtime.paging import BlockTable, CacheGroup, tables_for
from dspark_server.runtime.staging import Field, Staging
from dspark_server.speculation.acceptance import Accepted
from dspark_server.speculation.admission import keep_likeliest
from dspark_server.speculation.calibration import survival_from
from dspark_server.speculation.copy_drafter import Copying, by_drafter
from dspark_server.speculation.copying import CopyBias
from dspark_server.speculation.draft_block import DraftBlock, DraftRequest
from dspark_server.speculation.drafter import Drafter
from dspark_server.speculation.dspark import DSparkDrafter
from dspark_server.speculation.noise import CounterStreams, Streams
from dspark_server.speculation.sampling import SamplingBatch

I32, I64, F32, F64, BOOL = torch.int32, torch.int64, torch.float32, torch.float64, torch.bool


class DeviceExecutor:
    """Target and drafter on `device`; implements `Executor` as the module describes.

    `sizes` are the token counts that get CUDA graphs; none: everything runs eagerly. The buffers serve one step at a
    time: a cycle ends before the next one begins.
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
    ) -> None:
        self.gamma = drafter.gamma
        self.block = drafter.block
        self.target = target
        self.drafter = drafter
        self.model = drafter.inner if isinstance(drafter, Copying) else drafter
        self.pool = pool
        self.device = device
        self.passes = Graphs(device, up_to(sizes, max_tokens))
        self.drafts = Graphs(device, up_to(sizes, max_requests))

        wide, most = max(1, drafter.block), max_requests
        tables = _table_fields(pool, most, target.max_model_len + self.gamma + 1, max_tokens)
        self.draft_tokens = device.zeros((most, wide), I64)
        self.survival = device.zeros((most, wide), F32)
        self.usable = device.zeros((most,), I64)
        self._named = torch.ones_like(self.draft_tokens, dtype=BOOL)
        self.asked = Staging(
            device,
            {
                "requests": ((1,), I64),
                "anchors": ((most,), I64),
                "positions": ((most,), I64),
                "inverse": ((most,), F32),
                "uniforms": ((most, wide), F64),
                "top_k": ((most,), I64),
                "top_p": ((most,), F32),
                "min_p": ((most,), F32),
                "scale": ((most, wide), F32),
                "shift": ((most, wide), F32),
                "weights": ((most, 2), F32),
                "offsets": ((most, wide), F32),
                "copied": ((most, wide), I64),
                "bias": ((most, wide), F32),
                "following": ((most,), BOOL),
                **tables,
            },
        )
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
                **tables,
            },
        )
        self.acceptance = DeviceAcceptance(device, kernels, most, max(1, self.gamma))

    def cycle(self, runs: list[Run], streams: Streams, clock: Clock) -> "DeviceCycle":
        return DeviceCycle(self, runs, streams)

    @torch.inference_mode()
    def capture(self) -> None:
        """Record every graph, the largest first: the others reuse its memory pool. Writes scratch only."""
        nobody: dict[str, Sequence[int]] = {name: [] for name in self.asked.host}
        for size in reversed(self.drafts.sizes):
            if isinstance(self.model, DSparkDrafter):
                self.asked.upload(nobody, rows=size)
                for sampled in (True, False) if self.model.sampler.in_one_call else ():
                    self.drafts.run(size, self.whole_blocks(sampled), sampled)
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
        if isinstance(self.model, DSparkDrafter):
            tables = self._some_tables(self.gamma + 2)
            cycle.draft([DraftRequest(0, 0, 0, tables, self.block)] * requests, sampling)
        logits, _ = cycle.verify(None)
        if self.target.group.rank == 0:
            few = min(requests, tokens)
            cycle.accept(logits, range(few + 1), None, [-1] * few, sampling.select(torch.arange(few)))

    def _some_tables(self, tokens: int) -> list[BlockTable]:
        return tables_for(self.pool.groups, itertools.cycle(range(self.pool.num_blocks)), 0, tokens)

    # -- draft -------------------------------------------------------------------------------------------------------

    @property
    def dspark(self) -> DSparkDrafter:
        assert isinstance(self.model, DSparkDrafter), "the engine must not draft without a drafter"
        return self.model

    def stage_draft(
        self,
        requests: Sequence[DraftRequest],
        sampling: SamplingBatch,
        copies: CopyBias | None,
        inverse: Tensor,
        uniforms: Tensor | None,
    ) -> None:
        """Stage a draft's inputs."""
        calibration, nothing = self.dspark.sampler.calibration, torch.zeros(0)
        favour = None if copies is None else copies.all_named()
        weights, offsets = (nothing, nothing)
        scale, shift = calibration.scaling(sampling.temperature)
        if copies is not None:
            weights, offsets = calibration.trust(sampling.temperature, copies.bucket)
        self.asked.upload(
            {
                "requests": [len(requests)],
                "anchors": [request.anchor for request in requests],
                "positions": [request.position for request in requests],
                "inverse": inverse,
                "uniforms": nothing if uniforms is None else uniforms,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p,
                "scale": scale,
                "shift": shift,
                "weights": weights,
                "offsets": offsets,
                "copied": nothing if favour is None else favour.tokens,
                "bias": nothing if favour is None else favour.bias,
                "following": nothing if favour is None else favour.following,
                **_tables(self.pool.groups, [request.tables for request in requests]),
            },
            rows=len(requests),
        )

    def backbone(self, size: int) -> tuple[Tensor, Tensor]:
        drafter, pool = self.dspark, self.pool
        mask = drafter.config.mask_token_id
        batch = lay_out_blocks(size, drafter.gamma, self.asked.there, mask, pool.groups, pool.scratch)
        return drafter.backbone(batch, pool)

    def whole_blocks(self, sampled: bool) -> Callable[[int], Results]:
        """Function that drafts: gives q, on, odds and confidence; writes tokens, usable and survival for the pass."""
        sampler = self.dspark.sampler

        def work(size: int) -> Results:
            hidden, base = self.backbone(size)
            asked = {name: field[:size] for name, field in self.asked.there.items()}
            favour = None
            if sampler.draft_tokens is None:
                favour = Favour(asked["copied"], asked["copied"], self._named[:size], asked["bias"], asked["following"])
            uniforms = filters = None
            if sampled:
                uniforms, filters = asked["uniforms"], Filters(asked["top_k"], asked["top_p"], asked["min_p"])
            drawn, confidence = sampler.whole_block(
                hidden, base, asked["anchors"], asked["inverse"], uniforms, favour, filters
            )
            self.draft_tokens[:size] = drawn.tokens
            self.usable[:size] = drawn.usable
            if confidence is None:
                self.survival[:size] = torch.nan
            else:
                favoured = (drawn.on, drawn.odds, asked["weights"], asked["offsets"])
                self.survival[:size] = survival_from(confidence, asked["scale"], asked["shift"], favoured)
            return drawn.law, drawn.on, drawn.odds, confidence

        return work

    # -- pass --------------------------------------------------------------------------------------------------------

    def launch(
        self, runs: list[Run], requests: Sequence[DraftRequest] = (), budget: Budget | None = None, size: int = 0
    ) -> tuple[Tensor, ...]:
        """Queue a pass over `runs`, and with a budget over the likeliest tokens of the last draft, of `requests`.

        Gives logits [N, V] float32, row_start [R+1] and drafted [R] as in `Layout`, and which tokens have finite hidden
        states [N] bool, on the device.
        """
        size = max(size, sum(len(run.tokens) for run in runs) + (budget.count if budget else 0))
        draft_row = [0] * len(runs) if budget else []
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
                "recorded": budget.recorded[:, : self.survival.shape[1]] if budget else [],
                **_tables(self.pool.groups, [run.tables for run in runs]),
            },
            rows=len(runs),
        )
        results = self.passes.run(size, self._pass)
        assert all(result is not None for result in results)
        return tuple(result for result in results if result is not None)

    def _pass(self, size: int) -> Results:
        staged, pool = self.runs.there, self.pool
        survival = torch.where(self.survival.isnan(), staged["recorded"], self.survival)
        kept = keep_likeliest(survival, self.usable.minimum(staged["limits"]), staged["keep"])
        layout = lay_out(size, staged, self.draft_tokens, kept, pool.groups, pool.scratch)
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
        own, drafter = by_drafter(requests), self._executor.drafter
        block = None
        if own:
            model = self._executor.dspark
            copies = model.copies(own, sampling)
            # If the drafter has its own vocabulary, a copied token may need a column: known only from the logits.
            if model.sampler.takes_whole_blocks(sampling) and (copies is None or model.sampler.draft_tokens is None):
                ahead = budget if len(own) == len(requests) and self._may_go_on(budget) else None
                block = self._draft_whole(own, sampling, copies, ahead)
            else:
                block = self._draft_slot_by_slot(own, sampling, copies)
        if isinstance(drafter, Copying):
            return drafter.complete(block, requests)
        assert block is not None, "the engine must not draft without a drafter"
        return replace(block, requests=requests)

    def _may_go_on(self, budget: Budget | None) -> bool:
        """Whether acceptance takes one call for all requests, and no prompt is scored."""
        if budget is None or not budget.sampling.at_once or not len(budget.sampling):
            return False
        return all(run.logits_rows <= 1 for run in self._runs)

    def _draft_whole(
        self,
        requests: Sequence[DraftRequest],
        sampling: SamplingBatch,
        copies: CopyBias | None,
        budget: Budget | None,
    ) -> DraftBlock:
        """Backbone and sampler in one call, replayed if there is a graph; with a budget, pass and acceptance too."""
        executor, count = self._executor, len(requests)
        sampler = executor.dspark.sampler
        inverse, uniforms = sampler.whole_block_noise(sampling, self._streams)
        executor.stage_draft(requests, sampling, copies, inverse, uniforms)
        sampled = uniforms is not None
        q, on, odds, confidence = executor.drafts.run(count, executor.whole_blocks(sampled), sampled)
        assert on is not None
        assert odds is not None
        self._marks.append(self._device.mark())
        q = None if q is None else q[:count]
        names = sampler.draft_tokens
        columns = None if q is None or names is None else names.expand(q.shape)
        wanted = [executor.draft_tokens[:count], executor.usable[:count], on[:count], odds[:count]]
        if confidence is not None:
            wanted += [confidence[:count], executor.survival[:count]]
        lengths: list[int] = []
        if budget is None:
            landed = self._device.fetch(wanted)
        else:
            landed, lengths = self._go_on(requests, budget, q, columns, wanted)
        tokens, usable, favoured, before, *scores = landed
        if copies is not None:
            copies.on, copies.odds = favoured, before
        scored, survival = scores if scores else (None, None)
        return DraftBlock(
            tokens,
            usable,
            q,
            columns,
            survival,
            has_confidence=scored is not None,
            requests=requests,
            lengths=lengths,
            confidence=scored,
            copies=copies,
        )

    def _go_on(
        self,
        requests: Sequence[DraftRequest],
        budget: Budget,
        q: Tensor | None,
        columns: Tensor | None,
        wanted: list[Tensor],
    ) -> tuple[list[Tensor], list[int]]:
        """Run pass and acceptance of a draft that the host has not seen.

        Gives `wanted` on the host and the rows' lengths, in one wait.
        """
        executor = self._executor
        logits, starts, drafted, self._finite = executor.launch(self._runs, requests, budget)
        self._marks.append(self._device.mark())
        block = DraftBlock(executor.draft_tokens, executor.usable, q, columns)
        sampled = [run for run, share in enumerate(self._runs) if share.logits_rows]
        row = executor.runs.there["draft_row"] - 1
        outcome = executor.acceptance.ahead(
            logits, starts, drafted, block, row, sampled, budget.sampling, self._streams
        )
        *landed, taken, stood, token, failed, self._landed = self._device.fetch(
            [*wanted, drafted, outcome.count, outcome.token, outcome.failed, self._finite]
        )
        lengths = [int(taken[request.run]) for request in requests]
        self._runs = with_drafts(self._runs, DraftBlock(landed[0], landed[1], requests=requests, lengths=lengths))
        starts_here = row_starts(self._runs)
        self._verified = logits[: starts_here[-1]], starts_here
        self._accepted, self._waited = Accepted(stood, token, failed), True
        return landed, lengths

    def _draft_slot_by_slot(
        self, requests: Sequence[DraftRequest], sampling: SamplingBatch, copies: CopyBias | None
    ) -> DraftBlock:
        """Replay the backbone alone; heads and sampling that branch on values run eagerly, and the host waits."""
        executor, count, where = self._executor, len(requests), self._device.where
        executor.stage_draft(requests, sampling, copies, sampling.temperature, None)
        hidden, base = executor.drafts.run(count, executor.backbone, "backbone")
        copies = None if copies is None else copies.to(where)
        assert hidden is not None
        assert base is not None
        anchors = executor.asked.there["anchors"][:count]
        sampler = executor.dspark.sampler
        block = sampler.sample(hidden[:count], base[:count], anchors, sampling.to(where), self._streams, copies)
        here = {name: value for name, value in vars(block).items() if name in HOST and value is not None}
        landed: dict[str, Any] = dict(zip(here, self._device.fetch(list(here.values())), strict=True))
        if copies is not None:
            copies = copies.to(torch.device("cpu"))
        self._marks.append(self._device.mark())
        return replace(block, **landed, copies=copies)

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


HOST = ("tokens", "confidence", "survival", "usable", "hidden", "base_logits", "logits")  # of a DraftBlock


def _table_fields(pool: KVPool, most: int, longest: int, max_tokens: int) -> dict[str, Field]:
    """Staged fields of the block tables of `most` requests: up to `longest` tokens, steps of up to `max_tokens`."""
    fields: dict[str, Field] = {}
    for index, group in reversed(list(enumerate(pool.groups))):  # the longest table last: only its used rows are sent
        reach = longest
        if group.reach is not None:
            reach = min(longest, group.reach + max_tokens)
            fields[f"first{index}"] = ((most,), I64)
        fields[f"tables{index}"] = ((most, group.blocks_between(0, reach) + 2), I32)
    return fields


def _tables(groups: Sequence[CacheGroup], tables: Sequence[Sequence[BlockTable]]) -> dict[str, Any]:
    """Block tables of R runs in each group, [R, W] padded with zeros; in groups with a reach each one's first token."""
    fields: dict[str, Any] = {}
    for index in reversed(range(len(groups))):
        own = [each[index] for each in tables]
        width = max((len(table.blocks) for table in own), default=0)
        rows = [table.blocks + [0] * (width - len(table.blocks)) for table in own]
        if groups[index].reach is not None:
            fields[f"first{index}"] = [table.first for table in own]
        fields[f"tables{index}"] = torch.tensor(rows, dtype=I32).view(len(own), width)
    return fields


def working_bytes(executor_of: Callable[[int], Any], config: EngineConfig, target: Decoder) -> int:
    """Bytes of the largest step beyond weights and KV pool: a full pass with logits for every token, a full draft.

    `executor_of` builds an executor over a number of KV blocks. Graphs are not counted: they use the memory that
    --gpu-memory-utilization leaves free.
    """
    length = min(config.max_num_batched_tokens, target.max_model_len)
    executor = executor_of(-(-length // config.block_size) + 2)
    assert isinstance(executor, DeviceExecutor)
    return executor.device.peak(lambda: executor.rehearse(length, config.max_num_seqs))
