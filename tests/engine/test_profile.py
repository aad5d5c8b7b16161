"""What steps cost is measured once, and never in the way of a start."""

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dspark_server.engine.executor import TorchExecutor
from dspark_server.engine.profile import WARM, profile
from dspark_server.speculation.capacity import Profile

from .support import tiny_core


def measure(directory: Path, identity: str = "tiny", *, again: bool = False) -> Profile:
    core = tiny_core()
    return profile(
        core.loop.executor,
        num_blocks=256,
        block_size=4,
        max_model_len=core.max_model_len,
        max_tokens=16,
        max_requests=2,
        directory=directory,
        identity=identity,
        again=again,
    )


def test_it_is_kept(tmp_path: Path) -> None:
    assert measure(tmp_path / "profiles") == measure(tmp_path / "profiles")


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    in_the_way = tmp_path / "profiles"
    in_the_way.write_text("not a directory")
    with caplog.at_level(logging.WARNING):
        assert measure(in_the_way / "more").verify
    assert "could not be kept" in caplog.text


def test_it_is_measured_again_when_asked_or_for_another_engine(tmp_path: Path) -> None:
    """The kept one is doctored, so that it can be told from a new one."""
    measure(tmp_path)
    (kept,) = tmp_path.iterdir()
    doctored = Profile((1, 16), (7.0, 8.0), (1, 2), (3.0, 4.0), 0.0, 0.0)
    doctored.save(kept)
    assert measure(tmp_path) == doctored
    assert measure(tmp_path, "another") != doctored
    assert measure(tmp_path) == doctored
    assert measure(tmp_path, again=True) != doctored
    assert measure(tmp_path) != doctored


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What executors do, with how many tokens or requests, from here on."""
    seen: list[tuple[str, int]] = []
    verify, draft = TorchExecutor.verify, TorchExecutor.draft

    def verified(self: TorchExecutor, runs: Any) -> Any:
        seen.append(("verify", sum(len(run.tokens) for run in runs)))
        return verify(self, runs)

    def drafted(self: TorchExecutor, requests: Any, *rest: Any) -> Any:
        seen.append(("draft", len(requests)))
        return draft(self, requests, *rest)

    monkeypatch.setattr(TorchExecutor, "verify", verified)
    monkeypatch.setattr(TorchExecutor, "draft", drafted)
    return seen


def test_drafts_are_timed_behind_a_pass_and_times_rise(tmp_path: Path, calls: list[tuple[str, int]]) -> None:
    measured = measure(tmp_path)
    assert measured.tokens == (1, 2, 3, 4, 6, 8, 12, 16)
    assert measured.requests == (1, 2)
    for times in (measured.verify, measured.draft):
        assert all(a <= b for a, b in pairwise(times))
    for requests in measured.requests:  # all but the one that warms up
        assert sum(pair == (("verify", 1), ("draft", requests)) for pair in pairwise(calls)) >= 2


def test_nothing_is_cold_for_the_first_request(calls: list[tuple[str, int]]) -> None:
    tiny_core()
    assert [*(("verify", tokens) for tokens in WARM), ("draft", 1)] == calls
