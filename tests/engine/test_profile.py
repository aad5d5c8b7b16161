"""What steps cost is measured once, and never in the way of a start."""

import logging
from pathlib import Path

import pytest

from dspark_server.engine.profile import profile
from dspark_server.speculation.capacity import Profile

from .support import tiny_core


def measure(directory: Path) -> Profile:
    core = tiny_core()
    return profile(
        core.loop.executor,
        num_blocks=256,
        block_size=4,
        max_model_len=core.max_model_len,
        max_tokens=16,
        max_requests=2,
        directory=directory,
        identity="tiny",
    )


def test_it_is_kept(tmp_path: Path) -> None:
    assert measure(tmp_path / "profiles") == measure(tmp_path / "profiles")


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    in_the_way = tmp_path / "profiles"
    in_the_way.write_text("not a directory")
    with caplog.at_level(logging.WARNING):
        assert measure(in_the_way / "more").verify
    assert "could not be kept" in caplog.text
