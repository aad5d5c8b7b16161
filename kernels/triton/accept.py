"""Lossless acceptance by the ratio rule (DSpark §3.2.2) or the block rule (arXiv 2403.10444), for plain softmaxes.

Ratio takes four launches. The first two read every row of logits once, as fast as memory allows, and walk each
request's slots: a draft token is accepted with probability min(1, p / q). Only the row that decides is read again: the
third launch takes the residual max(p - q, 0), or p itself after the last draft token, and the fourth draws from that.

Block judges every node, so three launches stand in the second's place: each node's P, what q takes of P p (which reads
the rows again), and the last node whose coin falls below its bound. The residual is then max(P p - q, 0).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from dspark_kernels.triton.draw import PART, draw_column, draw_part, merge, soften
from dspark_kernels.triton.launch import Launch, power_of_two
from torch import Tensor

BLOCK = 2048  # columns of the vocabulary in a step
NAMES = 1024  # columns of a draft distribution in a step


@triton.jit(do_not_specialize=["width"])
def row_parts(
    logits, start, lengths, inverse_temperature, peaks, masses, width,
    VOCABULARY: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (n, width + 1, PARTS): peaks and masses [n, width + 1, PARTS] of the rows' softmaxes, part by part.

    A NaN peak is a part that holds NaN or +inf.
    """
    request = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1)
    part = tl.program_id(2)
    if slot > tl.load(lengths + request):
        return
    row = logits + (tl.load(start + request) + slot) * VOCABULARY
    scale = tl.load(inverse_temperature + request)
    peak = float("-inf")
    mass = 0.0
    broken = 0
    for first in range(part * PART, tl.minimum(part * PART + PART, VOCABULARY), BLOCK):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(row + column, mask=column < VOCABULARY, other=float("-inf"))
        broken = tl.maximum(broken, tl.max(tl.where(logit < float("inf"), 0, 1), 0))
        peak, mass = soften(peak, mass, logit * scale)
    at = (request * (width + 1) + slot) * PARTS + part
    tl.store(peaks + at, tl.where(broken == 0, peak, float("nan")))
    tl.store(masses + at, mass)


@triton.jit
def _chance(q, names, token, COLUMNS: tl.constexpr, NAMES: tl.constexpr):
    """The probability of `token` in a draft distribution q [COLUMNS]; several columns may name it."""
    if names is None:
        chance = tl.load(q + token)
    else:
        chance = 0.0
        for first in range(0, COLUMNS, NAMES):
            column = first + tl.arange(0, NAMES)
            inside = column < COLUMNS
            same = tl.load(names + column, mask=inside, other=-1) == token
            chance += tl.sum(tl.where(same, tl.load(q + column, mask=inside, other=0.0), 0.0), 0)
    return chance


@triton.jit(do_not_specialize=["width", "coins_stride", "names_row_stride", "names_slot_stride"])
def decide(
    logits, start, lengths, tokens, inverse_temperature, q, row, names, coins, peaks, masses, count, token, failed,
    levels, totals, width, coins_stride, names_row_stride, names_slot_stride,
    VOCABULARY: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr, NAMES: tl.constexpr,
):  # fmt: skip
    """Grid (n): count and failed, and the deciding row's softmax: its maximum and sum in levels, totals [n].

    A level of NaN: that row is broken, and there is nothing left to draw; `token` has been stored.
    """
    request = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + request).to(tl.int32)
    first_row = tl.load(start + request)
    scale = tl.load(inverse_temperature + request)
    law_row = tl.load(row + request)
    part = tl.arange(0, PARTS_BLOCK)
    slot = 0
    standing = 1
    fine = 1
    level = 0.0
    total = 0.0
    while standing == 1:
        at = (request * (width + 1) + slot) * PARTS + part
        part_peaks = tl.load(peaks + at, mask=part < PARTS, other=float("-inf"))
        level, total = merge(part_peaks, tl.load(masses + at, mask=part < PARTS, other=0.0))
        fine = tl.where(level > float("-inf"), 1, 0) * (1 - tl.max(tl.where(part_peaks == part_peaks, 0, 1), 0))
        standing = tl.where(slot < length, fine, 0)
        if standing == 1:
            drafted = tl.load(tokens + request * width + slot)
            logit = tl.load(logits + (first_row + slot) * VOCABULARY + drafted)
            weight = tl.exp(logit * scale - level)
            chance = tl.full([], 1.0, tl.float32)
            if q is not None:
                law = q + (law_row * SLOTS + slot) * COLUMNS
                if names is None:
                    chance = _chance(law, None, drafted, COLUMNS, NAMES)
                else:
                    name = names + law_row * names_row_stride + slot * names_slot_stride
                    chance = _chance(law, name, drafted, COLUMNS, NAMES)
            # coin q < p, not coin < p / q: right at q = 0, and a coin of 0 lets no token of probability 0 through.
            coin = tl.load(coins + request * coins_stride + slot)
            kept = coin * chance.to(tl.float64) * total.to(tl.float64) < weight.to(tl.float64)
            standing = tl.where(kept, 1, 0)
            slot += standing
    ended = tl.where(slot > 0, 1 - fine, 0)  # by an accepted draft token whose own row is broken
    last = tl.full([], -1, tl.int64)
    if ended == 1:
        last = tl.load(tokens + request * width + slot - 1)
    tl.store(levels + request, tl.where(fine == 1, level, float("nan")))
    tl.store(totals + request, total)
    tl.store(count + request, slot - ended)
    tl.store(token + request, last)
    tl.store(failed + request, 1 - fine - ended)


