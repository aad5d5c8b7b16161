"""The drafter's loss over the vocabulary (DSpark §3.3), forward and backward in one go, in slices of rows.

Logits of all rows at once would be gigabytes; a slice's are overwritten by their own gradient and multiplied away.
"""

from typing import Any

import torch
from dspark_kernels import Kernels
from torch import Tensor

SLICE = 512


class VocabularyLoss(torch.autograd.Function):
    """sum(ce_weight * CE + tv_weight * L1) over rows, differentiable in hidden, latent and w2.

    hidden [M, D] and latent [M, r] float32 give the draft's logits hidden head^T + latent w2^T, with head [V, D]
    frozen and w2 [V, r]; target [U, D] float32 gives the target's, target head^T, row target_rows[i] being row i's
    (blocks overlap: U < M); target_rows, labels [M] int64 and weights [M]. Where `head` is a part of the vocabulary's,
    logsum [U] is log sum exp of the target's logits over all of it (None: head is the whole).
    latent and w2 may be empty (r = 0). Returns the sum, and CE and L1 by row [M], the latter two without gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        latent: Tensor,
        w2: Tensor,
        head: Tensor,
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
        target_logits = target @ head.T
        mass = torch.ones(len(target))
        if logsum is not None:
            mass = torch.exp(target_logits.logsumexp(-1) - logsum).clamp(max=1)
        ce_rows, tv_rows = [], []
        for start in range(0, len(hidden), SLICE):
            rows = slice(start, start + SLICE)
            logits = hidden[rows] @ head.T
            if markov:
                logits.addmm_(latent[rows], w2.T)
            ce, tv = kernels.draft_loss(
                logits, target_logits, target_rows[rows], labels[rows], mass, ce_weight[rows], tv_weight[rows]
            )
            torch.mm(logits, head, out=hidden_grad[rows])
            if markov:
                torch.mm(logits, w2, out=latent_grad[rows])
                w2_grad.addmm_(logits.T, latent[rows])
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
