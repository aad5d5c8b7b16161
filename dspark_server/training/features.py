"""Features of a sequence from the frozen target: its tapped layers, its last hidden state, the mass of its logits.

Computed by our own decoder at the first request for a sequence, and kept in a bounded file afterwards.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dspark_server.models.decoder import Decoder
from dspark_server.runtime.batch import Batch, Run
from dspark_server.runtime.kv import KVPool
from dspark_server.runtime.paging import CacheLayout, tables_for
from dspark_server.training.corpus import Corpus

BLOCK = 16
SLICE = 128  # rows of logits at a time


class TargetFeatures:
    """Features of a corpus's sequences, bfloat16; sequences that fit in `cache_gib` are computed once."""

    def __init__(
        self, target: Decoder, taps: tuple[int, ...], corpus: Corpus, directory: Path | None, cache_gib: float
    ) -> None:
        self._target = target
        self._taps = taps
        self._corpus = corpus
        self._width = (len(taps) + 1) * target.config.hidden_size
        longest = int(np.diff(corpus.start).max())
        layout = CacheLayout.of([target.caches], BLOCK, torch.bfloat16.itemsize)
        blocks = sum(group.blocks_between(0, longest) for group in layout.groups)
        self._pool = KVPool(blocks, layout, torch.bfloat16)
        self._tables = tables_for(layout.groups, iter(range(blocks)), 0, longest)
        kept = int(np.searchsorted(corpus.start, cache_gib * 2**30 / (2 * self._width), side="right")) - 1
        self._cached = max(0, min(kept, corpus.size)) if directory else 0
        if directory and self._cached:
            directory.mkdir(parents=True, exist_ok=True)
            shape = (int(corpus.start[self._cached]), self._width)
            self._rows = _open(directory / "features.bin", np.uint16, shape)
            self._done = _open(directory / "done.bin", np.uint8, (self._cached,))
            self._logsums = _open(directory / "logsum.bin", np.float32, shape[:1])
            self._summed = _open(directory / "summed.bin", np.uint8, (self._cached,))

    @torch.inference_mode()
    def of(self, index: int, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` tokens' taps [length, m * D] and final-normed hidden state [length, D], bfloat16."""
        if index < self._cached:
            start, end = self._corpus.start[index], self._corpus.start[index + 1]
            if not self._done[index]:
                self._rows[start:end] = self._compute(self._corpus.sequence(index).tolist()).view(torch.uint16).numpy()
                self._done[index] = 1  # after its rows: a kill in between leaves it unmarked
            rows = torch.from_numpy(np.array(self._rows[start : start + length])).view(torch.bfloat16)
        else:
            rows = self._compute(self._corpus.sequence(index)[:length].tolist())
        hidden = self._target.config.hidden_size
        return rows[:, :-hidden], rows[:, -hidden:]

    @torch.inference_mode()
    def logsum(self, index: int, length: int) -> Tensor:
        """log sum exp [length] float32 of the target's logits over its whole vocabulary at the first tokens."""
        if index >= self._cached:
            return self._log_sum_exp(self.of(index, length)[1])
        start, end = self._corpus.start[index], self._corpus.start[index + 1]
        if not self._summed[index]:
            self._logsums[start:end] = self._log_sum_exp(self.of(index, int(end - start))[1]).numpy()
            self._summed[index] = 1
        return torch.from_numpy(np.array(self._logsums[start : start + length]))

    def _log_sum_exp(self, hidden: Tensor) -> Tensor:
        return torch.cat([self._target.logits(rows).logsumexp(-1) for rows in hidden.split(SLICE)])

    def _compute(self, tokens: list[int]) -> Tensor:
        batch = Batch.of([Run(tokens, 0, self._tables, len(tokens))], self._pool.groups)
        hidden, taps = self._target.forward(batch, self._pool.layers(0), self._taps)
        return torch.cat([*taps, hidden], dim=1)


def _open(path: Path, dtype: type, shape: tuple[int, ...]) -> "np.memmap[tuple[int, ...], np.dtype[np.generic]]":
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    mode = "r+" if path.exists() and path.stat().st_size == size else "w+"
    return np.memmap(path, dtype=dtype, mode=mode, shape=shape)  # type: ignore[call-overload,no-any-return]
