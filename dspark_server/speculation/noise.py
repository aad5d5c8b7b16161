"""Random noise: counter-based streams, a pure function of purpose, request and position.

Shapes: R requests, N rows of logits, V vocabulary, K offsets.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_server.speculation.sampling import SamplingBatch

# Constants of Philox4x32-10: its factors, and what each of its rounds has added to the two key words.
LOW, SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
FACTORS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_STEPS = [np.uint64(weyl) * np.arange(10, dtype=np.uint64) for weyl in (0x9E3779B9, 0xBB67AE85)]


class Purpose(IntEnum):
    """The purpose of a piece of noise. Streams of different purposes are independent (a word of the Philox counter)."""

    DRAFT = 1
    COIN = 2
    RESIDUAL = 3  # the token that ends a cycle: residual, bonus, or plain sampling
    GUMBEL = 4


class Streams(Protocol):
    """A source of noise. Production: `CounterStreams`; tests substitute tables."""

    def uniform(self, purpose: Purpose, sampling: SamplingBatch, offsets: Tensor) -> Tensor:
        """[R, K] f64 in [0, 1), independent over purpose, key, choice, draft number and position[r] + offsets[k]."""

    def exponential(self, sampling: SamplingBatch, vocabulary: int, dtype: torch.dtype) -> Tensor:
        """[N, V], positive: standard exponentials that depend on (key, choice, position, token) and nothing else."""


def philox4x32(counter: Sequence[NDArray[np.uint64]], key: Sequence[NDArray[np.uint64]]) -> list[NDArray[np.uint64]]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    Four counter words and two key words, uint64 arrays that hold 32 bits and broadcast; gives four such arrays.
    """
    c0, c1, c2, c3 = counter
    # The key words of all rounds at once: most calls are for a few numbers, and each operation takes a microsecond.
    keys = [(word + step.reshape(-1, *[1] * word.ndim)) & LOW for word, step in zip(key, KEY_STEPS, strict=True)]
    for k0, k1 in zip(*keys, strict=True):
        a, b = c0 * FACTORS[0], c2 * FACTORS[1]
        c0, c1, c2, c3 = (b >> SHIFT) ^ c1 ^ k0, b & LOW, (a >> SHIFT) ^ c3 ^ k1, a & LOW
    return [c0, c1, c2, c3]


class CounterStreams:
    """Noise as a pure function of purpose, request and position: no state advances, so batching cannot reorder it.

    Rows of exponentials are kept up to `cache_bytes`, as the target asks for the row its draft has just used, and a
    rejected position is drafted again. That changes time, never values.
    """

    def __init__(self, cache_bytes: int = 128 << 20) -> None:
        self._cache_bytes = cache_bytes
        self._rows: dict[tuple[int, int, int, int, torch.dtype], Tensor] = {}

    def uniform(self, purpose: Purpose, sampling: SamplingBatch, offsets: Tensor) -> Tensor:
        """See `Streams.uniform`. 52 bits and a half: strictly inside (0, 1), with extremes 2^-53 and 1 - 2^-53."""
        position = _words(sampling.position)[:, None] + _words(offsets)[None, :]
        draft, choice = _words(sampling.draft_number)[:, None], _words(sampling.choice)[:, None]
        high, low, _, _ = philox4x32([position, draft, choice, np.full_like(position, purpose)], _key(sampling.key))
        bits = ((high >> np.uint64(6)) << np.uint64(26)) + (low >> np.uint64(6))
        return torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-52).to(sampling.key.device)

    def exponential(self, sampling: SamplingBatch, vocabulary: int, dtype: torch.dtype) -> Tensor:
        """See `Streams.exponential`. Token v takes word v % 4 of block v // 4.

        E = -log1p(-w) with w = (bits + 1/2) / 2^32. The smallest E wins, so w needs its precision near 0: log1p keeps
        it in float32 too, whereas g = -log(-log(u)) has u near 1 there, and float32 rounds that to 1 and g to infinity.
        w stays below 1, so E is finite and positive.
        """
        where = zip(sampling.key.tolist(), sampling.choice.tolist(), sampling.position.tolist(), strict=True)
        rows = [self._row(key, choice, position, vocabulary, dtype) for key, choice, position in where]
        return torch.stack(rows).to(sampling.key.device)

    def _row(self, key: int, choice: int, position: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
        name = (key, choice, position, vocabulary, dtype)
        row = self._rows.pop(name, None)
        if row is None:
            row = _exponential_row(key, choice, position, vocabulary, dtype)
        self._rows[name] = row  # last used, last evicted
        while len(self._rows) * row.nbytes > self._cache_bytes:
            del self._rows[next(iter(self._rows))]
        return row


def _exponential_row(key: int, choice: int, position: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    # One row at a time: its arrays stay in the second-level cache, which halves the time against all rows together.
    block = np.arange((vocabulary + 3) // 4, dtype=np.uint64)
    rest = [np.array([word & 0xFFFFFFFF], dtype=np.uint64) for word in (position, choice, Purpose.GUMBEL)]
    key_words = [np.array([word & 0xFFFFFFFF], dtype=np.uint64) for word in (key, key >> 32)]
    words = np.stack(philox4x32([block, *rest], key_words), axis=-1).reshape(-1)[:vocabulary]
    w = torch.from_numpy((words.astype(np.float64) + 0.5) * 2.0**-32).to(dtype)
    return torch.log1p(w.clamp_(max=1 - torch.finfo(dtype).eps / 2).neg_()).neg_()


def _words(values: Tensor) -> NDArray[np.uint64]:
    """The low 32 bits of each of [n] int64, as uint64."""
    words: NDArray[np.uint64] = values.cpu().numpy().astype(np.uint64) & np.uint64(0xFFFFFFFF)
    return words


def _key(key: Tensor) -> list[NDArray[np.uint64]]:
    """[R] int64 -> the two 32-bit Philox key words, [R, 1] each."""
    bits = key.cpu().numpy().astype(np.uint64)[:, None]
    return [bits & np.uint64(0xFFFFFFFF), bits >> np.uint64(32)]
