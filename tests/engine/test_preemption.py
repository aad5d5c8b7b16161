"""Whoever wants blocks in the middle of a step has them from the next plan on: a draft is never dropped for it."""

from itertools import pairwise
from typing import Any

import pytest

from dspark_server import failpoints
from dspark_server.engine.core import EngineCore
from dspark_server.engine.request import Request
from dspark_server.runtime.paging import BlockTable

from ..runtime.twin import TwinDevice
from .support import greedy, prompts, seeded, tiny_core
from .test_device_executor import load

PLANNING = ("step.plan", "blocks.allocate")
POINTS = ("step.plan", "step.draft", "draft.survival", "step.verify", "target.logits", "step.sample", "step.commit",
          "commit.request")  # fmt: skip
PROMPTS, PARAMS = prompts(4, shortest=8, longest=20), [greedy(30), seeded(5, 30), greedy(28), seeded(6, 26)]


class Pressure:
    """Takes all blocks nobody holds while a step stands at `point`, until a request had to give way for it.

    `log`: every point that steps came to, with the preemptions so far.
    """

    def __init__(self, core: EngineCore, point: str) -> None:
        self._core, self._point = core, point
        self._before = core.loop.stats.preemptions
        self.taken: list[int] = []
        self.running: list[Request] | None = None  # when it was asked for
        self.log: list[tuple[str, int]] = []

    @property
    def preemptions(self) -> int:
        return self._core.loop.stats.preemptions - self._before

    def hit(self, name: str) -> None:
        self.log.append((name, self.preemptions))
        running, pool = self._core.batcher.running, self._core.batcher.pool
        ready = len(running) == len(PROMPTS) and all(request.is_decoding for request in running)
        if name == self._point and self.running is None and ready:
            self.running = list(running)
            self.taken = pool.allocate(pool.available)

    def passed(self, name: str, value: Any) -> Any:
        self.hit(name)
        return value

    def give_back(self) -> None:
        self._core.batcher.pool.release([BlockTable(0, self.taken)])
        self.taken = []


def run(core: EngineCore, point: str, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """All requests to their end under pressure, which may take effect only where it must; no block may be lost."""
    core.batcher.pool.reset_cache()
    core.loop._check_invariants = False  # it does not know of the blocks taken from outside
    pressure, steps = Pressure(core, point), 0
    requests = [core.new_request(prompt, own, nonce=0) for prompt, own in zip(PROMPTS, PARAMS, strict=True)]
    for request in requests:
        core.batcher.add(request)
    with monkeypatch.context() as patch:
        patch.setattr(failpoints, "hit", pressure.hit)
        patch.setattr(failpoints, "passed", pressure.passed)
        while core.loop.has_work:
            asked = pressure.running is not None
            core.loop.step()
            steps += 1
            assert steps < 500, "it goes on for ever"
            core.batcher.pool.check(
                [*(request.tables for request in core.batcher.running), [BlockTable(0, pressure.taken)]]
            )
            if pressure.running is not None and not asked and point not in PLANNING:
                left = [request for request in pressure.running if request.finish_reason is None]
                assert core.batcher.running == left, "somebody gave way in the step under way"
            if pressure.preemptions:
                pressure.give_back()
    core.batcher.pool.check([])
    assert pressure.preemptions > 0, "nobody gave way at all"
    changed = {before for (before, count), (_, later) in pairwise(pressure.log) if later != count}
    assert changed <= set(PLANNING), changed
    return [request.output for request in requests]


def alone(core: EngineCore) -> list[list[int]]:
    return [core.generate([prompt], own)[0] for prompt, own in zip(PROMPTS, PARAMS, strict=True)]


@pytest.fixture(scope="module")
def served() -> tuple[EngineCore, list[list[int]]]:
    """An engine for all points, which leaves nothing in it, and what it says without pressure."""
    core = tiny_core()
    return core, alone(core)


@pytest.mark.parametrize("point", POINTS)
def test_it_takes_effect_between_commit_and_the_next_draft(
    served: tuple[EngineCore, list[list[int]]], point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, expected = served
    assert run(core, point, monkeypatch) == expected


def test_it_does_on_a_device_that_works_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(load(None)[0])
    with TwinDevice() as device:
        core, _ = load(device, enforce_eager=True)
        assert run(core, "step.verify", monkeypatch) == expected
