"""Requested log-probabilities: of the target, over its raw logits, as vLLM reports them.

Raw means before controls, temperature and filters; natural logarithms, float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability and rank (1: most likely), and the most likely tokens in falling order."""

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


def token_logprobs(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """Log-probability of each of N tokens by its row of logits [N, V], with the `count` most likely tokens."""
    laws = logits.float().log_softmax(dim=-1)
    own = laws.gather(1, torch.tensor(tokens).to(logits.device).unsqueeze(1))
    ranks = (laws > own).sum(dim=1) + 1
    best = laws.topk(count, dim=1) if count else None
    tops: list[list[tuple[int, float]]] = [[] for _ in tokens]
    if best is not None:
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        tops = [list(zip(names, values, strict=True)) for names, values in rows]
    whole = zip(tokens, own.squeeze(1).tolist(), ranks.tolist(), tops, strict=True)
    return [TokenLogprob(*each) for each in whole]
