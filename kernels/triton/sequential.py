"""The drafter's sequential head (DSpark §3.2): whole blocks left to right, in one launch over a shortlist.

Slot k's logits are base + W1[x_{k-1}] W2; a token that the context suggests may be biased; the next token is drawn, and
precedes the next slot. A program takes one request's block: nothing leaves it between slots. If W2 has more than FUSED
bytes, one processor would read it too slowly: slots are then `vocabulary.py`'s.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from dspark_kernels.interface import DraftedTokens, Favour, Filters
from dspark_kernels.triton import vocabulary
from dspark_kernels.triton.draw import PART, draw_column, soften
from dspark_kernels.triton.elementwise import NO_RANK, rank, ranked_column
from dspark_kernels.triton.favour import favoured_logit
from dspark_kernels.triton.filter import floor_of
from dspark_kernels.triton.launch import Launch, power_of_two
from torch import Tensor

FUSED = 2 << 20  # bytes of W2: one processor loads some 100 GB/s, so 20 us per slot
BLOCK = 1024  # columns in a step


@triton.jit
def draft(
    base, w1, w2, anchors, names, inverse_temperature, uniforms, favoured, place, named, bias, following,
    top_k, top_p, min_p, few, scratch, tokens, law, on, odds, usable,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (R). `scratch` [R, COLUMNS] float32 holds a slot's logits, few [R, BLOCK] is `floor_of`'s; the rest as in
    `Kernels.draft_tokens`.
    """
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(inverse_temperature + row)
    logits = scratch + row * COLUMNS
    previous = tl.load(anchors + row)
    left = SLOTS
    follows = 0
    if favoured is not None:
        follows = tl.load(following + row).to(tl.int32)
    for slot in range(SLOTS):
        at = row * SLOTS + slot
        if w1 is not None:
            depth = tl.arange(0, RANK_BLOCK)
            latent = tl.load(w1 + previous * RANK + depth, mask=depth < RANK, other=0.0).to(tl.float32)
        peak = float("-inf")
        mass = 0.0
        broken = 0
        for start in range(0, COLUMNS, TILE):
            column = start + tl.arange(0, TILE)
            inside = column < COLUMNS
            logit = tl.load(base + at * COLUMNS + column, mask=inside, other=float("-inf"))
            if w1 is not None:
                weight = tl.load(
                    w2 + column[:, None] * RANK + depth[None, :],
                    mask=inside[:, None] & (depth < RANK)[None, :],
                    other=0.0,
                )
                logit += tl.sum(weight.to(tl.float32) * latent[None, :], 1)
            tl.store(logits + column, logit, mask=inside)
            broken = tl.maximum(broken, tl.max(tl.where(logit < float("inf"), 0, 1), 0))
            peak, mass = soften(peak, mass, logit)
        tl.debug_barrier()  # other threads read these logits
        fine = (broken == 0) & (peak > float("-inf"))

        spot = -1
        score = 0.0
        if favoured is not None:
            spot = tl.load(place + at).to(tl.int32)
            active = fine & (follows != 0)
            total = tl.log(mass) + peak
            score = favoured_logit(
                tl.load(logits + spot), total, active, named + at, bias + at, on + at, odds + at, True
            )

        floor = float("-inf")
        if top_k is not None:
            if fine & (scale > 0.0):
                k = tl.load(top_k + row)
                p = tl.load(top_p + row)
                least = tl.load(min_p + row)
                floor = floor_of(logits, None, spot, score, scale, few + row * BLOCK, k, p, least, COLUMNS, BLOCK)

        best = tl.full([], NO_RANK, tl.int64)
        peak = float("-inf")
        mass = 0.0
        for start in range(0, COLUMNS, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < COLUMNS
            logit = tl.load(logits + column, mask=inside, other=float("-inf"))
            if favoured is not None:
                logit = tl.where(column == spot, score, logit)
            best = tl.maximum(best, tl.max(tl.where(inside, rank(logit, column), NO_RANK), 0))
            kept = fine & inside & (logit * scale >= floor)
            peak, mass = soften(peak, mass, tl.where(kept, logit * scale, float("-inf")))
        choice = tl.where(fine, ranked_column(best).to(tl.int32), 0)

        if law is not None:
            sampled = fine & (scale > 0.0)
            sum64 = tl.zeros([], tl.float64)
            for start in range(0, COLUMNS, BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = column < COLUMNS
                logit = tl.load(logits + column, mask=inside, other=float("-inf"))
                if favoured is not None:
                    logit = tl.where(column == spot, score, logit)
                kept = sampled & inside & (logit * scale >= floor)
                chance = tl.where(kept, tl.exp(logit * scale - peak) / mass, 0.0)
                tl.store(law + at * COLUMNS + column, chance, mask=inside)
                sum64 += tl.sum(chance.to(tl.float64), 0)
            tl.debug_barrier()  # other threads read this distribution
            if sampled:
                point = tl.load(uniforms + at) * sum64
                choice = draw_column(law + at * COLUMNS, 0, COLUMNS, 0.0 * sum64, point, BLOCK)

        token = choice.to(tl.int64)
        if names is not None:
            token = tl.load(names + choice)
        if favoured is not None:
            copied = tl.load(favoured + at)
            token = tl.where(fine & (choice == spot) & (tl.load(named + at) == 0), copied, token)
            follows = tl.where(fine & (token == copied), follows, 0)
        left = tl.where(fine, left, tl.minimum(left, slot))
        tl.store(tokens + at, token)
        previous = token
        tl.debug_barrier()  # the next slot overwrites the logits
    tl.store(usable + row, left.to(tl.int64))


def launches(
    base: Tensor,
    anchors: Tensor,
    names: Tensor | None,
    head: tuple[Tensor, Tensor] | None,
    multiply: Callable[[Tensor], Tensor],
    inverse_temperature: Tensor,
    uniforms: Tensor | None,
    favour: Favour | None,
    filters: Filters | None,
    drawn: DraftedTokens,
) -> Iterator[Launch]:
    """The launches of `Kernels.draft_tokens` into `drawn`, whose `usable` is still all slots.

    head: W1 [V, r] and W2 [C, r]; `multiply` takes rows of W1 [R, r] to W2's products [R, C] float32.
    """
    rows, slots, columns = base.shape
    suggested = dict(
        favoured=favour and favour.tokens, place=favour and favour.place,
        named=favour and favour.named.view(torch.uint8), bias=favour and favour.bias,
        following=favour and favour.following.to(torch.int8),
    )  # fmt: skip
    if uniforms is None:  # greedy rows need no filter
        filters = None
    bounds = dict(top_k=filters and filters.top_k, top_p=filters and filters.top_p, min_p=filters and filters.min_p)
    given = dict(
        base=base, names=names, inverse_temperature=inverse_temperature, uniforms=uniforms, **suggested, **bounds
    )
    found = dict(
        tokens=drawn.tokens, law=drawn.law, on=drawn.on.view(torch.uint8), odds=drawn.odds, usable=drawn.usable
    )
    w1, w2 = (None, None) if head is None else head
    if columns > PART or (w2 is not None and w2.nbytes > FUSED):
        for slot in range(slots):
            before = drawn.tokens[:, slot - 1] if slot else anchors
            correction = None if w1 is None else multiply(w1[before])
            yield from vocabulary.launches(slot, correction, given, found)
        return
    rank_size = 0 if w2 is None else w2.shape[1]
    block = min(power_of_two(columns), BLOCK)
    yield Launch(
        draft,
        (rows,),
        dict(
            **given, **found, w1=w1, w2=w2, anchors=anchors, scratch=base.new_empty(rows, columns),
            few=filters and base.new_empty(rows, block),
        ),
        8,
        constants=dict(
            SLOTS=slots, COLUMNS=columns, RANK=rank_size, RANK_BLOCK=max(power_of_two(rank_size), 1),
            TILE=min(block, max(16384 // power_of_two(rank_size), 16)) if rank_size else block, BLOCK=block,
        ),
    )  # fmt: skip
