"""Two threads for the native kernels, which share work between them, whatever a worker has; one for Triton's."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1 if "triton" in request.path.name else 2)
    yield
    torch.set_num_threads(before)
