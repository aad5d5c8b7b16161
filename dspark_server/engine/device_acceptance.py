"""Acceptance on a device: in one call if no request has a seed or controls, else slot by slot, as on the host.

Shapes: R requests, L draft tokens of the longest block, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from dspark_kernels import Filters, Kernels
from torch import Tensor

from dspark_server.runtime.device import Device
from dspark_server.runtime.staging import Staging
from dspark_server.speculation.acceptance import Accepted, Noise, accept, accept_at_once
from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.noise import Streams
from dspark_server.speculation.sampling import SamplingBatch

I64, F32, F64, BOOL = torch.int64, torch.float32, torch.float64, torch.bool


class DeviceAcceptance:
    """Runs acceptance for passes of up to `most` requests whose blocks have up to `widest` tokens.

    `jointly` as in `acceptance.accept`.
    """

    def __init__(self, device: Device, kernels: Kernels, most: int, widest: int, *, jointly: bool) -> None:
        self._device = device
        self._jointly = jointly
        self._kernels = kernels
        self.staging = Staging(
            device,
            {
                "start": ((most,), I64),
                "lengths": ((most,), I64),
                "row": ((most,), I64),
                "run": ((most,), I64),
                "tokens": ((most, widest), I64),
                "inverse": ((most,), F32),
                "greedy": ((most,), BOOL),
                "coins": ((most, widest), F64),
                "last": ((most, widest + 1), F64),
                "top_k": ((most,), I64),
                "top_p": ((most,), F32),
                "min_p": ((most,), F32),
            },
        )

    def __call__(
        self,
        logits: Tensor,
        row_start: Sequence[int],
        block: DraftBlock | None,
        rows: Sequence[int],
        sampling: SamplingBatch,
        streams: Streams,
        beside: Tensor,
    ) -> tuple[Accepted, Tensor]:
        """`acceptance.accept`, with its outcome and the block's tokens on the host, and its q on the device.
        Gives the outcome, and `beside` on the host, fetched together.
        """
        if sampling.at_once and logits.dtype == F32:
            outcome = self._at_once(logits, row_start, block, rows, sampling, streams)
        else:
            where = self._device.where
            if block is not None:
                block = replace(block, tokens=block.tokens.to(where))
            there = sampling.to(where)
            outcome = accept(logits, row_start, block, rows, there, streams, self._kernels, jointly=self._jointly)
        *landed, beside = self._device.fetch([outcome.count, outcome.token, outcome.failed, beside])
        return Accepted(*landed), beside

    def ahead(
        self,
        logits: Tensor,
        row_start: Tensor,
        drafted: Tensor,
        block: DraftBlock,
        row: Tensor,
        sampled: Sequence[int],
        sampling: SamplingBatch,
        streams: Streams,
    ) -> Accepted:
        """The outcome [R], on the device, of a pass that the host has not seen.

        row_start, drafted and row, the rows of the block, cover every run of the layout; acceptance runs for the runs
        `sampled` [R].
        """
        noise = self._stage(Noise.of(sampling, streams, block.tokens.shape[1]), {"run": sampled}, len(sampled))
        run = self.staging.there["run"][: len(sampled)]
        mine = (logits, row_start[run], drafted[run], block, row[run])
        return accept_at_once(*mine, noise, self._kernels, jointly=self._jointly)

    def _at_once(
        self,
        logits: Tensor,
        row_start: Sequence[int],
        block: DraftBlock | None,
        rows: Sequence[int],
        sampling: SamplingBatch,
        streams: Streams,
    ) -> Accepted:
        count, lengths = len(sampling), [end - start - 1 for start, end in pairwise(row_start)]
        width = max(1, max(lengths))
        if block is None:
            block = DraftBlock.of(torch.zeros((1, width), dtype=I64))
        values: dict[str, Tensor | Sequence[int]] = {
            "start": row_start[:-1],
            "lengths": lengths,
            "row": rows,
            "tokens": block.tokens[:, :width],
        }
        noise = self._stage(Noise.of(sampling, streams, width), values, count)
        there = {name: field[:count] for name, field in self.staging.there.items()}
        block = replace(block, tokens=self.staging.there["tokens"][:, :width])
        mine = (logits, there["start"], there["lengths"], block, there["row"])
        return accept_at_once(*mine, noise, self._kernels, jointly=self._jointly)

    def _stage(self, noise: Noise, values: Mapping[str, Tensor | Sequence[int]], requests: int) -> Noise:
        """Upload the fields in use; gives the noise on the device."""
        named = {"greedy": noise.greedy, "inverse": noise.inverse_temperature, "coins": noise.coins, "last": noise.last}
        named |= {} if noise.filters is None else vars(noise.filters)
        used = {name: value for name, value in named.items() if value is not None}
        unused: dict[str, Tensor | Sequence[int]] = dict.fromkeys(self.staging.host, ())
        self.staging.upload({**unused, **values, **used})

        def there(name: str) -> Tensor | None:
            value, field = named[name], self.staging.there[name][:requests]
            if value is None:
                return None
            return field[:, : value.shape[1]].contiguous() if value.dim() == 2 else field

        filters = None
        if noise.filters is not None:
            fields = self.staging.there
            filters = Filters(*(fields[name][:requests] for name in ("top_k", "top_p", "min_p")))
        return Noise(there("greedy"), there("inverse"), there("coins"), there("last"), filters)
