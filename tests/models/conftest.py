"""Fixtures of the model tests: both kernel sets, and the converted default model. Nothing here uses the network."""

from pathlib import Path

import pytest
from dspark_kernels import Kernels, load

from dspark_server.models.hub import pull_default


@pytest.fixture(scope="session", params=["reference", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load(request.param)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """SmolLM2-135M-Instruct, converted once into the user's cache."""
    return pull_default(progress=False)
