"""Whole blocks in one native call, against the plain loop over slots."""

import pytest
import torch
from dspark_kernels import DraftedTokens, Favour, Filters, load
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


def run(kernels: object, markov: bool, parts: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor],
        favour: Favour | None, filters: Filters | None = None) -> DraftedTokens:  # fmt: skip
    base, anchors, names, scale, uniforms = parts
    noise = torch.Generator().manual_seed(1)
    w1, w2 = (torch.randn(n, RANK, generator=noise).bfloat16() for n in (TOKENS, base.shape[2]))
    head = (w1, kernels.pack_linear(w2)) if markov else None  # type: ignore[attr-defined]
    drawn = kernels.draft_tokens(  # type: ignore[attr-defined]
        base, anchors, names, head, scale, uniforms, favour, filters
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
