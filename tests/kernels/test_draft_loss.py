"""The native training loss against autograd over the plain formula, and the formula against its known values."""

import pytest
import torch
from dspark_kernels import Kernels, load
from torch import Tensor

NATIVE, REFERENCE = load("native"), load("reference")
# Gradients are stored in the logits' dtype; the losses themselves are float32 whatever that is.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def case(rows: int, vocabulary: int, dtype: torch.dtype, scale: float) -> tuple[Tensor, ...]:
    noise = torch.Generator().manual_seed(rows * vocabulary)
    draft, target = (torch.randn(count, vocabulary, generator=noise) * scale for count in (rows, rows // 2 + 1))
    target_rows = torch.randint(len(target), (rows,), generator=noise)
    labels = torch.randint(vocabulary, (rows,), generator=noise)
    ce_weight, tv_weight = (torch.rand(rows, generator=noise) for _ in range(2))
    mass = torch.rand(len(target), generator=noise)
    return draft.to(dtype), target.to(dtype), target_rows, labels, mass, ce_weight, tv_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (3, 15), (2, 16), (5, 17), (7, 1000), (64, 4099)])
def test_losses_and_gradient_are_autograds(rows: int, vocabulary: int, dtype: torch.dtype, scale: float) -> None:
    draft, *others = case(rows, vocabulary, dtype, scale)
    expected, gradient = draft.clone(), draft.clone()
    wanted = REFERENCE.draft_loss(expected, *others)
    got = NATIVE.draft_loss(gradient, *others)
    for theirs, ours in zip(wanted, got, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=ROUNDING[dtype])


@pytest.mark.parametrize("kernels", [NATIVE, REFERENCE], ids=["native", "reference"])
def test_equal_laws_are_at_distance_zero_and_disjoint_ones_at_two(kernels: Kernels) -> None:
    target = torch.tensor([[2.0, 1.0, 0.0, -1.0], [100.0, 0.0, 0.0, 0.0]])
    draft = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 100.0, 0.0, 0.0]])
    labels, ones = torch.tensor([0, 1]), torch.ones(2)
    cross_entropy, distance = kernels.draft_loss(draft, target, torch.tensor([0, 1]), labels, ones, ones * 0, ones)
    assert distance.tolist() == pytest.approx([0.0, 2.0], abs=1e-6)
    assert cross_entropy.tolist() == pytest.approx([0.4401897, 0.0], abs=1e-6)
    assert draft[1].abs().max() == pytest.approx(0.0, abs=1e-6)  # saturated: no logit of it matters


@pytest.mark.parametrize("kernels", [NATIVE, REFERENCE], ids=["native", "reference"])
def test_columns_with_a_part_of_the_mass_give_the_distance_of_the_whole_laws(kernels: Kernels) -> None:
    """A drafter that may draw four of six tokens: as far from the target as if the other two had no chance."""
    noise = torch.Generator().manual_seed(2)
    target, draft = torch.randn(3, 6, generator=noise), torch.randn(3, 4, generator=noise)
    law = target.softmax(-1)
    whole = torch.cat([draft.softmax(-1), torch.zeros(3, 2)], dim=1)
    rows, ones = torch.arange(3), torch.ones(3)
    _, distance = kernels.draft_loss(
        draft.clone(), target[:, :4].contiguous(), rows, rows, law[:, :4].sum(1), ones, ones
    )
    torch.testing.assert_close(distance, (whole - law).abs().sum(1))
