"""Costs of steps are measured once, undisturbed, believed as long as they are right, never in the way of a start."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_server.engine.executor import Executor, TorchCycle
from dspark_server.engine.profile import WARM, profile
from dspark_server.engine.simulate import SimulatedExecutor, SurvivalModel, VirtualClock
from dspark_server.runtime.paging import CacheGroup
from dspark_server.speculation.cost_model import CostModel, Profile

from .support import tiny_core

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
COSTS = Profile(
    TOKENS, tuple(0.010 + 0.001 * size for size in TOKENS), (1, 2, 3, 4), (0.002, 0.003, 0.0035, 0.004), 1e-6, 1e-7
)  # of a machine that nothing disturbs


@dataclass
class Disturbed(SimulatedExecutor):
    """A machine on a virtual clock that is `slower(now)` times slower at times."""

    slower: Callable[[float], float] = lambda now: 1.0

    def spend(self, seconds: float) -> float:
        return super().spend(self.slower(self.clock.now) * seconds)


def machine(slower: Callable[[float], float] = lambda now: 1.0) -> Disturbed:
    return Disturbed(VirtualClock(), CostModel(COSTS, 64, 4), SurvivalModel.of("code"), gamma=7, slower=slower)


def measure(
    directory: Path, executor: Executor | None = None, identity: str = "tiny", *, again: bool = False
) -> Profile:
    executor = executor or machine()
    return profile(
        executor,
        num_blocks=256,
        groups=[CacheGroup(4)],
        max_model_len=128,
        vocab_size=512,
        max_tokens=64,
        max_requests=4,
        directory=directory,
        identity=identity,
        again=again,
        clock=executor.clock if isinstance(executor, Disturbed) else time.perf_counter,
    )


def assert_costs(measured: Profile) -> None:
    assert (measured.tokens, measured.requests) == (COSTS.tokens, COSTS.requests)
    np.testing.assert_allclose(measured.verify, COSTS.verify, rtol=0.02)
    np.testing.assert_allclose(measured.draft, COSTS.draft, rtol=0.02)


def test_recorded_sizes_are_measured_and_the_first_past_them(tmp_path: Path) -> None:
    """A pass runs as one of them or, past the largest, at its own size: no other says anything."""
    stairs = replace(COSTS, recorded=(1, 4, 24), recorded_drafts=(2, 4))
    executor = Disturbed(VirtualClock(), CostModel(stairs, 64, 4), SurvivalModel.of("code"), gamma=7)
    measured = measure(tmp_path, executor)
    assert (measured.recorded, measured.recorded_drafts) == ((1, 4, 24), (2, 4))
    assert measured.tokens == (1, 4, 24, 25, 32, 48, 64)
    assert measured.requests == (2, 4)
    np.testing.assert_allclose(CostModel(measured, 64, 4).raw, CostModel(stairs, 64, 4).raw, rtol=0.02)
    again = executor.clock.now
    assert measure(tmp_path, executor) == measured
    assert executor.clock.now - again < 1.0
    smooth = machine()  # without them, no such profile is believed
    assert measure(tmp_path, smooth).recorded == ()


def test_it_is_kept(tmp_path: Path) -> None:
    """It takes less than a second to believe it."""
    measured = measure(tmp_path / "profiles")
    executor = machine()
    assert measure(tmp_path / "profiles", executor) == measured
    assert executor.clock.now < 1.0
    assert sum(each.tokens for each in executor.log) < 200


@pytest.mark.parametrize("factor", [8.0, 0.9, 1 / 8])
def test_one_that_does_not_agree_with_steps_is_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, factor: float
) -> None:
    measure(tmp_path, machine(lambda now: factor))
    with caplog.at_level(logging.WARNING):
        measured = measure(tmp_path)
    if factor == 0.9:
        assert not caplog.records
        assert measured.verify[0] == pytest.approx(0.9 * COSTS.verify[0], rel=0.02)
    else:
        (line,) = caplog.messages
        assert "off by a factor of 8.0" in line
        assert_costs(measured)
        assert measure(tmp_path) == measured  # that one is kept


def test_a_draft_that_takes_another_time_is_seen_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    measured = measure(tmp_path)
    (kept,) = tmp_path.iterdir()
    replace(measured, draft=tuple(8 * seconds for seconds in measured.draft)).save(kept)
    with caplog.at_level(logging.WARNING):
        assert_costs(measure(tmp_path))
    assert "a draft for one request" in caplog.text


def test_a_damaged_one_is_measured_again(tmp_path: Path) -> None:
    measured = measure(tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_text("{}")
    assert measure(tmp_path) == measured


@pytest.mark.parametrize("busy", [(0.5, 1.0), (0.0, 0.5), (0.3, 0.8)])
def test_a_neighbour_for_half_the_time_leaves_no_trace(tmp_path: Path, busy: tuple[float, float]) -> None:
    """Repeats of a size are spread over the whole measurement, so each size has quiet ones."""
    quiet = machine()
    measure(tmp_path / "quiet", quiet)
    # Beside a neighbour that slows eightfold a round lasts eight times as long: so much of the quiet rounds it takes.
    start, end = (share * quiet.clock.now for share in busy)

    def slower(now: float) -> float:
        return 8.0 if start <= now < start + 8 * (end - start) else 1.0

    assert_costs(measure(tmp_path / "busy", machine(slower)))


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    in_the_way = tmp_path / "profiles"
    in_the_way.write_text("not a directory")
    with caplog.at_level(logging.WARNING):
        assert measure(in_the_way / "more").verify
    assert "could not be kept" in caplog.text


def test_it_is_measured_again_when_asked_or_for_another_engine(tmp_path: Path) -> None:
    """The kept one is doctored a little, so that it can be told from a new one."""
    measured = measure(tmp_path)
    (kept,) = tmp_path.iterdir()
    doctored = replace(measured, run_context=2e-6)
    doctored.save(kept)
    assert measure(tmp_path) == doctored
    assert measure(tmp_path, identity="another") == measured
    assert measure(tmp_path) == doctored
    assert measure(tmp_path, again=True) == measured
    assert measure(tmp_path) == measured


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The passes and drafts of executors from here on, each with its number of tokens or requests."""
    seen: list[tuple[str, int]] = []
    verify, draft = TorchCycle.verify, TorchCycle.draft

    def verified(self: TorchCycle, block: Any) -> Any:
        seen.append(("verify", sum(len(run.tokens) for run in self._runs)))
        return verify(self, block)

    def drafted(self: TorchCycle, requests: Any, *rest: Any) -> Any:
        seen.append(("draft", len(requests)))
        return draft(self, requests, *rest)

    monkeypatch.setattr(TorchCycle, "verify", verified)
    monkeypatch.setattr(TorchCycle, "draft", drafted)
    return seen


def test_drafts_are_timed_behind_a_pass_and_times_rise(tmp_path: Path, calls: list[tuple[str, int]]) -> None:
    core = tiny_core()
    calls.clear()
    measured = measure(tmp_path, core.loop.executor)
    assert measured.tokens == TOKENS
    assert measured.requests == (1, 2, 3, 4)
    for times in (measured.verify, measured.draft):
        assert all(a <= b for a, b in pairwise(times))
    for requests in measured.requests:
        assert sum(pair == (("verify", 1), ("draft", requests)) for pair in pairwise(calls)) >= 3


@pytest.mark.parametrize(("most", "passes"), [(256, WARM), (24, (1, 16, 24))])
def test_nothing_is_cold_for_the_first_request(calls: list[tuple[str, int]], most: int, passes: tuple[int]) -> None:
    """And no pass is run that no step could have."""
    tiny_core(max_num_batched_tokens=most, max_num_seqs=8)
    assert [*(("verify", tokens) for tokens in passes), ("draft", 1)] == calls
