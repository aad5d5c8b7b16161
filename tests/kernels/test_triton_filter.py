"""Triton's sampling filters against the plain ones."""

import math

import pytest
import torch
from dspark_kernels import Filters, load
from dspark_kernels.triton import filter, sequential, vocabulary
from dspark_kernels.triton.costs import PASSES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from tests.kernels import test_draft_tokens, test_filter
from tests.kernels.support import triton_kernels
from tests.kernels.test_draft_tokens import SLOTS, favour_of, run
from tests.kernels.test_filter import agree, filtered

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

TRITON, REFERENCE = triton_kernels(), load("reference")
BLOCK = filter.BLOCK


@pytest.fixture(autouse=True)
def several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filter, "BLOCK", 256)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.sampled_from([2, 17, 256, 1031]),
    spread=st.sampled_from([0.01, 2.0, 30.0, 1e30]),
    ties=st.booleans(),
)
def test_what_is_left_is_what_the_plain_filters_leave(seed: int, vocabulary: int, spread: float, ties: bool) -> None:
    agree(TRITON, *test_filter.case(seed, vocabulary, spread, ties))


def test_edges() -> None:
    test_filter.check_edges(TRITON)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(1, 1.0, 0.0), (3, 1.0, 0.0), (0, 1e-6, 0.0), (0, 1 - 2**-24, 0.0), (0, 1.0, 1.0), (7, 0.9, 0.01), (0, 1.0, 0.0)],
)
def test_the_kept_set_is_exactly_the_plain_one(top_k: int, top_p: float, min_p: float) -> None:
    """Rows whose edges are no matter of rounding: all equal, ties at the edge, far outliers, subnormals."""
    rows = torch.tensor(
        [
            [1.0] * 8,
            [2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0],
            [0.0, -0.0, 0.0, -0.0, 0.0, -0.0, 0.0, -1.0],
            [3e38, -3e38, 3e38, -3e38, 0.0, 1.0, 1e-45, -1e-45],
            [5.0, -1e30, -1e30, 4.0, -1e30, 3.0, -math.inf, -math.inf],
            [-math.inf] * 7 + [0.5],
            [math.nan] * 8,
            [math.nan] + [0.0] * 7,
            [math.inf] + [0.0] * 7,
            [-math.inf] * 8,
        ]
    )
    index, count = torch.arange(len(rows)), len(rows)
    filters = Filters(torch.full((count,), top_k), torch.full((count,), top_p), torch.full((count,), min_p))
    ours, plain = (filtered(kernels, rows, index, torch.ones(count), filters) for kernels in (TRITON, REFERENCE))
    assert torch.equal(ours.nan_to_num(7.0), plain.nan_to_num(7.0))
    assert torch.equal(ours[6:].nan_to_num(7.0), rows[6:].nan_to_num(7.0)), "rows that fail come back as they are"


@pytest.mark.skipif(torch.cuda.is_available(), reason="passes are counted where the kernel is Python")
def test_the_row_is_read_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole vocabulary, a part of it masked by a number far below: some passes until what is left fits a block."""
    logits = torch.randn(1, 151_936, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 140_000:] = -1e30
    monkeypatch.setattr(filter, "BLOCK", BLOCK)
    reads = 0
    load_of = InterpreterBuilder.create_masked_load

    def counted(*arguments: object) -> object:
        nonlocal reads
        reads += 1
        return load_of(*arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)
    one = torch.ones(1)
    agree(TRITON, logits, torch.tensor([0]), one, Filters(torch.tensor([50]), one * 0.9, one * 0))
    assert reads / (151_936 / BLOCK) < PASSES + 1


BLOCK_FILTERS = Filters(
    torch.tensor([3, 5, 0, 0, 20, 0]), torch.tensor([0.5, 1.0, 1.0, 0.6, 0.8, 1.0]), torch.tensor([0.0] * 5 + [0.9])
)


@pytest.fixture(params=["whole blocks", "slot by slot"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shortlist in one launch, or a vocabulary (of several parts) with a launch for each slot's floors."""
    if request.param == "slot by slot":
        for module in (sequential, vocabulary):
            monkeypatch.setattr(module, "PART", 128)
        monkeypatch.setattr(sequential, "FUSED", 0)
    else:
        monkeypatch.setattr(sequential, "BLOCK", 256)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("columns", "named", "markov", "bias"),
    [(300, False, True, None), (130, True, True, 3.0), (130, True, False, 20.0)],
)
def test_filtered_blocks_are_those_of_the_plain_loop(
    columns: int, named: bool, markov: bool, bias: float | None
) -> None:
    parts = test_draft_tokens.case(columns, named)
    favour = None
    if bias is not None:
        favour = favour_of(parts[0], parts[2], run(REFERENCE, markov, parts, None).tokens[:, 0], bias)
    wanted, got = (run(kernels, markov, parts, favour, BLOCK_FILTERS) for kernels in (REFERENCE, TRITON))
    assert torch.equal(got.tokens, wanted.tokens)
    assert torch.equal(got.on, wanted.on)
    assert got.law is not None
    assert wanted.law is not None
    assert torch.equal(got.law > 0, wanted.law > 0)
    torch.testing.assert_close(got.law, wanted.law, atol=1e-6, rtol=1e-4)
    assert (got.law[1] > 0).sum(-1).tolist() == [5] * SLOTS


@pytest.mark.usefixtures("way")
def test_rows_without_filters_and_broken_ones_beside_filtered_ones() -> None:
    parts = test_draft_tokens.case(130, True)
    mixed = Filters(BLOCK_FILTERS.top_k.clone(), BLOCK_FILTERS.top_p.clone(), BLOCK_FILTERS.min_p)
    mixed.top_k[4], mixed.top_p[4] = 0, 1.0
    plain, filtered = run(TRITON, True, parts, None), run(TRITON, True, parts, None, mixed)
    assert plain.law is not None
    assert filtered.law is not None
    assert torch.equal(filtered.law[4], plain.law[4]), "filters that are off change nothing"
    assert not torch.equal(filtered.law[1], plain.law[1])
    greedy = parts[3] == 0
    assert torch.equal(filtered.tokens[greedy], plain.tokens[greedy]), "greedy rows have nothing to filter"
    broken = parts[0].clone()
    broken[1, 2, 17], broken[3, 0] = math.nan, -math.inf
    drawn = run(TRITON, True, (broken, *parts[1:]), None, mixed)
    assert drawn.usable.tolist() == [4, 2, 4, 0, 4, 4]
    assert drawn.law is not None
    assert not drawn.law[1, 2].any()
    assert torch.equal(drawn.law[4], filtered.law[4])


def test_nothing_is_read_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked(self: Tensor, *_: object) -> None:
        raise AssertionError("a result was looked at")

    parts = test_draft_tokens.case(130, named=True)
    kernels = load("triton")
    filters = Filters(torch.full((6,), 5), torch.full((6,), 0.9), torch.zeros(6))
    launched: list[object] = []
    monkeypatch.setattr("dspark_kernels.triton.launch.Launch.run", lambda launch: launched.append(launch))
    for name in ("item", "tolist", "__bool__", "nonzero", "cpu"):
        monkeypatch.setattr(Tensor, name, looked)
    kernels.filter_logits(parts[0][:, 0], torch.arange(6), torch.ones(6), filters)
    kernels.draft_tokens(parts[0], parts[1], parts[2], None, parts[3], parts[4], None, filters)
    assert len(launched) == 2
