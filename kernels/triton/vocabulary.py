"""A slot of the sequential head over a whole vocabulary: three launches after the matrix product of its correction.

Each row is split into parts, a program for each: the first launch leaves their softmaxes, the second writes the
distribution and its mass part by part, the third draws. The biased column is left out of the first and included in the
others, as its logit is not known before the row's log-sum-exp. With filters there is one launch more, for the row's
floor.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from dspark_kernels.triton import filter
from dspark_kernels.triton.draw import PART, draw_column, draw_part, merge, soften
from dspark_kernels.triton.elementwise import NO_RANK, rank, ranked_column
from dspark_kernels.triton.favour import favoured_logit
from dspark_kernels.triton.filter import floor_of
from dspark_kernels.triton.launch import Launch, power_of_two
from torch import Tensor

BLOCK = 2048  # columns in a step


@triton.jit
def _logits(base, correction, column, end):
    """A slot's logits [BLOCK] from base and correction [COLUMNS]; -inf from `end` on."""
    logit = tl.load(base + column, mask=column < end, other=float("-inf"))
    if correction is not None:
        logit += tl.load(correction + column, mask=column < end, other=0.0)
    return logit


@triton.jit(do_not_specialize=["slot"])
def slot_parts(
    base, correction, inverse_temperature, place, peaks, masses, scaled_masses, ranks, slot,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (R, PARTS): peaks, masses, scaled_masses (of logits / T), ranks [R, PARTS], without the column at `place`.

    A NaN peak is a part that holds NaN or +inf.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = row * SLOTS + slot
    scale = tl.load(inverse_temperature + row)
    if correction is not None:
        correction += row * COLUMNS
    spot = -1
    if place is not None:
        spot = tl.load(place + at).to(tl.int32)
    peak = float("-inf")
    mass = 0.0
    scaled_peak = float("-inf")
    scaled_mass = 0.0
    best = tl.full([], NO_RANK, tl.int64)
    broken = 0
    end = tl.minimum(part * PART + PART, COLUMNS)
    for start in range(part * PART, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = _logits(base + at * COLUMNS, correction, column, end)
        logit = tl.where(column == spot, float("-inf"), logit)
        broken = tl.maximum(broken, tl.max(tl.where(logit < float("inf"), 0, 1), 0))
        best = tl.maximum(best, tl.max(tl.where(column < end, rank(logit, column), NO_RANK), 0))
        if place is not None:
            peak, mass = soften(peak, mass, logit)
        else:
            peak = tl.maximum(peak, tl.max(logit, 0))
        scaled_peak, scaled_mass = soften(
            scaled_peak, scaled_mass, tl.where(logit > float("-inf"), logit * scale, float("-inf"))
        )
    to = row * PARTS + part
    tl.store(peaks + to, tl.where(broken == 0, peak, float("nan")))
    tl.store(masses + to, mass)
    tl.store(scaled_masses + to, scaled_mass)
    tl.store(ranks + to, best)


@triton.jit
def _whole(
    base, correction, place, named, bias, following, on, odds, peaks, masses, row, at,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """The row from its parts: the greatest logit but the biased one's, whether all are finite, and the biased column
    and its logit (-1 and -inf without any).
    """
    part = tl.arange(0, PARTS_BLOCK)
    part_peaks = tl.load(peaks + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    peak, mass = merge(part_peaks, tl.load(masses + row * PARTS + part, mask=part < PARTS, other=0.0))
    broken = tl.max(tl.where(part_peaks == part_peaks, 0, 1), 0)
    spot = -1
    score = float("-inf")
    top = peak
    if place is not None:
        spot = tl.load(place + at).to(tl.int32)
        own = tl.load(base + at * COLUMNS + spot)
        if correction is not None:
            own += tl.load(correction + row * COLUMNS + spot)
        broken = tl.maximum(broken, tl.where(own < float("inf"), 0, 1))
        top = tl.maximum(peak, own)
        level = tl.where(top == float("-inf"), 0.0, top)
        total = tl.log(mass * tl.exp(peak - level) + tl.exp(own - level)) + level
        active = (broken == 0) & (top > float("-inf")) & (tl.load(following + row) != 0)
        score = favoured_logit(own, total, active, named + at, bias + at, on + at, odds + at, STORE)
    return peak, (broken == 0) & (top > float("-inf")), spot, score


@triton.jit
def _total(peaks, scaled_masses, row, scale, score, top, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr):
    """The sum of exp(logit * scale - top) over the row, the biased column with its `score` included."""
    every = tl.arange(0, PARTS_BLOCK)
    part_peaks = tl.load(peaks + row * PARTS + every, mask=every < PARTS, other=float("-inf"))
    part_masses = tl.load(scaled_masses + row * PARTS + every, mask=every < PARTS, other=0.0)
    total = tl.sum(tl.where(part_masses > 0.0, part_masses * tl.exp(part_peaks * scale - top), 0.0), 0)
    return total + tl.where(score > float("-inf"), tl.exp(score * scale - top), 0.0)


@triton.jit(do_not_specialize=["slot"])
def slot_floor(
    base, correction, inverse_temperature, place, named, bias, following, on, odds, peaks, masses, scaled_masses,
    few, top_k, top_p, min_p, floors, totals, slot,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (R): the least of a sampled row's logits / T that its filters leave, and the sum of exp(logit / T - peak)
    over the logits left: floors, totals [R] float32. few [R, BLOCK] is scratch.
    """
    row = tl.program_id(0).to(tl.int64)
    at = row * SLOTS + slot
    scale = tl.load(inverse_temperature + row)
    peak, fine, spot, score = _whole(
        base, correction, place, named, bias, following, on, odds, peaks, masses, row, at, COLUMNS, PARTS, PARTS_BLOCK,
        False,
    )  # fmt: skip
    if fine & (scale > 0.0):
        logits = base + at * COLUMNS
        if correction is not None:
            correction += row * COLUMNS
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        floor = floor_of(
            logits, correction, spot, score, scale, few + row * BLOCK, k, p, tl.load(min_p + row), COLUMNS, BLOCK
        )
        top = tl.maximum(peak, score) * scale
        total = _total(peaks, scaled_masses, row, scale, score, top, PARTS, PARTS_BLOCK)
        if floor > float("-inf"):
            total = 0.0
            for start in range(0, COLUMNS, BLOCK):
                column = start + tl.arange(0, BLOCK)
                logit = tl.where(column == spot, score, _logits(logits, correction, column, COLUMNS))
                total += tl.sum(tl.where(logit * scale >= floor, tl.exp(logit * scale - top), 0.0), 0)
        tl.store(floors + row, floor)
        tl.store(totals + row, total)


@triton.jit(do_not_specialize=["slot"])
def slot_law(
    base, correction, inverse_temperature, place, named, bias, following, on, odds, law, peaks, masses, scaled_masses,
    law_masses, floors, totals, slot,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, PART: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (R, PARTS): the slot's distribution, zero for a greedy row, and law_masses [R, PARTS] float64."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = row * SLOTS + slot
    scale = tl.load(inverse_temperature + row)
    peak, fine, spot, score = _whole(
        base, correction, place, named, bias, following, on, odds, peaks, masses, row, at, COLUMNS, PARTS, PARTS_BLOCK,
        False,
    )  # fmt: skip
    sampled = fine & (scale > 0.0)
    top = tl.maximum(peak, score) * scale
    floor = float("-inf")
    if floors is not None:
        floor = tl.load(floors + row)
        total = tl.load(totals + row)
    else:
        total = _total(peaks, scaled_masses, row, scale, score, top, PARTS, PARTS_BLOCK)
    if correction is not None:
        correction += row * COLUMNS
    end = tl.minimum(part * PART + PART, COLUMNS)
    mass = tl.zeros([], tl.float64)
    for start in range(part * PART, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = _logits(base + at * COLUMNS, correction, column, end)
        logit = tl.where(column == spot, score, logit)
        kept = sampled & (column < end) & (logit * scale >= floor)
        chance = tl.where(kept, tl.exp(logit * scale - top) / total, 0.0)
        tl.store(law + at * COLUMNS + column, chance, mask=column < end)
        mass += tl.sum(chance.to(tl.float64), 0)
    tl.store(law_masses + row * PARTS + part, mass)


@triton.jit(do_not_specialize=["slot"])
def slot_pick(
    base, correction, names, inverse_temperature, uniforms, favoured, place, named, bias, following, tokens, law, on,
    odds, usable, peaks, masses, ranks, law_masses, slot,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, PART: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (R): the slot's token; updates `usable` and `following` for the next slot."""
    row = tl.program_id(0).to(tl.int64)
    at = row * SLOTS + slot
    _, fine, spot, score = _whole(
        base, correction, place, named, bias, following, on, odds, peaks, masses, row, at, COLUMNS, PARTS, PARTS_BLOCK,
        True,
    )  # fmt: skip
    part = tl.arange(0, PARTS_BLOCK)
    best = tl.max(tl.load(ranks + row * PARTS + part, mask=part < PARTS, other=NO_RANK), 0)
    if place is not None:
        best = tl.maximum(best, rank(score, spot))
    choice = tl.where(fine, ranked_column(best).to(tl.int32), 0)
    if law is not None:
        if fine & (tl.load(inverse_temperature + row) > 0.0):
            mass = tl.load(law_masses + row * PARTS + part, mask=part < PARTS, other=0.0)
            chosen, before, point = draw_part(part, mass, tl.load(uniforms + at))
            end = tl.minimum(chosen * PART + PART, COLUMNS)
            choice = draw_column(law + at * COLUMNS, chosen * PART, end, before, point, BLOCK)
    token = choice.to(tl.int64)
    if names is not None:
        token = tl.load(names + choice)
    if favoured is not None:
        copied = tl.load(favoured + at)
        token = tl.where(fine & (choice == spot) & (tl.load(named + at) == 0), copied, token)
        follows = tl.load(following + row).to(tl.int32)
        tl.store(following + row, tl.where(fine & (token == copied), follows, 0).to(tl.int8))
    left = tl.load(usable + row)
    tl.store(usable + row, tl.where(fine, left, tl.minimum(left, slot)))
    tl.store(tokens + at, token)


def launches(
    slot: int, correction: Tensor | None, given: Mapping[str, Any], found: Mapping[str, Any]
) -> Iterator[Launch]:
    """One slot, with logits base + `correction` [R, C] float32; `given` and `found` from `sequential.launches`."""
    base: Tensor = given["base"]
    rows, slots, columns = base.shape
    part = min(power_of_two(columns), PART)
    parts = -(-columns // part)
    peaks, masses, scaled_masses = base.new_empty(3, rows, parts)
    ranks = base.new_empty(rows, parts, dtype=torch.int64)
    law_masses = base.new_empty(rows, parts, dtype=torch.float64)
    block = min(power_of_two(columns), filter.BLOCK)
    few = floors = totals = None
    if given["top_k"] is not None:
        few = base.new_empty(rows, block)
        floors, totals = base.new_empty(2, rows)
    arguments = dict(
        **given, **found, correction=correction, peaks=peaks, masses=masses, scaled_masses=scaled_masses, ranks=ranks,
        law_masses=law_masses, few=few, floors=floors, totals=totals, slot=slot,
    )  # fmt: skip
    constants = dict(SLOTS=slots, COLUMNS=columns, PARTS=parts, PART=part, BLOCK=min(part, BLOCK))

    def launch(kernel: Any, grid: tuple[int, ...], warps: int = 4, **more: int) -> Launch:
        wanted, cut = (
            {name: value for name, value in each.items() if name in kernel.arg_names}
            for each in (arguments, constants | more)
        )
        return Launch(kernel, grid, wanted, warps, constants=cut)

    yield launch(slot_parts, (rows, parts))
    if floors is not None:
        yield launch(slot_floor, (rows,), filter.WARPS, PARTS_BLOCK=power_of_two(parts), BLOCK=block)
    if found["law"] is not None:
        yield launch(slot_law, (rows, parts), PARTS_BLOCK=power_of_two(parts))
    yield launch(slot_pick, (rows,), PARTS_BLOCK=power_of_two(parts))
