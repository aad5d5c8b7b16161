"""The plain kernels where they are not obvious: what a query does not see is left out of its sums."""

from dataclasses import replace

import pytest
import torch
from dspark_kernels.reference import ReferenceKernels

from tests.kernels.support import check_hidden_rows_stay_hidden, paged


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_a_query_does_not_see_does_nothing_to_it(value: float) -> None:
    case = paged([(5, 20), (0, 5), (1, 30)], groups=2, kv_heads=2, size=6, block=4, dtype=torch.float32)
    for causal, window in ((True, None), (False, None), (True, 3), (False, 9)):
        check_hidden_rows_stay_hidden(ReferenceKernels(), case, causal, window, value)
    case = replace(paged([(5, 20), (1, 3)], groups=2, kv_heads=2, size=6, block=4, dtype=torch.float32), first_key=1)
    check_hidden_rows_stay_hidden(ReferenceKernels(), case, True, None, value)
