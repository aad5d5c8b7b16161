"""Triton's sequential head and acceptance against the plain loops."""

import math

import pytest
import torch
from dspark_kernels import load
from dspark_kernels.triton import accept, sequential, vocabulary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels import test_accept, test_draft_tokens
from tests.kernels.support import triton_kernels
from tests.kernels.test_draft_tokens import SLOTS, favour_of, run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

TRITON, REFERENCE = triton_kernels(), load("reference")


@pytest.fixture(params=["whole blocks", "slot by slot"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shortlist in one launch, or a vocabulary (of several parts) with a product before each slot."""
    if request.param == "slot by slot":
        for module in (sequential, vocabulary):
            monkeypatch.setattr(module, "PART", 128)
        monkeypatch.setattr(sequential, "FUSED", 0)
    else:
        monkeypatch.setattr(sequential, "BLOCK", 128)  # several steps


@pytest.mark.parametrize(
    ("columns", "named", "markov", "bias"),
    [
        (300, False, True, None),
        (300, False, False, 0.0),
        (130, True, True, 3.0),
        (130, True, True, 20.0),
        (7, True, True, 3.0),
    ],
)
@pytest.mark.usefixtures("way")
def test_blocks_are_those_of_the_plain_loop(columns: int, named: bool, markov: bool, bias: float | None) -> None:
    parts = test_draft_tokens.case(columns, named)
    favour = None
    if bias is not None:
        favour = favour_of(parts[0], parts[2], run(REFERENCE, markov, parts, None).tokens[:, 0], bias)
        assert named is False or not bool(favour.named.all()), "a token of no column is among them"
    wanted, got = run(REFERENCE, markov, parts, favour), run(TRITON, markov, parts, favour)
    assert torch.equal(got.tokens, wanted.tokens)
    assert torch.equal(got.on, wanted.on)
    # Of a token that is nearly certain the odds are the log of a difference: float32 leaves them a few digits.
    torch.testing.assert_close(got.odds.sigmoid(), wanted.odds.sigmoid(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(got.odds, wanted.odds, atol=2e-2, rtol=1e-3)
    assert got.usable.tolist() == [SLOTS] * len(got.tokens)
    assert got.law is not None
    assert wanted.law is not None
    torch.testing.assert_close(got.law, wanted.law, atol=1e-6, rtol=1e-4)


@pytest.mark.usefixtures("way")
def test_greedy_blocks_have_no_law_and_take_the_lowest_of_equals() -> None:
    base, anchors, names, scale, _ = test_draft_tokens.case(130, named=True)
    base[0, 1] = 0.0
    base[1, 0, [20, 90]] = 50.0
    parts = base, anchors, names, scale * 0, None
    for markov in (False, True):
        wanted, got = run(REFERENCE, markov, parts, None), run(TRITON, markov, parts, None)  # type: ignore[arg-type]
        assert torch.equal(got.tokens, wanted.tokens)
        assert got.law is None


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_slot_that_is_not_finite_ends_what_is_usable(bad: float) -> None:
    parts = test_draft_tokens.case(130, named=True)
    clean = run(REFERENCE, True, parts, None)
    favour = favour_of(parts[0], parts[2], clean.tokens[:, 0], 3.0)
    parts[0][1, 2, 17] = bad
    parts[0][2, 0, :] = bad
    parts[0][4, 3, :] = -math.inf
    drawn, wanted = run(TRITON, True, parts, favour), run(REFERENCE, True, parts, favour)
    assert drawn.usable.tolist() == wanted.usable.tolist() == [4, 2, 0, 4, 3, 4]
    for row, usable in enumerate(drawn.usable.tolist()):
        assert torch.equal(drawn.tokens[row, :usable], wanted.tokens[row, :usable])
    assert torch.equal(drawn.on, wanted.on)


@pytest.mark.usefixtures("way")
def test_tokens_are_drawn_by_the_law_that_is_reported() -> None:
    test_draft_tokens.test_tokens_are_drawn_by_the_law_that_is_reported(TRITON)


@settings(max_examples=24, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.sampled_from([2, 17, 300]),
    width=st.integers(0, 3),
    law=st.sampled_from(["whole", "named", "expanded", "one-hot"]),
    broken=st.booleans(),
    jointly=st.booleans(),
)
def test_outcomes_are_those_of_the_plain_loop(
    seed: int, vocabulary: int, width: int, law: str, broken: bool, jointly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accept, "PART", 128)
    arguments = test_accept.case(seed, vocabulary, width, law, broken)
    outcomes = (kernels.accept_drafts(*arguments, jointly=jointly) for kernels in (TRITON, REFERENCE))
    for ours, plain in zip(*outcomes, strict=True):
        assert ours.tolist() == plain.tolist()


@pytest.mark.parametrize("jointly", [False, True])
def test_ends_of_the_unit_interval(jointly: bool) -> None:
    test_accept.test_ends_of_the_unit_interval(TRITON, jointly)


def test_the_residual_is_that_of_the_accepted_nodes_share() -> None:
    test_accept.test_the_residual_is_that_of_the_accepted_nodes_share(TRITON)


@pytest.mark.parametrize("named", [False, True])
def test_equal_laws_leave_nothing_over_and_p_is_drawn_from(named: bool) -> None:
    """A coin that rejects although p equals q cannot be, but rounding can make it: here it is a coin above 1."""
    logits = torch.tensor([[0.0, 0.0, -math.inf, 0.0, 0.0]]).repeat(2, 1)
    q = torch.tensor([[[0.25, 0.25, 0.0, 0.25, 0.25]]])
    names = torch.arange(5).expand(1, 1, 5).contiguous() if named else None
    coins, last = torch.full((1, 1), 2.0).double(), torch.tensor([[0.6, 0.0]]).double()
    one = torch.tensor([1])
    count, token, failed = TRITON.accept_drafts(
        logits, one * 0, one, torch.tensor([[0]]), torch.ones(1), q, one * 0, names, coins, last, jointly=False
    )
    assert (count.item(), token.item(), failed.item()) == (0, 3, False)


def test_a_name_that_stands_twice_loses_both_shares() -> None:
    """Columns 0 and 2 are both token 1: its chance under q is their sum, and the residual lacks both."""
    p = torch.tensor([0.2, 0.5, 0.3])
    q, names = torch.tensor([[[0.3, 0.4, 0.3]]]), torch.tensor([[[1, 0, 1]]])
    one = torch.tensor([1])
    arguments = (p.log().repeat(2, 1), one * 0, one, torch.tensor([[1]]), torch.ones(1), q, one * 0, names)
    for coin, expected in ((0.83, (1, 0)), (0.84, (0, 2))):  # p / q of token 1 is 5 / 6
        coins, last = torch.full((1, 1), coin).double(), torch.zeros(1, 2).double()
        count, token, _ = TRITON.accept_drafts(*arguments, coins, last, jointly=False)
        assert (count.item(), token.item()) == expected
