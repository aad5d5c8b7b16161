"""Requested log-probabilities: of the target, over its raw logits, as vLLM reports them.

Raw means before controls, temperature and filters; natural logarithms, float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from dspark_kernels import Kernels, ReferenceKernels
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability and rank (1: most likely), and the most likely tokens in falling order."""

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], count: int, kernels: Kernels | None = None
) -> list[TokenLogprob]:
    """Log-probability of each of N tokens by its row of logits [N, V], with the `count` most likely tokens.

    `kernels`, if given, compute them.
    """
    kernels = kernels or _PLAIN
    asked = torch.tensor(tokens, dtype=torch.int64).to(logits.device)
    own, ranks, best, values = kernels.log_probabilities(logits.float().contiguous(), asked, count)
    tops = [list(zip(names, each, strict=True)) for names, each in zip(best.tolist(), values.tolist(), strict=True)]
    whole = zip(tokens, own.tolist(), ranks.tolist(), tops, strict=True)
    return [TokenLogprob(*each) for each in whole]


_PLAIN = ReferenceKernels()
