"""The executor of a device with a queue: draft, pass and acceptance are queued; the host waits only for their results.

A step waits twice: for the draft, because its survivals determine the prefix lengths, and for the accepted tokens. If
the policy fixes the number of verified tokens before the draft (`Rest`), it waits once: draft tokens stay on the
device, which picks the likeliest, lays out the pass, runs it and its acceptance. Drafts and passes up to the largest
graph size are replayed (runtime/graphs.py); larger ones, and those that need the slot-by-slot sampler, run eagerly. All
of them are the same functions over the same buffers.

Shapes: R requests of a step, at most Rd; gamma draft tokens of the drafter; N token slots of a pass, T at most.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from dspark_kernels import Favour, Filters, Kernels
from torch import Tensor

from dspark_server.config import EngineConfig
from dspark_server.engine.device_judge import DeviceJudge
from dspark_server.engine.executor import Rest, add_copies, are_finite, asked_of_drafter, leading
from dspark_server.models.decoder import Decoder
from dspark_server.runtime.batch import Run
from dspark_server.runtime.device import Device
from dspark_server.runtime.graphs import Graphs, Results, up_to
from dspark_server.runtime.kv import KVPool
from dspark_server.runtime.layout import lay_out, lay_out_blocks
from dspark_server.runtime.staging import Staging
from dspark_server.speculation.acceptance import Accepted, DraftTokens
from dspark_server.speculation.admission import keep_likeliest
from dspark_server.speculation.calibration import survival_from
from dspark_server.speculation.copying import WIDTH, CopyBias
from dspark_server.speculation.drafter import DraftBlock, DraftRequest, NoDrafter
from dspark_server.speculation.dspark import DSparkDrafter
from dspark_server.speculation.noise import CounterStreams, Streams
from dspark_server.speculation.sampling import SamplingBatch

I32, I64, F32, F64, BOOL = torch.int32, torch.int64, torch.float32, torch.float64, torch.bool


@dataclass(frozen=True)
class _Ahead:
    """A pass that was run, with acceptance, before the host asked for it: its runs, logits [M, V] and outcome."""

    runs: list[Run]
    logits: Tensor
    row_start: list[int]
    accepted: Accepted


class DeviceExecutor:
    """Target and drafter on `device`; implements `Executor` as the module describes.

    `sizes` are the token counts that get CUDA graphs; none: everything runs eagerly. The methods `judge` and `timing`
    are for the step loop's arguments of these names.
    """

    def __init__(
        self,
        target: Decoder,
        drafter: DSparkDrafter | NoDrafter,
        pool: KVPool,
        device: Device,
        kernels: Kernels,
        *,
        max_tokens: int,
        max_requests: int,
        sizes: Sequence[int],
    ) -> None:
        self.gamma = max(drafter.gamma, WIDTH) if drafter.copying else drafter.gamma
        self.target = target
        self.drafter = drafter
        self.pool = pool
        self.device = device
        self.passes = Graphs(device, up_to(sizes, max_tokens))
        self.drafts = Graphs(device, up_to(sizes, max_requests))
        self._ahead: _Ahead | None = None
        self._lengths: list[int] = []  # of the runs of the last pass
        self._finite = torch.empty(0)  # [N] bool on the device: which of its tokens have finite hidden states
        self._landed: Tensor | None = None  # the same on the host, once fetched
        self._marks: list[Any] = []
        self._seconds: tuple[float, float] | None = None

        wide, most = max(1, drafter.gamma), max_requests
        blocks = -(-(target.max_model_len + self.gamma + 1) // pool.block_size) + 1
        tables = {"tables": ((most, blocks), I32)}
        self._draft_tokens = device.zeros((most, wide), I64)
        self._survival = device.zeros((most, wide), F32)
        self._usable = device.zeros((most,), I64)
        self._named = torch.ones_like(self._draft_tokens, dtype=BOOL)
        self._asked = Staging(
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
        self._runs = Staging(
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
        self._judge = DeviceJudge(device, kernels, most, max(1, self.gamma))

    @property
    def block(self) -> int:
        return self.drafter.gamma

    @torch.inference_mode()
    def capture(self) -> None:
        """Record every graph, the largest first: the others reuse its memory pool. Writes scratch only."""
        nobody: dict[str, Sequence[int]] = {name: [] for name in self._asked.host}
        for size in reversed(self.drafts.sizes):
            if isinstance(self.drafter, DSparkDrafter):
                self._asked.upload(nobody, rows=size)
                for sampled in (True, False) if self.drafter.sampler.in_one_call else ():
                    self.drafts.run(size, self._whole_blocks(sampled), sampled)
        for size in reversed(self.passes.sizes):
            self._launch([], None, size)

    @torch.inference_mode()
    def rehearse(self, tokens: int, requests: int) -> None:
        """Run the largest possible step over arbitrary pool contents; its result is discarded.

        All ranks do it together; only rank 0 drafts and samples.
        """
        table = list(range(-(-tokens // self.pool.block_size)))
        runs = [Run([0] * tokens, 0, table, tokens)]
        sampling = SamplingBatch.of(position=[1] * requests, key=[0] * requests, top_k=[1] * requests)
        if isinstance(self.drafter, DSparkDrafter):
            reach = list(range(-(-(self.gamma + 2) // self.pool.block_size)))
            self.draft([DraftRequest(0, 0, reach)] * requests, sampling, CounterStreams())
        logits, _ = self.verify(runs)
        if self.target.group.rank == 0:
            few = min(requests, tokens)
            self.judge(logits, range(few + 1), None, [0] * few, sampling.select(torch.arange(few)), CounterStreams())
        self.timing(0.0, 0.0)

    # -- draft -------------------------------------------------------------------------------------------------------

    def draft(
        self,
        requests: list[DraftRequest],
        sampling: SamplingBatch,
        streams: Streams,
        rest: Callable[[], Rest] | None = None,
    ) -> DraftBlock:
        """See `Executor.draft`. The block's fields are on the host, except `q` and `columns`."""
        self._ahead, self._seconds, self._marks = None, None, [self.device.mark()]
        asked = asked_of_drafter(requests)
        block = None
        if asked:
            assert isinstance(self.drafter, DSparkDrafter), "the engine must not draft without a drafter"
            copies = self.drafter.copies(asked, sampling)
            sampler = self.drafter.sampler
            # If the drafter has its own vocabulary, a copied token may need a column: known only from the logits.
            if sampler.takes_whole_blocks(sampling) and (copies is None or sampler.draft_tokens is None):
                after = rest() if rest and len(asked) == len(requests) else None
                block = self._draft_whole(asked, sampling, streams, copies, after)
            else:
                block = self._draft_slot_by_slot(asked, sampling, streams, copies)
        return add_copies(block, requests, self.gamma, self.drafter)

    def _draft_whole(
        self,
        requests: list[DraftRequest],
        sampling: SamplingBatch,
        streams: Streams,
        copies: CopyBias | None,
        rest: Rest | None,
    ) -> DraftBlock:
        """Backbone and sampler in one call, replayed if there is a graph; with `rest`, pass and acceptance too."""
        drafter, count = self._dspark, len(requests)
        inverse, uniforms = drafter.sampler.whole_block_noise(sampling, streams)
        self._ask(requests, sampling, copies, inverse, uniforms)
        sampled = uniforms is not None
        law, on, odds, confidence = self.drafts.run(count, self._whole_blocks(sampled), sampled)
        assert on is not None
        assert odds is not None
        self._marks.append(self.device.mark())
        law = None if law is None else law[:count]
        names = drafter.sampler.draft_tokens
        columns = None if law is None or names is None else names.expand(law.shape)
        wanted = [self._draft_tokens[:count], self._usable[:count], on[:count], odds[:count]]
        if confidence is not None:
            wanted += [confidence[:count], self._survival[:count]]
        if rest is not None and _may_go_on(rest):
            landed = self._go_on(rest, law, columns, streams, wanted)
        else:
            landed = self.device.fetch(wanted)
        tokens, usable, favoured, before, *scores = landed
        if copies is not None:
            copies.on, copies.odds = favoured, before
        scored, survival = scores if scores else (None, None)
        return DraftBlock(tokens, law, columns, scored, survival, usable, copies)

    def _draft_slot_by_slot(
        self, requests: list[DraftRequest], sampling: SamplingBatch, streams: Streams, copies: CopyBias | None
    ) -> DraftBlock:
        """Replay the backbone alone; heads and sampling that branch on values run eagerly, and the host waits."""
        drafter, count, where = self._dspark, len(requests), self.device.where
        self._ask(requests, sampling, copies, sampling.temperature, None)
        hidden, base = self.drafts.run(count, self._backbone, "backbone")
        copies = None if copies is None else copies.to(where)
        assert hidden is not None
        assert base is not None
        anchors = self._asked.there["anchors"][:count]
        block = drafter.sampler.sample(hidden[:count], base[:count], anchors, sampling.to(where), streams, copies)
        here = {name: value for name, value in vars(block).items() if name in HOST and value is not None}
        landed = dict(zip(here, self.device.fetch(list(here.values())), strict=True))
        if copies is not None:
            copies = copies.to(torch.device("cpu"))
        self._marks.append(self.device.mark())
        return replace(block, **landed, copies=copies)

    @property
    def _dspark(self) -> DSparkDrafter:
        assert isinstance(self.drafter, DSparkDrafter)
        return self.drafter

    def _ask(
        self,
        requests: list[DraftRequest],
        sampling: SamplingBatch,
        copies: CopyBias | None,
        inverse: Tensor,
        uniforms: Tensor | None,
    ) -> None:
        """Stage a draft's inputs."""
        calibration, nothing = self._dspark.sampler.calibration, torch.zeros(0)
        favour = None if copies is None else copies.all_named()
        weights, offsets = (nothing, nothing)
        scale, shift = calibration.scaling(sampling.temperature)
        if copies is not None:
            weights, offsets = calibration.trust(sampling.temperature, copies.bucket)
        self._asked.upload(
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
                "tables": _tables([request.block_table for request in requests]),
            },
            rows=len(requests),
        )

    def _backbone(self, size: int) -> tuple[Tensor, Tensor]:
        drafter, pool = self._dspark, self.pool
        mask = drafter.config.mask_token_id
        batch = lay_out_blocks(size, drafter.gamma, self._asked.there, mask, pool.block_size, pool.scratch)
        return drafter.backbone(batch, pool)

    def _whole_blocks(self, sampled: bool) -> Callable[[int], Results]:
        """Function that drafts: gives q, on, odds and confidence; writes tokens, usable and survival for the pass."""
        sampler = self._dspark.sampler

        def work(size: int) -> Results:
            hidden, base = self._backbone(size)
            asked = {name: field[:size] for name, field in self._asked.there.items()}
            favour = None
            if sampler.draft_tokens is None:
                favour = Favour(asked["copied"], asked["copied"], self._named[:size], asked["bias"], asked["following"])
            uniforms = filters = None
            if sampled:
                uniforms, filters = asked["uniforms"], Filters(asked["top_k"], asked["top_p"], asked["min_p"])
            drawn, confidence = sampler.whole_block(
                hidden, base, asked["anchors"], asked["inverse"], uniforms, favour, filters
            )
            self._draft_tokens[:size] = drawn.tokens
            self._usable[:size] = drawn.usable
            if confidence is None:
                self._survival[:size] = torch.nan
            else:
                favoured = (drawn.on, drawn.odds, asked["weights"], asked["offsets"])
                self._survival[:size] = survival_from(confidence, asked["scale"], asked["shift"], favoured)
            return drawn.law, drawn.on, drawn.odds, confidence

        return work

    # -- pass --------------------------------------------------------------------------------------------------------

    def verify(self, runs: list[Run]) -> tuple[Tensor, list[int]]:
        """See `Executor.verify`; the logits are on the device, and may not be computed yet."""
        self._lengths = [len(run.tokens) for run in runs]
        if self._ahead is not None:
            if _same(runs, self._ahead.runs):
                return self._ahead.logits, self._ahead.row_start
            self._ahead = None  # run again: it overwrites the rows of that pass in the cache
        if len(self._marks) not in (1, 2):
            self._marks = [self.device.mark()]
        logits, _, _ = self._launch(runs, None)
        self._marks.append(self.device.mark())
        row_start = _row_start(runs)
        return logits[: row_start[-1]], row_start

    def _launch(self, runs: list[Run], rest: Rest | None, size: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queue a pass over `runs`, and with `rest` over the likeliest `rest.count` tokens of the last draft.

        Gives logits [N, V] float32, row_start [R+1] and drafted [R] as in `Layout`, on the device.
        """
        size = max(size, sum(len(run.tokens) for run in runs) + (rest.count if rest else 0))
        self._runs.upload(
            {
                "tokens": [token for run in runs for token in run.tokens],
                "count": [len(run.tokens) for run in runs],
                "context": [run.context_len for run in runs],
                "rows": [run.logits_rows for run in runs],
                "draft_row": [row + 1 for row in rest.rows] if rest else [],
                "keep": [rest.count] if rest else [0],
                "limits": rest.limits if rest else [],
                "recorded": rest.recorded[:, : self._survival.shape[1]] if rest else [],
                "tables": _tables([run.block_table for run in runs]),
            },
            rows=len(runs),
        )
        logits, row_start, drafted, finite = self.passes.run(size, self._pass)
        assert finite is not None
        self._finite, self._landed = finite, None
        assert logits is not None
        assert row_start is not None
        assert drafted is not None
        return logits, row_start, drafted

    def _pass(self, size: int) -> Results:
        staged, pool = self._runs.there, self.pool
        survival = torch.where(self._survival.isnan(), staged["recorded"], self._survival)
        kept = keep_likeliest(survival, self._usable.minimum(staged["limits"]), staged["keep"])
        layout = lay_out(size, staged, self._draft_tokens, kept, pool.block_size, pool.scratch)
        taps_and_last = (*self.drafter.taps, self.target.config.num_layers - 1)
        hidden, (*taps, last) = self.target.forward(layout.batch, pool.layers(0), taps_and_last)
        # For every token of every request, speculating or not: a later prefix hit must find its draft rows.
        self.drafter.observe(taps, layout.batch, pool)
        return self.target.logits(hidden), layout.row_start, layout.drafted, are_finite(last)

    def finite_rows(self) -> list[int]:
        """See `Executor.finite_rows`; waits for the pass if its acceptance was not run."""
        if self._landed is None:
            (self._landed,) = self.device.fetch([self._finite])
        return leading(self._landed, self._lengths)

    # -- acceptance --------------------------------------------------------------------------------------------------

    def _go_on(
        self, rest: Rest, law: Tensor | None, columns: Tensor | None, streams: Streams, wanted: list[Tensor]
    ) -> list[Tensor]:
        """Run pass and acceptance of a draft that the host has not seen; gives `wanted` on the host, in one wait."""
        logits, starts, drafted = self._launch(rest.runs, rest)
        self._marks.append(self.device.mark())
        draft = DraftTokens(self._draft_tokens, law, self._runs.there["draft_row"] - 1, columns)
        outcome = self._judge.ahead(logits, starts, drafted, draft, rest.sampled, rest.sampling, streams)
        *landed, taken, stood, token, failed, self._landed = self.device.fetch(
            [*wanted, drafted, outcome.count, outcome.token, outcome.failed, self._finite]
        )
        runs = _with_drafts(rest, landed[0].tolist(), taken.tolist())
        row_start = _row_start(runs)
        accepted = Accepted(stood, token, failed)
        self._ahead = _Ahead(runs, logits[: row_start[-1]], row_start, accepted)
        return landed

    def judge(
        self,
        logits: Tensor,
        row_start: Sequence[int],
        draft: DraftTokens | None,
        lengths: Sequence[int],
        sampling: SamplingBatch,
        streams: Streams,
    ) -> Accepted:
        """`acceptance.accept`, with its outcome and `draft.tokens` on the host, and `draft.q` on the device."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and logits is ahead.logits:
            accepted = ahead.accepted
        else:
            accepted, self._landed = self._judge(logits, row_start, draft, lengths, sampling, streams, self._finite)
        if len(self._marks) == 3:
            begun, drafted, verified = self._marks
            self._seconds = (self.device.seconds(begun, drafted), self.device.seconds(drafted, verified))
        elif len(self._marks) == 2:
            self._seconds = (0.0, self.device.seconds(*self._marks))
        return accepted

    def timing(self, draft: float, verify: float) -> tuple[float, float]:
        """Seconds of the step's draft and pass on the device, in place of those by the host's clock.

        (0, 0) for a step that was not waited for; selection's cost model leaves it out as an outlier.
        """
        seconds, self._seconds, self._marks = self._seconds, None, []
        return seconds or (0.0, 0.0)


HOST = ("tokens", "confidence", "survival", "usable", "hidden", "base_logits", "logits")  # of a DraftBlock


def _may_go_on(rest: Rest) -> bool:
    """Whether acceptance takes one call for all requests, and no prompt is scored."""
    return bool(rest.sampled) and rest.sampling.at_once and all(run.logits_rows <= 1 for run in rest.runs)


def _with_drafts(rest: Rest, tokens: list[list[int]], drafted: list[int]) -> list[Run]:
    """The runs of `rest` with the draft tokens that the device has added."""
    return [
        run if row < 0 else run._replace(tokens=run.tokens + tokens[row][:length], logits_rows=run.logits_rows + length)
        for run, row, length in zip(rest.runs, rest.rows, drafted, strict=False)
    ]


def _same(runs: list[Run], others: list[Run]) -> bool:
    """Whether both are the same work for the same requests; a request is identified by its block list object."""
    return len(runs) == len(others) and all(
        run == other and run.block_table is other.block_table for run, other in zip(runs, others, strict=True)
    )


def _row_start(runs: list[Run]) -> list[int]:
    row_start = [0]
    for run in runs:
        row_start.append(row_start[-1] + run.logits_rows)
    return row_start


def _tables(tables: list[list[int]]) -> Tensor:
    """Block tables as one [R, W] int32, padded with zeros."""
    width = max(map(len, tables), default=0)
    return torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=I32).view(len(tables), width)


def working_bytes(executor_of: Callable[[int], Any], config: EngineConfig, target: Decoder) -> int:
    """Bytes of the largest step beyond weights and KV pool: a full pass with logits for every token, a full draft.

    `executor_of` builds an executor over a number of KV blocks. Graphs are not counted: they use the memory that
    --gpu-memory-utilization leaves free.
    """
    length = min(config.max_num_batched_tokens, target.max_model_len)
    executor = executor_of(-(-length // config.block_size) + 2)
    assert isinstance(executor, DeviceExecutor)
    return executor.device.peak(lambda: executor.rehearse(length, config.max_num_seqs))
