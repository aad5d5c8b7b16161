"""Filters in native code against the plain ones."""

import math

import pytest
import torch
from dspark_kernels import Filters, load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

NATIVE, REFERENCE = load("native"), load("reference")


def filtered(kernels: object, logits: Tensor, rows: Tensor, scale: Tensor, filters: Filters) -> Tensor:
    result = kernels.filter_logits(logits, rows, scale, filters)  # type: ignore[attr-defined]
    assert isinstance(result, Tensor)
    return result


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.sampled_from([2, 17, 256, 1031]),
    spread=st.sampled_from([0.01, 2.0, 30.0]),
    ties=st.booleans(),
)
def test_what_is_left_is_what_the_plain_filters_leave(seed: int, vocabulary: int, spread: float, ties: bool) -> None:
    agree(NATIVE, *case(seed, vocabulary, spread, ties))


def case(seed: int, vocabulary: int, spread: float, ties: bool) -> tuple[Tensor, Tensor, Tensor, Filters]:
    """Logits, some of them without anything, or with NaN or +inf; rows of them, inverse temperatures and filters."""
    noise = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, vocabulary, generator=noise) * spread
    if ties:
        logits = (logits / spread * 2).round() * spread / 2
    logits[:, 1:][torch.rand(9, vocabulary - 1, generator=noise) < 0.1] = -math.inf
    logits[2] = -math.inf
    logits[3, 0], logits[4, 1] = math.nan, math.inf
    rows = torch.randint(9, (12,), generator=noise)
    scale = torch.rand(12, generator=noise) + 0.3
    filters = Filters(
        torch.randint(0, vocabulary + 2, (12,), generator=noise) * torch.randint(2, (12,), generator=noise),
        torch.where(torch.rand(12, generator=noise) < 0.5, torch.rand(12, generator=noise).clamp(min=1e-6), 1.0),
        torch.where(torch.rand(12, generator=noise) < 0.3, torch.rand(12, generator=noise), 0.0),
    )
    return logits, rows, scale, filters


def agree(kernels: object, logits: Tensor, rows: Tensor, scale: Tensor, filters: Filters) -> None:
    """The kernels leave what the plain ones leave."""
    ours, plain = (filtered(each, logits, rows, scale, filters) for each in (kernels, REFERENCE))
    for i in range(len(rows)):
        a, b = ours[i], plain[i]
        if bool((logits[rows[i]] < math.inf).all()):
            kept = a > -math.inf
            assert torch.equal(a[kept], logits[rows[i]][kept])
            # Rounding may decide otherwise about tokens whose mass ends within it of top_p, and about nothing else.
            differ = (kept != (b > -math.inf)).nonzero().squeeze(1)
            p = torch.softmax(logits[rows[i]].double() * scale[i], -1)
            assert float(p[differ].sum()) <= 0 or _at_the_edge(p, kept, differ, filters, i)
        else:
            torch.testing.assert_close(a, b, equal_nan=True)


def _at_the_edge(p: Tensor, kept: Tensor, differ: Tensor, filters: Filters, row: int) -> bool:
    if float(filters.min_p[row]) > 0 and bool(((p[differ] / p.max() - filters.min_p[row]).abs() < 1e-5).all()):
        return True
    before = p[kept & (p > p[differ].max())].sum() / p[kept].sum()
    return bool((before - filters.top_p[row]).abs() < 1e-4)


@pytest.mark.parametrize("kernels", [NATIVE, REFERENCE], ids=["native", "reference"])
def test_edges(kernels: object) -> None:
    check_edges(kernels)


def check_edges(kernels: object) -> None:
    """Ties at an edge stay, the best token always does, and each filter sees what the ones before it left."""
    logits = torch.tensor([[0.4, 0.1, 0.2, 0.1, 0.2]]).log()

    def kept(top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[int]:
        filters = Filters(torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
        out = filtered(kernels, logits, torch.tensor([0]), torch.ones(1), filters)
        return (out[0] > -math.inf).nonzero().squeeze(1).tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=1) == [0]
    assert kept(top_k=2) == [0, 2, 4]
    assert kept(top_k=4) == [0, 1, 2, 3, 4]
    assert kept(top_k=9) == [0, 1, 2, 3, 4]
    assert kept(top_p=1e-6) == [0]
    assert kept(top_p=0.5) == [0, 2, 4]
    assert kept(top_p=0.85) == [0, 1, 2, 3, 4]
    assert kept(min_p=0.3) == [0, 2, 4]
    assert kept(top_k=2, top_p=0.49) == [0]  # of .4 / .8 = .5
    assert kept(min_p=0.3, top_p=0.6) == [0, 2, 4]