@triton.jit(do_not_specialize=["width", "names_row_stride", "names_slot_stride"])
def joints(
    logits, start, lengths, tokens, inverse_temperature, q, row, names, peaks, masses, joint, ends, node_levels,
    node_totals, width, names_row_stride, names_slot_stride,
    VOCABULARY: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr, NAMES: tl.constexpr,
):  # fmt: skip
    """Grid (n): of each node P in joint [n, width + 1] float64, and its row's maximum and sum, NaN if it is broken.

    ends [n]: the last node, of length draft tokens or with a broken row.
    """
    request = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + request).to(tl.int32)
    first_row = tl.load(start + request)
    scale = tl.load(inverse_temperature + request)
    law_row = tl.load(row + request)
    part = tl.arange(0, PARTS_BLOCK)
    share = tl.full([], 1.0, tl.float64)
    slot = 0
    going = 1
    while going == 1:
        node = request * (width + 1) + slot
        part_peaks = tl.load(peaks + node * PARTS + part, mask=part < PARTS, other=float("-inf"))
        part_masses = tl.load(masses + node * PARTS + part, mask=part < PARTS, other=0.0)
        level, total = merge(part_peaks, part_masses)
        fine = tl.where(level > float("-inf"), 1, 0) * (1 - tl.max(tl.where(part_peaks == part_peaks, 0, 1), 0))
        tl.store(joint + node, share)
        tl.store(node_levels + node, tl.where(fine == 1, level, float("nan")))
        tl.store(node_totals + node, total)
        going = tl.where(slot < length, fine, 0)
        if going == 1:
            drafted = tl.load(tokens + request * width + slot)
            logit = tl.load(logits + (first_row + slot) * VOCABULARY + drafted)
            weight = tl.exp(logit * scale - level)
            chance = tl.full([], 1.0, tl.float32)
            if q is not None:
                law = q + (law_row * SLOTS + slot) * COLUMNS
                if names is None:
                    chance = _chance(law, None, drafted, COLUMNS, NAMES)
                else:
                    name = names + law_row * names_row_stride + slot * names_slot_stride
                    chance = _chance(law, name, drafted, COLUMNS, NAMES)
            # At most 1: so a q of 0, which drew this token all the same, counts as p.
            most = chance.to(tl.float64) * total.to(tl.float64)
            mine = share * weight.to(tl.float64)
            share = tl.where(mine < most, mine / most, 1.0)
            slot += 1
    tl.store(ends + request, slot)


