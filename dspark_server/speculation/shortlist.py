"""Draft tokens from a few candidates per position, so that the sequential head does not scan the vocabulary.

The candidates: the K best of the position's base logits, known for the whole block at once, and the M tokens with the
greatest W1 W2 after the token before. The Markov correction is computed for them only and q is normalised over them.
Any q is lossless (the residual is taken over the whole of p), so a short list can only cost acceptance.
Shapes: R requests, Vd draft vocabulary, r Markov rank, C = K + M columns; columns are indices into Vd.
"""

import torch
from torch import Tensor

from dspark_server.speculation.heads import SequentialHead


class Shortlist:
    """K candidates of the backbone and, with `successors`, half as many successors of the token before."""

    def __init__(self, head: SequentialHead | None, size: int, *, successors: bool = True) -> None:
        self._head = head
        self._size = size
        self._successors = Successors(head, size // 2) if head is not None and size >= 2 and successors else None

    def best(self, base: Tensor) -> Tensor:
        """The columns [R, gamma, K] of the largest base logits [R, gamma, Vd]."""
        return base.topk(self._size, dim=-1, sorted=False).indices

    def logits(self, base: Tensor, best: Tensor, previous: Tensor, latent: Tensor | None) -> tuple[Tensor, Tensor]:
        """Columns [R, C] and corrected logits [R, C] of one position; the second of two equal columns is -inf.

        base [R, Vd] float32, best [R, K], previous [R] tokens, latent [R, r] (None without a head).
        """
        columns = best
        twice = None
        if self._successors is not None:
            following = self._successors.of(previous)
            twice = (following.unsqueeze(2) == best.unsqueeze(1)).any(2)
            columns = torch.cat([best, following], dim=1)
        logits = base.gather(1, columns)
        if self._head is not None and latent is not None:
            logits = logits + self._head.bias_of(latent, columns)
        if twice is not None:
            logits[:, best.shape[1] :].masked_fill_(twice, -torch.inf)
        return columns, logits


class Successors:
    """The M columns that W1[x] W2 scores highest, for every token x; a row is computed when x is first met."""

    def __init__(self, head: SequentialHead, count: int) -> None:
        self._head = head
        self._table = torch.full((head.vocab_size, count), -1, dtype=torch.int64, device=head.device)

    def of(self, previous: Tensor) -> Tensor:
        """previous [R] -> [R, M]."""
        rows = self._table[previous]
        new = rows[:, 0] < 0
        if bool(new.any()):
            tokens = previous[new].unique()
            scores = self._head.bias(self._head.embedding(tokens))
            self._table[tokens] = scores.topk(self._table.shape[1], dim=-1).indices
            rows = self._table[previous]
        return rows
