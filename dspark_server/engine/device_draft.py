"""A drafter with a model on a device: its static inputs, what an executor records over them, the host's side.

Shapes: R requests of a draft, at most Rd; gamma draft tokens of the drafter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from dspark_kernels import DraftedTokens, Favour, Filters
from torch import Tensor

from dspark_server.runtime.batch import Batch
from dspark_server.runtime.device import Device
from dspark_server.runtime.graphs import Graphs, Results
from dspark_server.runtime.kv import KVPool
from dspark_server.runtime.layout import lay_out_blocks, staged_tables
from dspark_server.runtime.staging import Field, Staging
from dspark_server.speculation.calibration import survival_from
from dspark_server.speculation.copying import CopyBias
from dspark_server.speculation.draft_block import DraftBlock, DraftRequest
from dspark_server.speculation.model_drafter import ModelDrafter
from dspark_server.speculation.noise import Streams
from dspark_server.speculation.sampling import SamplingBatch
from dspark_server.speculation.sequential import BlockSampler, Drawing, usable_slots

I64, F32, F64, BOOL = torch.int64, torch.float32, torch.float64, torch.bool
HOST = ("tokens", "confidence", "survival", "usable", "hidden", "base_logits", "logits")  # fields of a DraftBlock


@dataclass(frozen=True)
class Drafted:
    """Results of a draft that stay on the device for its pass: tokens and survival [Rd, gamma], usable [Rd]."""

    tokens: Tensor
    survival: Tensor
    usable: Tensor

    @classmethod
    def empty(cls, device: Device, most: int, gamma: int) -> "Drafted":
        """Room for `most` requests."""
        return cls(device.zeros((most, gamma), I64), device.zeros((most, gamma), F32), device.zeros((most,), I64))


@dataclass(frozen=True)
class Queued:
    """A draft that is queued: its q and columns, which stay on the device, and the `wanted` tensors of its block."""

    q: Tensor | None
    columns: Tensor | None
    wanted: list[Tensor]
    copies: CopyBias | None

    def block(self, landed: Sequence[Tensor], requests: Sequence[DraftRequest], lengths: Sequence[int]) -> DraftBlock:
        """The block, of `landed`, the wanted tensors on the host."""
        tokens, usable, favoured, before, *scores = landed
        if self.copies is not None:
            self.copies.on, self.copies.odds = favoured, before
        scored, survival = scores if scores else (None, None)
        return DraftBlock(
            tokens,
            usable,
            self.q,
            self.columns,
            survival,
            has_confidence=scored is not None,
            requests=requests,
            lengths=lengths,
            confidence=scored,
            copies=self.copies,
        )


class DeviceDraft:
    """Drafts of `drafter` for up to `most` requests; tokens, survival and usable slots go to `drafted`.

    Drafts up to the largest of `graphs` are replayed; larger ones, and slots that need the host, run eagerly.
    """

    def __init__(
        self,
        drafter: ModelDrafter,
        pool: KVPool,
        device: Device,
        drafted: Drafted,
        graphs: Graphs,
        tables: Mapping[str, Field],
    ) -> None:
        most, wide = drafted.tokens.shape
        self._drafter = drafter
        self._pool = pool
        self._device = device
        self._drafted = drafted
        self._graphs = graphs
        self._named = torch.ones_like(drafted.tokens, dtype=BOOL)
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

    def capture(self) -> None:
        """Record every graph, the largest first."""
        nobody: dict[str, Sequence[int]] = {name: [] for name in self.asked.host}
        for size in reversed(self._graphs.sizes):
            self.asked.upload(nobody, rows=size)
            for sampled in (True, False) if self._drafter.sampler.in_one_call else ():
                self._graphs.run(size, self._whole_blocks(sampled), sampled)

    def copies(self, requests: Sequence[DraftRequest], sampling: SamplingBatch) -> CopyBias | None:
        """Copies from the requests' own texts that bias the draft; None: none."""
        return self._drafter.copies(requests, sampling)

    def takes_whole_blocks(self, sampling: SamplingBatch, copies: CopyBias | None) -> bool:
        """Whether `whole` can draw the blocks."""
        sampler = self._drafter.sampler
        # If the drafter has its own vocabulary, a copied token may need a column: known only from the logits.
        return sampler.takes_whole_blocks(sampling) and (copies is None or sampler.draft_tokens is None)

    def whole(
        self, requests: Sequence[DraftRequest], sampling: SamplingBatch, streams: Streams, copies: CopyBias | None
    ) -> Queued:
        """Queue all passes and the sampler in one call, replayed if there is a graph."""
        count, sampler, drafted = len(requests), self._drafter.sampler, self._drafted
        inverse, uniforms = sampler.whole_block_noise(sampling, streams, self._drafter.gamma)
        self._stage(requests, sampling, copies, inverse, uniforms)
        sampled = uniforms is not None
        q, on, odds, confidence = self._graphs.run(count, self._whole_blocks(sampled), sampled)
        assert on is not None
        assert odds is not None
        q = None if q is None else q[:count]
        names = sampler.draft_tokens
        columns = None if q is None or names is None else names.expand(q.shape)
        wanted = [drafted.tokens[:count], drafted.usable[:count], on[:count], odds[:count]]
        if confidence is not None:
            wanted += [confidence[:count], drafted.survival[:count]]
        return Queued(q, columns, wanted, copies)

    def slot_by_slot(
        self, requests: Sequence[DraftRequest], sampling: SamplingBatch, streams: Streams, copies: CopyBias | None
    ) -> DraftBlock:
        """Replay a parallel drafter's pass alone; all else, which branches on values, runs eagerly: the host waits."""
        count, where, drafter = len(requests), self._device.where, self._drafter
        self._stage(requests, sampling, copies, sampling.temperature, None)
        copies = None if copies is None else copies.to(where)
        drawing = Drawing(drafter.sampler, self.asked.there["anchors"][:count], sampling.to(where), streams, copies)
        if drafter.passes == 1:
            hidden, base = self._graphs.run(count, self._only_pass, "pass")
            assert hidden is not None
            assert base is not None
            drawing.draw(hidden[:count], base[:count])
        else:
            drafter.run(self._blocks(count), drawing, self._pool, max(1, max(request.limit for request in requests)))
        block = drawing.block(drafter.gamma)
        here = {name: value for name, value in vars(block).items() if name in HOST and value is not None}
        landed: dict[str, Any] = dict(zip(here, self._device.fetch(list(here.values())), strict=True))
        if copies is not None:
            copies = copies.to(torch.device("cpu"))
        return replace(block, **landed, copies=copies)

    def _stage(
        self,
        requests: Sequence[DraftRequest],
        sampling: SamplingBatch,
        copies: CopyBias | None,
        inverse: Tensor,
        uniforms: Tensor | None,
    ) -> None:
        """Stage a draft's inputs."""
        calibration, nothing = self._drafter.sampler.calibration, torch.zeros(0)
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
                **staged_tables(self._pool.groups, [request.tables for request in requests]),
            },
            rows=len(requests),
        )

    def _blocks(self, size: int) -> Batch:
        drafter, pool = self._drafter, self._pool
        return lay_out_blocks(size, drafter.width, self.asked.there, drafter.mask_token, pool.groups, pool.scratch)

    def _only_pass(self, size: int) -> Results:
        anchors = self.asked.there["anchors"][:size]
        return self._drafter.forward(0, self._blocks(size), anchors, None, self._pool)[:2]

    def _whole_blocks(self, sampled: bool) -> Callable[[int], Results]:
        """Function that drafts: gives q, on, odds and confidence; writes to `drafted`."""
        sampler, drafted = self._drafter.sampler, self._drafted

        def work(size: int) -> Results:
            asked = {name: field[:size] for name, field in self.asked.there.items()}
            favour = None
            if sampler.draft_tokens is None:
                favour = Favour(asked["copied"], asked["copied"], self._named[:size], asked["bias"], asked["following"])
            uniforms = filters = None
            if sampled:
                uniforms, filters = asked["uniforms"], Filters(asked["top_k"], asked["top_p"], asked["min_p"])
            drawing = WholeDrawing(sampler, asked["anchors"], asked["inverse"], uniforms, favour, filters)
            self._drafter.run(self._blocks(size), drawing, self._pool, self._drafter.gamma)
            drawn, confidence = drawing.drawn()
            drafted.tokens[:size] = drawn.tokens
            drafted.usable[:size] = drawn.usable
            if confidence is None:
                drafted.survival[:size] = torch.nan
            else:
                favoured = (drawn.on, drawn.odds, asked["weights"], asked["offsets"])
                drafted.survival[:size] = survival_from(confidence, asked["scale"], asked["shift"], favoured)
            return drawn.law, drawn.on, drawn.odds, confidence

        return work


