"""Whole blocks in one native call, against the plain loop over slots."""

from typing import Any

import pytest
import torch
from dspark_kernels import DraftedTokens, Favour, Filters, Ruled, Rules, load
from torch import Tensor

NATIVE, REFERENCE = load("native"), load("reference")
ROWS, SLOTS, TOKENS, RANK = 6, 4, 300, 24


def case(columns: int, named: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(columns)
    base = torch.randn(ROWS, SLOTS, columns, generator=noise) * 2
    anchors = torch.randint(TOKENS, (ROWS,), generator=noise)
    names = torch.randperm(TOKENS, generator=noise)[:columns].sort().values if named else None
    scale = torch.tensor([0.0, 1.0, 0.0, 1 / 0.7, 1.0, 0.0])
    return base, anchors, names, scale, torch.rand(ROWS, SLOTS, generator=noise, dtype=torch.float64)


def favour_of(base: Tensor, names: Tensor | None, first: Tensor, bias: float) -> Favour:
    """Rows 1 and 2 follow from the first slot what they will draw there anyway, row 3 a token of no column."""
    columns = base.shape[2]
    tokens = torch.randint(columns, (ROWS, SLOTS), generator=torch.Generator().manual_seed(7))
    tokens = tokens if names is None else names[tokens]
    tokens[1, 0], tokens[2, 0] = first[1], first[2]
    place = tokens.clone() if names is None else torch.searchsorted(names, tokens)
    named = torch.ones(ROWS, SLOTS, dtype=torch.bool)
    if names is not None:
        absent = next(token for token in range(TOKENS) if token not in names.tolist())
        tokens[3], place[3], named[3] = absent, 5, False
    following = torch.tensor([False, True, True, True, False, True])
    return Favour(tokens, place, named, torch.full((ROWS, SLOTS), bias), following)


def run(
    kernels: object,
    markov: bool,
    parts: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor],
    favour: Favour | None,
    filters: Filters | None = None,
    ruled: Ruled | None = None,
) -> DraftedTokens:
    base, anchors, names, scale, uniforms = parts
    noise = torch.Generator().manual_seed(1)
    w1, w2 = (torch.randn(n, RANK, generator=noise).bfloat16() for n in (TOKENS, base.shape[2]))
    head = (w1, kernels.pack_linear(w2)) if markov else None  # type: ignore[attr-defined]
    drawn = kernels.draft_tokens(  # type: ignore[attr-defined]
        base, anchors, names, head, scale, uniforms, favour, filters, ruled
    )
    assert isinstance(drawn, DraftedTokens)
    return drawn


@pytest.mark.parametrize("bias", [None, 0.0, 3.0, 20.0])
@pytest.mark.parametrize("markov", [True, False])
@pytest.mark.parametrize(("columns", "named"), [(TOKENS, False), (130, True), (7, True)])
def test_blocks_are_those_of_the_plain_loop(columns: int, named: bool, markov: bool, bias: float | None) -> None:
    parts = case(columns, named)
    favour = None
    if bias is not None:
        favour = favour_of(parts[0], parts[2], run(REFERENCE, markov, parts, None).tokens[:, 0], bias)
    wanted, got = run(REFERENCE, markov, parts, favour), run(NATIVE, markov, parts, favour)
    assert torch.equal(got.tokens, wanted.tokens)
    assert torch.equal(got.on, wanted.on)
    torch.testing.assert_close(got.odds, wanted.odds, atol=1e-4, rtol=1e-4)
    assert got.usable.tolist() == [SLOTS] * ROWS
    assert got.law is not None
    assert wanted.law is not None
    sampled = parts[3] > 0
    torch.testing.assert_close(got.law[sampled], wanted.law[sampled], atol=1e-6, rtol=1e-4)
    if favour is not None:
        assert bool(got.on[1, :2].all())
        assert bool(got.on[3, 0])
        assert not bool(got.on[0].any())
        if bias == 20.0 and named:
            assert torch.equal(got.tokens[3], favour.tokens[3]), "a token of no column is drawn by its own name"


