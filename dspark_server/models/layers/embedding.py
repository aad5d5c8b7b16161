"""The embedding of tokens, and the head that turns hidden rows into logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_server.runtime.linear import Linear


class Embedding:
    """Token ids to rows of `weight` [V, D], times a scale that is rounded to the weights' dtype first."""

    def __init__(self, weight: Tensor, scale: float = 1.0) -> None:
        self.weight = weight
        self._scale = None if scale == 1.0 else float(torch.tensor(scale, dtype=weight.dtype))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Token ids [N] int64 -> their embeddings [N, D], a fresh tensor."""
        rows = F.embedding(tokens, self.weight)
        return rows if self._scale is None else rows.mul_(self._scale)


class Head:
    """Hidden rows [M, D] to logits [M, V] float32, capped to softcap * tanh(logit / softcap) where there is a cap.

    Before that they are multiplied by `scale`.
    """

    def __init__(self, linear: Linear, softcap: float | None = None, scale: float = 1.0) -> None:
        self.linear = linear
        self._softcap = softcap
        self._scale = scale

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden, out_float32=True)
        if self._scale != 1.0:
            logits = logits.mul_(self._scale)
        return logits if self._softcap is None else logits.div_(self._softcap).tanh_().mul_(self._softcap)