@triton.jit(do_not_specialize=["width", "names_row_stride", "names_slot_stride"])
def overlaps(
    logits, start, tokens, inverse_temperature, q, row, names, joint, ends, node_levels, node_totals, taken, width,
    names_row_stride, names_slot_stride,
    VOCABULARY: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (n, width, PARTS): parts of sum_v min(P p(v), q(v)) of each node but the last, in taken [n, width, PARTS].

    Parts are of q's columns; of two with one name, one has no mass. The first node is not judged.
    """
    request = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1)
    part = tl.program_id(2)
    if (slot == 0) | (slot >= tl.load(ends + request)):
        return
    node = request * (width + 1) + slot
    level = tl.load(node_levels + node)
    share = (tl.load(joint + node) / tl.load(node_totals + node).to(tl.float64)).to(tl.float32)
    scale = tl.load(inverse_temperature + request)
    mine = logits + (tl.load(start + request) + slot) * VOCABULARY
    total = tl.zeros([], tl.float64)
    if q is None:
        if part == 0:
            logit = tl.load(mine + tl.load(tokens + request * width + slot))
            total += (tl.exp(logit * scale - level) * share).to(tl.float64)
    else:
        law_row = tl.load(row + request)
        law = q + (law_row * SLOTS + slot) * COLUMNS
        for first in range(part * PART, tl.minimum(part * PART + PART, COLUMNS), BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < COLUMNS
            where = column.to(tl.int64)
            if names is not None:
                name = names + law_row * names_row_stride + slot * names_slot_stride
                where = tl.load(name + column, mask=inside, other=0)
            logit = tl.load(mine + where, mask=inside, other=float("-inf"))
            theirs = tl.load(law + column, mask=inside, other=0.0)
            total += tl.sum(tl.minimum(tl.exp(logit * scale - level) * share, theirs).to(tl.float64), 0)
    tl.store(taken + (request * width + slot) * PARTS + part, total)


@triton.jit(do_not_specialize=["width", "coins_stride"])
def choose(
    tokens, coins, joint, ends, node_levels, node_totals, taken, count, token, failed, levels, totals, shares, width,
    coins_stride, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (n): count, failed, levels, totals as `decide`, by the last node that is accepted; its P in shares [n]."""
    request = tl.program_id(0).to(tl.int64)
    end = tl.load(ends + request).to(tl.int32)
    part = tl.arange(0, PARTS_BLOCK)
    kept = 0
    for slot in range(1, end + 1):
        share = tl.load(joint + request * (width + 1) + slot)
        bound = share
        if slot < end:
            at = (request * width + slot) * PARTS + part
            left = tl.maximum(share - tl.sum(tl.load(taken + at, mask=part < PARTS, other=0.0), 0), 0.0)
            rest = left + 1.0 - share
            bound = tl.where(rest > 0.0, left / rest, 1.0)
        kept = tl.where(tl.load(coins + request * coins_stride + slot - 1) < bound, slot, kept)
    node = request * (width + 1) + kept
    level = tl.load(node_levels + node)
    broken = tl.where(level == level, 0, 1)
    ended = tl.where(kept > 0, broken, 0)
    last = tl.full([], -1, tl.int64)
    if ended == 1:
        last = tl.load(tokens + request * width + kept - 1)
    tl.store(levels + request, level)
    tl.store(totals + request, tl.load(node_totals + node))
    tl.store(shares + request, tl.load(joint + node).to(tl.float32))
    tl.store(count + request, kept - ended)
    tl.store(token + request, last)
    tl.store(failed + request, broken - ended)


@triton.jit(do_not_specialize=["width", "names_row_stride", "names_slot_stride"])
def remainder(
    logits, start, lengths, tokens, inverse_temperature, q, row, names, count, levels, totals, shares, left, left_mass,
    whole_mass, width, names_row_stride, names_slot_stride,
    VOCABULARY: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    BLOCK: tl.constexpr, NAMES: tl.constexpr,
):  # fmt: skip
    """Grid (n, PARTS): left [n, VOCABULARY] float32, p - q of a request's rejected slot or the p after its last one.

    Of p the share in shares [n] (None: all) counts. left_mass and whole_mass [n, PARTS] float64 are the positive mass
    of each part of it, and of p.
    """
    request = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    begin = part * PART
    end = tl.minimum(begin + PART, VOCABULARY)
    level = tl.load(levels + request)
    if level != level:
        return
    slot = tl.load(count + request)
    scale = tl.load(inverse_temperature + request)
    total = tl.load(totals + request)
    deciding = logits + (tl.load(start + request) + slot) * VOCABULARY
    mine = left + request * VOCABULARY
    law = tl.load(row + request) * SLOTS + slot
    rejected = slot < tl.load(lengths + request)
    drafted = tl.full([], -1, tl.int64)
    if rejected:
        drafted = tl.load(tokens + request * width + slot)
    takeable = tl.where(rejected, end, 0)  # columns that q is subtracted from

    share = tl.full([], 1.0, tl.float32)
    if shares is not None:
        share = tl.where(rejected, tl.load(shares + request), 1.0)

    whole_sum = tl.zeros([], tl.float64)
    left_sum = tl.zeros([], tl.float64)
    for first in range(begin, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(deciding + column, mask=column < end, other=float("-inf"))
        rest = tl.exp(logit * scale - level) / total
        whole_sum += tl.sum(rest.to(tl.float64), 0)
        rest *= share
        if q is None:
            rest = tl.where(column == drafted, 0.0, rest)
        elif names is None:
            rest -= tl.load(q + law * COLUMNS + column, mask=column < takeable, other=0.0)
        left_sum += tl.sum(tl.maximum(rest, 0.0).to(tl.float64), 0)
        tl.store(mine + column, rest, mask=column < end)
    if q is not None and names is not None:
        if rejected:
            name = names + tl.load(row + request) * names_row_stride + slot * names_slot_stride
            tl.debug_barrier()  # other threads subtract from the values stored here
            for first in range(0, COLUMNS, NAMES):
                column = first + tl.arange(0, NAMES)
                inside = column < COLUMNS
                where = tl.load(name + column, mask=inside, other=-1)
                taken = tl.load(q + law * COLUMNS + column, mask=inside, other=0.0)
                # Two columns may have the same name.
                tl.atomic_add(mine + where, -taken, mask=inside & (where >= begin) & (where < end), sem="relaxed")
            tl.debug_barrier()
            left_sum = tl.zeros([], tl.float64)
            for first in range(begin, end, BLOCK):
                column = first + tl.arange(0, BLOCK)
                rest = tl.load(mine + column, mask=column < end, other=0.0)
                left_sum += tl.sum(tl.maximum(rest, 0.0).to(tl.float64), 0)
    tl.store(whole_mass + request * PARTS + part, whole_sum)
    tl.store(left_mass + request * PARTS + part, left_sum)


@triton.jit(do_not_specialize=["width"])
def pick(
    logits, start, inverse_temperature, last, count, levels, totals, left, left_mass, whole_mass, token, width,
    VOCABULARY: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (n): the token drawn from `left`, or from p where nothing is left (p equals q, up to rounding)."""
    request = tl.program_id(0).to(tl.int64)
    level = tl.load(levels + request)
    if level != level:
        return
    slot = tl.load(count + request)
    part = tl.arange(0, PARTS_BLOCK)
    mass = tl.load(left_mass + request * PARTS + part, mask=part < PARTS, other=0.0)
    empty = tl.sum(mass, 0) <= 0.0
    if empty:
        mass = tl.load(whole_mass + request * PARTS + part, mask=part < PARTS, other=0.0)
    chosen, before, point = draw_part(part, mass, tl.load(last + request * (width + 1) + slot))
    begin = chosen * PART
    end = tl.minimum(begin + PART, VOCABULARY)
    mine = left + request * VOCABULARY
    if empty:
        deciding = logits + (tl.load(start + request) + slot) * VOCABULARY
        scale = tl.load(inverse_temperature + request)
        for first in range(begin, end, BLOCK):
            column = first + tl.arange(0, BLOCK)
            logit = tl.load(deciding + column, mask=column < end, other=float("-inf"))
            whole = tl.exp(logit * scale - level) / tl.load(totals + request)
            tl.store(mine + column, whole, mask=column < end)
        tl.debug_barrier()
    tl.store(token + request, draw_column(mine, begin, end, before, point, BLOCK).to(tl.int64))


def launches(
    logits: Tensor,
    start: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    inverse_temperature: Tensor,
    q: Tensor | None,
    row: Tensor,
    names: Tensor | None,
    coins: Tensor | None,
    last: Tensor,
    count: Tensor,
    token: Tensor,
    failed: Tensor,
    jointly: bool,
) -> Iterator[Launch]:
    """The launches of `Kernels.accept_drafts`, which fill count and token [n] int64 and failed [n] bool."""
    (requests, width), vocabulary, device = tokens.shape, logits.shape[1], logits.device
    slots, columns = (0, 0) if q is None else q.shape[1:]
    part = min(power_of_two(vocabulary), PART)
    parts = -(-vocabulary // part)
    peaks, masses = torch.empty(2, requests, width + 1, parts, dtype=torch.float32, device=device)
    levels, totals = torch.empty(2, requests, dtype=torch.float32, device=device)
    left = torch.empty(requests, vocabulary, dtype=torch.float32, device=device)
    left_mass, whole_mass = torch.empty(2, requests, parts, dtype=torch.float64, device=device)
    rows = dict(logits=logits, start=start, inverse_temperature=inverse_temperature)
    drafts = dict(tokens=tokens, lengths=lengths, q=q, row=row, names=names)
    outcome = dict(count=count, levels=levels, totals=totals)
    strides = dict(
        names_row_stride=0 if names is None else names.stride(0),
        names_slot_stride=0 if names is None else names.stride(1),
    )
    law = dict(SLOTS=slots, COLUMNS=columns, NAMES=min(power_of_two(columns), NAMES))
    cut = dict(VOCABULARY=vocabulary, PARTS=parts)
    steps = dict(PART=part, BLOCK=min(part, BLOCK))
    yield Launch(
        row_parts,
        (requests, width + 1, parts),
        dict(**rows, lengths=lengths, peaks=peaks, masses=masses, width=width),
        constants=dict(**cut, **steps),
    )
    flips = dict(coins=last if coins is None else coins, coins_stride=0 if coins is None else coins.stride(0))
    result = dict(token=token, failed=failed.view(torch.uint8))
    shares = None
    if jointly:
        shares, ends = torch.empty(requests, dtype=torch.float32, device=device), torch.empty_like(lengths)
        joint = torch.empty(requests, width + 1, dtype=torch.float64, device=device)
        node_levels, node_totals = torch.empty(2, requests, width + 1, dtype=torch.float32, device=device)
        pieces = max(1, -(-columns // part))
        taken = torch.empty(requests, width, pieces, dtype=torch.float64, device=device)
        nodes = dict(joint=joint, ends=ends, node_levels=node_levels, node_totals=node_totals, width=width)
        yield Launch(
            joints,
            (requests,),
            dict(**rows, **drafts, **strides, **nodes, peaks=peaks, masses=masses),
            constants=dict(**cut, **law, PARTS_BLOCK=power_of_two(parts)),
        )
        yield Launch(
            overlaps,
            (requests, width, pieces),
            dict(**rows, **strides, **nodes, tokens=tokens, q=q, row=row, names=names, taken=taken),
            constants=dict(VOCABULARY=vocabulary, PARTS=pieces, SLOTS=slots, COLUMNS=columns, **steps),
        )
        yield Launch(
            choose,
            (requests,),
            dict(**outcome, **result, **flips, **nodes, tokens=tokens, taken=taken, shares=shares),
            constants=dict(PARTS=pieces, PARTS_BLOCK=power_of_two(pieces)),
        )
        drafts["lengths"] = ends
    else:
        yield Launch(
            decide,
            (requests,),
            dict(**rows, **drafts, **outcome, **result, **flips, **strides, peaks=peaks, masses=masses, width=width),
            constants=dict(**cut, **law, PARTS_BLOCK=power_of_two(parts)),
        )
    yield Launch(
        remainder,
        (requests, parts),
        dict(
            **rows,
            **drafts,
            **outcome,
            **strides,
            shares=shares,
            left=left,
            left_mass=left_mass,
            whole_mass=whole_mass,
            width=width,
        ),
        constants=dict(**cut, **law, **steps),
    )
    yield Launch(
        pick,
        (requests,),
        dict(
            **rows, **outcome, last=last, left=left, left_mass=left_mass, whole_mass=whole_mass, token=token,
            width=width,
        ),
        constants=dict(**cut, **steps, PARTS_BLOCK=power_of_two(parts)),
    )  # fmt: skip
