"""The drafter's loss over the vocabulary (DSpark §3.3), forward and backward in one pass, in slices of rows.

Logits of all rows at once would be gigabytes; a slice's are overwritten by their own gradient, which is used at once.
"""

from typing import Any

import torch
from dspark_kernels import Kernels
from torch import Tensor

from dspark_server.runtime.linear import choose_backend

SLICE = 512


class FrozenHead:
    """The rows of the target's output matrix that the loss sees, weight [V, D] float32.

    With `bfloat16` the loss's products are computed in it. Logits are never rounded to it: a logit of 20 would be off
    by up to 0.06, a tenth of the error of a half-trained draft. Gradients are rounded.
    """

    def __init__(self, weight: Tensor, kernels: Kernels, *, bfloat16: bool = False) -> None:
        self.weight = weight
        self._linear = kernels.linear
        self._rounded = weight.bfloat16() if bfloat16 else None
        native = self._rounded is not None and choose_backend(torch.bfloat16, kernels) == "native"
        self._packed = kernels.pack_linear(self._rounded) if self._rounded is not None and native else None

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [M, D] float32 -> hidden weight^T [M, V] float32."""
        if self._packed is None:
            return hidden @ self.weight.T
        return self._linear(hidden.bfloat16(), self._packed, torch.float32)

    def gradients(self, logits: Tensor, latent: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the loss, from those by `logits` [M, V], by hidden [M, D], latent [M, r] and w2 [V, r]."""
        if self._rounded is None:
            return logits @ self.weight, logits @ w2, logits.T @ latent
        logits = logits.bfloat16()
        return logits @ self._rounded, logits @ w2.bfloat16(), logits.T @ latent.bfloat16()


class VocabularyLoss(torch.autograd.Function):
    """sum(ce_weight * CE + tv_weight * L1) over rows, differentiable in hidden, latent and w2.

    hidden [M, D] and latent [M, r] float32 give the draft's logits hidden head^T + latent w2^T, with head [V, D] frozen
    and w2 [V, r]; target [U, D] float32 gives the target's, target head^T; row target_rows[i] of it belongs to row i
    (blocks overlap: U < M); target_rows, labels [M] int64 and weights [M]. If `head` is a part of the vocabulary's,
    logsum [U] is log sum exp of the target's logits over all of it (None: head is the whole). latent and w2 may be
    empty (r = 0). Returns the sum, and CE and L1 by row [M], the latter two without gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        latent: Tensor,
        w2: Tensor,
        head: FrozenHead,
        target: Tensor,
        target_rows: Tensor,
        logsum: Tensor | None,
        labels: Tensor,
        ce_weight: Tensor,
        tv_weight: Tensor,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor, Tensor]:
        markov = latent.shape[1] > 0
        hidden_grad, latent_grad, w2_grad = torch.empty_like(hidden), torch.empty_like(latent), torch.zeros_like(w2)
        target_logits = head.logits(target)
        mass = torch.ones(len(target))
        if logsum is not None:
            mass = torch.exp(target_logits.logsumexp(-1) - logsum).clamp(max=1)
        ce_rows, tv_rows = [], []
        for start in range(0, len(hidden), SLICE):
            rows = slice(start, start + SLICE)
            logits = head.logits(hidden[rows])
            if markov:
                logits.addmm_(latent[rows], w2.T)
            ce, tv = kernels.draft_loss(
                logits, target_logits, target_rows[rows], labels[rows], mass, ce_weight[rows], tv_weight[rows]
            )
            hidden_grad[rows], latent_grad[rows], by_w2 = head.gradients(logits, latent[rows], w2)
            w2_grad += by_w2
            ce_rows.append(ce)
            tv_rows.append(tv)
        ctx.save_for_backward(hidden_grad, latent_grad, w2_grad)
        cross_entropy, distance = torch.cat(ce_rows), torch.cat(tv_rows)
        ctx.mark_non_differentiable(cross_entropy, distance)
        return (ce_weight * cross_entropy + tv_weight * distance).sum(), cross_entropy, distance

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, latent_grad, w2_grad = ctx.saved_tensors
        scale = upstream[0]
        return (scale * hidden_grad, scale * latent_grad, scale * w2_grad, *[None] * 8)