@pytest.mark.parametrize("markov", [True, False])
def test_filtered_blocks_are_those_of_the_plain_loop(markov: bool) -> None:
    parts = case(130, named=True)
    filters = Filters(
        torch.tensor([3, 5, 0, 0, 20, 0]), torch.tensor([0.5, 1.0, 1.0, 0.6, 0.8, 1.0]), torch.tensor([0.0] * 5 + [0.9])
    )
    favour = favour_of(parts[0], parts[2], run(REFERENCE, markov, parts, None).tokens[:, 0], 3.0)
    wanted, got = (run(kernels, markov, parts, favour, filters) for kernels in (REFERENCE, NATIVE))
    assert torch.equal(got.tokens, wanted.tokens)
    assert got.law is not None
    assert wanted.law is not None
    sampled = parts[3] > 0
    torch.testing.assert_close(got.law[sampled], wanted.law[sampled], atol=1e-6, rtol=1e-4)
    assert (got.law[1] > 0).sum(-1).tolist() == [5] * SLOTS
    unfiltered = run(NATIVE, markov, parts, favour)
    assert torch.equal(got.tokens[~sampled], unfiltered.tokens[~sampled]), "greedy rows have nothing to filter"


def rules_of(names: Tensor | None, drafted: Tensor) -> Ruled:
    """Rows with a rule of each kind, with all of them, with none, and one whose rules leave no token in slot 2."""
    noise = torch.Generator().manual_seed(3)
    some = torch.arange(TOKENS) if names is None else names
    seen, counts = torch.rand(TOKENS, generator=noise) < 0.4, torch.zeros(TOKENS)
    counts[seen.nonzero().flatten()[::2]] = 2.0
    bias = torch.where(seen, 0.0, 2 * torch.randn(TOKENS, generator=noise)) * (torch.arange(TOKENS) % 3 == 0)
    touched = (seen | (bias != 0)).nonzero().flatten()
    allowed = torch.rand(TOKENS, generator=noise) < 0.5
    penalties: dict[str, Any] = {
        "repetition": 1.7,
        "frequency": 0.9,
        "presence": -0.4,
        "seen": seen,
        "touched": touched,
    }
    last, often = drafted[0, -1:] if drafted.shape[1] else torch.tensor([5]), some[: len(some) // 2]
    words = torch.cat([torch.tensor([2]), last, often[:1], torch.tensor([1]), often[1:2]])
    none = torch.zeros(TOKENS, dtype=torch.bool)
    rules = [
        Rules(**penalties, words=words, tail=torch.tensor([4, 5])),
        Rules(**penalties, counts=counts, bias=bias, allowed=allowed, words=words, early=often[2:], until=22),
        None,
        Rules(bias=bias, touched=(bias != 0).nonzero().flatten(), allowed=allowed),
        Rules(early=often, until=23, seen=none, touched=torch.zeros(0, dtype=torch.int64), frequency=9.0),
        Rules(early=some, until=22),
    ]
    column = None
    if names is not None:
        column = torch.full((TOKENS,), -1, dtype=torch.int32)
        column[names] = torch.arange(len(names), dtype=torch.int32)
    position = torch.full((ROWS,), 20)
    position[5] = 22 - 2  # its first two slots are ruled out
    return Ruled(rules, position, drafted, column)


@pytest.mark.parametrize("bias", [None, 3.0, 20.0])
@pytest.mark.parametrize("earlier", [0, 2])
@pytest.mark.parametrize(("columns", "named"), [(TOKENS, False), (130, True), (7, True)])
def test_blocks_under_rules_are_those_of_the_plain_loop(
    columns: int, named: bool, earlier: int, bias: float | None
) -> None:
    parts = case(columns, named)
    drafted = torch.randint(TOKENS, (ROWS, earlier), generator=torch.Generator().manual_seed(8))
    drafted = torch.cat([drafted, drafted[:, :1]], dim=1)[:, : earlier + 1] if earlier else drafted
    ruled = rules_of(parts[2], drafted if earlier else torch.zeros(ROWS, 0, dtype=torch.int64))
    favour = None
    if bias is not None:
        favour = favour_of(parts[0], parts[2], run(REFERENCE, True, parts, None, None, ruled).tokens[:, 0], bias)
    wanted, got = (run(kernels, True, parts, favour, None, ruled) for kernels in (REFERENCE, NATIVE))
    assert torch.equal(got.usable, wanted.usable)
    assert got.usable[2] == SLOTS
    assert got.usable[5] == 0
    plain = run(NATIVE, True, parts, favour)
    assert torch.equal(got.tokens[2], plain.tokens[2]), "a row without rules is as it was"
    assert got.law is not None
    assert wanted.law is not None
    for row, usable in enumerate(got.usable.tolist()):
        assert torch.equal(got.tokens[row, :usable], wanted.tokens[row, :usable])
        if parts[3][row] > 0:
            torch.testing.assert_close(got.law[row, :usable], wanted.law[row, :usable], atol=1e-6, rtol=1e-4)
    if columns == TOKENS and favour is None:
        assert not torch.equal(got.tokens, plain.tokens)
        assert len(got.tokens[4].unique()) == SLOTS, "each draft token is penalised in the slots after it"


def test_rows_of_a_pass_under_rules_are_those_of_the_plain_loop() -> None:
    noise = torch.Generator().manual_seed(2)
    lengths = torch.tensor([3, 0, 2, 1, 4, 0])
    start = torch.tensor([1, 5, 6, 10, 12, 17])  # row 0 and row 9 belong to nobody
    tokens = torch.randint(TOKENS, (ROWS, 4), generator=noise)
    tokens[4] = tokens[4, 0]
    logits = 3 * torch.randn(18, TOKENS, generator=noise)
    logits[7, 3], logits[13, 4] = torch.nan, -torch.inf
    ruled = rules_of(None, torch.zeros(ROWS, 0, dtype=torch.int64).long())
    wanted, got = logits.clone(), logits.clone()
    REFERENCE.apply_rules(wanted, start, lengths, tokens, ruled)
    NATIVE.apply_rules(got, start, lengths, tokens, ruled)
    torch.testing.assert_close(got, wanted, equal_nan=True)
    untouched = [0, 6, 7, 8, 9]
    torch.testing.assert_close(got[untouched], logits[untouched], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(got[14], logits[14])


@pytest.mark.parametrize("kernels", [NATIVE, REFERENCE], ids=["native", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_slot_that_is_not_finite_ends_what_is_usable(kernels: object, bad: float) -> None:
    parts = case(130, named=True)
    parts[0][1, 2, 17] = bad
    parts[0][2, 0, :] = bad
    drawn = run(kernels, True, parts, None)
    assert drawn.usable.tolist() == [4, 2, 0, 4, 4, 4]
    clean = run(kernels, True, case(130, named=True), None)
    assert torch.equal(drawn.tokens[0], clean.tokens[0])
    assert torch.equal(drawn.tokens[1, :2], clean.tokens[1, :2])


@pytest.mark.parametrize("kernels", [NATIVE, REFERENCE], ids=["native", "reference"])
def test_tokens_are_drawn_by_the_law_that_is_reported(kernels: object) -> None:
    """Every cell of the inverse CDF, ends and tokens without mass included."""
    law = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.125, 0.125, 0.0])
    uniforms = torch.tensor([[0.0], [0.24999999], [0.25], [0.7499999], [0.75], [1 - 2.0**-53]], dtype=torch.float64)
    base = law.log().clamp(min=-200).expand(6, 1, 7).contiguous()
    anchors = torch.zeros(6, dtype=torch.int64)
    drawn = kernels.draft_tokens(base, anchors, None, None, torch.ones(6), uniforms, None)  # type: ignore[attr-defined]
    assert drawn.tokens[:, 0].tolist() == [1, 1, 3, 3, 4, 5]
    torch.testing.assert_close(drawn.law[:, 0], law.expand(6, -1), atol=1e-6, rtol=1e-5)
