"""`Rules` in plain PyTorch: one row after the other, in words close to their definition."""

from collections.abc import Sequence

import torch
from dspark_kernels.interface import Ruled, Rules
from torch import Tensor


def edit(logits: Tensor, rules: Rules, drafted: Sequence[int], position: int, names: Tensor) -> None:
    """Edit logits [C] of the token at `position` in place, before which stand the draft tokens `drafted`.

    names [C]: the token of each column.
    """
    if rules.allowed is not None:
        logits[~rules.allowed[names]] = -torch.inf
    forbidden = _ends_of_words(rules, drafted)
    if rules.early is not None and position < rules.until:
        forbidden += rules.early.tolist()
    logits[torch.isin(names, torch.tensor(forbidden, dtype=torch.int64, device=names.device))] = -torch.inf
    if rules.bias is not None:
        logits += rules.bias[names]
    if rules.seen is not None:
        more = torch.zeros(len(rules.seen), device=logits.device)
        more.index_add_(0, torch.tensor(drafted, dtype=torch.int64), torch.ones(len(drafted)))
        counts = more if rules.counts is None else rules.counts + more
        seen = (rules.seen | (more > 0))[names]
        scaled = torch.where(logits > 0, logits / rules.repetition, logits * rules.repetition)
        logits.copy_(torch.where(seen, scaled, logits))
        logits -= (rules.frequency * counts + rules.presence * (counts > 0))[names]


def _ends_of_words(rules: Rules, drafted: Sequence[int]) -> list[int]:
    """The last tokens of bad words whose other tokens come just before."""
    answer = [*(() if rules.tail is None else rules.tail.tolist()), *drafted]
    packed = [] if rules.words is None else rules.words.tolist()
    ends, at = [], 0
    while at < len(packed):
        word = packed[at + 1 : at + 1 + packed[at]]
        if len(word) == 1 or answer[-(len(word) - 1) :] == word[:-1]:
            ends.append(word[-1])
        at += 1 + len(word)
    return ends


def edit_rows(logits: Tensor, ruled: Ruled, drawn: Tensor, slot: int, names: Tensor) -> None:
    """`edit` of a slot's logits [R, C] in place: drawn [R, k] are the block's tokens before it, names [R, C]."""
    drafted = torch.cat([ruled.drafted, drawn], dim=1).tolist()
    rows = zip(ruled.rules, drafted, ruled.position.tolist(), strict=True)
    for row, (rules, before, position) in enumerate(rows):
        if rules is not None:
            edit(logits[row], rules, before, position + slot, names[row])
