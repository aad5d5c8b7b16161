"""Acceptance in one native call against the plain loop; that the rule keeps the law is shown in tests/speculation."""

import math

import pytest
import torch
from dspark_kernels import Kernels, load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

NATIVE, REFERENCE = load("native"), load("reference")


def case(seed: int, vocabulary: int, width: int, law: str, broken: bool) -> tuple[Tensor | None, ...]:
    """Arguments of `accept_drafts` for nine requests; `broken`: three of them meet rows that are not finite."""
    noise = torch.Generator().manual_seed(seed)
    requests, slots = 9, width + 1
    lengths = torch.randint(0, width + 1, (requests,), generator=noise)
    lengths[0] = width
    start = torch.cat([torch.zeros(1, dtype=torch.int64), (lengths + 1).cumsum(0)[:-1]])
    logits = torch.randn(int((lengths + 1).sum()), vocabulary, generator=noise) * 2
    logits[logits > 3.5] = -math.inf
    columns = max(1, vocabulary // 2) if law in ("named", "expanded") else vocabulary
    rows = torch.randperm(requests, generator=noise)
    q = (torch.randn(requests, slots, columns, generator=noise) * 2).softmax(-1)
    names = None
    if law == "named":
        order = torch.rand(requests, slots, vocabulary, generator=noise).argsort(-1)
        names = order[..., :columns].contiguous()
    elif law == "expanded":
        names = torch.randperm(vocabulary, generator=noise)[:columns].sort().values.expand(requests, slots, columns)
    drawn = torch.multinomial(q.view(-1, columns), 1, generator=noise).view(requests, slots)
    tokens = drawn if names is None else names.gather(2, drawn.unsqueeze(2)).squeeze(2)
    tokens = tokens[rows][:, :width].contiguous()
    coins = torch.rand(requests, width, generator=noise, dtype=torch.float64) if width else None
    last = torch.rand(requests, width + 1, generator=noise, dtype=torch.float64)
    if broken:
        logits[3, 1], logits[5] = math.nan, -math.inf
        logits[7, 0] = math.inf
    scale = torch.rand(requests, generator=noise) + 0.5
    given_q = None if law == "one-hot" else q
    return (logits, start, lengths, tokens, scale, given_q, rows, names, coins, last)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.sampled_from([2, 17, 256, 300, 1031]),
    width=st.integers(0, 4),
    law=st.sampled_from(["whole", "named", "expanded", "one-hot"]),
    broken=st.booleans(),
    jointly=st.booleans(),
)
def test_outcomes_are_those_of_the_plain_loop(
    seed: int, vocabulary: int, width: int, law: str, broken: bool, jointly: bool
) -> None:
    arguments = case(seed, vocabulary, width, law, broken)
    outcomes = (kernels.accept_drafts(*arguments, jointly=jointly) for kernels in (NATIVE, REFERENCE))
    for ours, plain in zip(*outcomes, strict=True):
        assert ours.tolist() == plain.tolist()


@pytest.mark.parametrize("jointly", [False, True])
@pytest.mark.parametrize("kernels", [NATIVE, REFERENCE], ids=["native", "reference"])
def test_ends_of_the_unit_interval(kernels: Kernels, jointly: bool) -> None:
    """A coin of 0 lets no impossible token through, and no draw falls on a token without mass."""
    law = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    logits = law.log().repeat(4, 1)
    tokens = torch.tensor([[0], [3]])
    q = torch.full((2, 1, 5), 0.2)
    coins = torch.zeros(2, 1, dtype=torch.float64)
    last = torch.tensor([[0.0, 0.0], [1 - 2.0**-53, 1 - 2.0**-53]], dtype=torch.float64)
    count, token, failed = kernels.accept_drafts(
        logits, torch.tensor([0, 2]), torch.tensor([1, 1]), tokens, torch.ones(2), q, torch.arange(2), None, coins,
        last, jointly=jointly,
    )  # fmt: skip
    assert count.tolist() == [0, 1]
    assert token.tolist() == [1, 3]
    assert failed.tolist() == [False, False]


@pytest.mark.parametrize("kernels", [NATIVE, REFERENCE], ids=["native", "reference"])
def test_the_residual_is_that_of_the_accepted_nodes_share(kernels: Kernels) -> None:
    """Half of p is left of the first node: after it 0.5 p - q = (.1, .1, 0), where p - q would be (.4, .3, 0)."""
    p = torch.tensor([[0.3, 0.7, 0.0], [0.6, 0.4, 0.0], [1.0, 0.0, 0.0]])
    q = torch.tensor([[[0.6, 0.4, 0.0], [0.2, 0.1, 0.7]]])
    one, tokens = torch.tensor([1]), torch.tensor([[0, 2]])
    for coin, at, expected in ((0.28, 0.53, (1, 1)), (0.28, 0.47, (1, 0)), (0.29, 0.53, (0, 1))):  # h is 2 / 7
        coins, last = torch.tensor([[coin, 1e-9]]).double(), torch.full((1, 3), at).double()
        count, token, _ = kernels.accept_drafts(
            p.log(), one * 0, one * 2, tokens, torch.ones(1), q, one * 0, None, coins, last, jointly=True
        )
        assert (count.item(), token.item()) == expected