class WholeDrawing:
    """Draws like `Drawing`, by kernel calls alone that read nothing on the host: see `BlockSampler.whole_block`."""

    def __init__(
        self,
        sampler: BlockSampler,
        anchors: Tensor,
        inverse_temperature: Tensor,
        uniforms: Tensor | None,
        favour: Favour | None,
        filters: Filters | None,
    ) -> None:
        """All for whole blocks, as in `Kernels.draft_tokens`."""
        self.previous = anchors
        self._sampler = sampler
        self._inverse = inverse_temperature
        self._uniforms = uniforms
        self._favour = favour
        self._filters = filters
        self._parts: list[tuple[DraftedTokens, Tensor | None]] = []
        self._slots = 0

    def draw(self, hidden: Tensor, base: Tensor) -> None:
        """See `Draws`."""
        here, favour = slice(self._slots, self._slots + base.shape[1]), self._favour
        uniforms = None if self._uniforms is None else self._uniforms[:, here].contiguous()
        if favour is not None:
            fields = (favour.tokens, favour.place, favour.named, favour.bias)
            tokens, place, named, bias = (field[:, here].contiguous() for field in fields)
            favour = Favour(tokens, place, named, bias, favour.following)
        drawn, confidence = self._sampler.whole_block(
            hidden, base, self.previous, self._inverse, uniforms, favour, self._filters
        )
        if favour is not None and self._favour is not None:
            followed = (drawn.tokens == favour.tokens).all(1)
            self._favour = replace(self._favour, following=favour.following & followed)
        self._parts.append((drawn, confidence))
        self._slots = here.stop
        self.previous = drawn.tokens[:, -1]

    def drawn(self) -> tuple[DraftedTokens, Tensor | None]:
        """The blocks, and the confidence logits [R, gamma] if there is such a head."""
        if len(self._parts) == 1:
            return self._parts[0]
        drawn = [part for part, _ in self._parts]
        laws = [each.law for each in drawn if each.law is not None]
        return DraftedTokens(
            torch.cat([each.tokens for each in drawn], 1),
            torch.cat(laws, 1) if laws else None,
            torch.cat([each.on for each in drawn], 1),
            torch.cat([each.odds for each in drawn], 1),
            usable_slots([each.usable for each in drawn], [each.tokens.shape[1] for each in drawn]),
        ), None
