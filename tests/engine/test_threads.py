"""The number of threads, followed on a clock of the test's."""

import logging
from dataclasses import dataclass

import pytest
import torch
from dspark_kernels import ReferenceKernels

from dspark_server.engine import threads
from dspark_server.engine.threads import ThreadCount
from dspark_server.runtime.backend import threads_in_use, use_threads
from tests.engine.support import greedy, prompts, tiny_core


@dataclass
class Machine:
    """Costs of a step by number of threads; `share` of the time is stolen."""

    processors: int
    costs: dict[int, float]
    share: float = 0.0
    now: float = 0.0
    _stolen: float = 0.0

    def count(self, most: int = 64) -> ThreadCount:
        return ThreadCount(
            most,
            usable=lambda: self.processors,
            stolen=lambda: (int(self._stolen), int(100 * self.now)),
            clock=lambda: self.now,
        )

    def run(self, count: ThreadCount, seconds: float) -> list[int]:
        """Numbers of threads that it had, each once in a row."""
        seen = [count.count]
        for _ in range(int(seconds / 0.05)):
            self.now += 0.05
            self._stolen += 5 * self.share
            changed = count.stepped(self.costs[count.count])
            assert changed == (count.count != seen[-1])
            if changed:
                seen.append(count.count)
        return seen


def test_limits_are_followed_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    machine = Machine(4, dict.fromkeys(range(1, 9), 1.0))
    count = machine.count(most=8)
    assert count.count == 4
    machine.processors = 2
    assert machine.run(count, threads.LOOK + 0.1) == [4, 2]
    machine.processors = 64  # never more than asked for
    assert machine.run(count, threads.LOOK + 0.1) == [2, 8]
    machine.processors = 1
    assert machine.run(count, threads.LOOK + 0.1) == [8, 1]
    said = ["computing with 2 threads, 4 before", "computing with 8 threads, 2 before"]
    assert caplog.messages == [*said, "computing with 1 thread, 8 before"]


def test_fewer_threads_stay_where_they_are_faster() -> None:
    machine = Machine(2, {2: 2.2, 1: 1.8}, share=0.5)
    count = machine.count()
    assert machine.run(count, 600) == [2, 1]


def test_fewer_threads_go_where_they_are_slower() -> None:
    machine = Machine(2, {2: 2.0, 1: 3.0}, share=0.5)
    count = machine.count()
    assert machine.run(count, threads.WINDOW + 1) == [2, 1]
    assert machine.run(count, threads.WINDOW + 1) == [1, 2]
    # Trials become rare: 120, 240, 480, 960, 960 ... seconds apart.
    assert machine.run(count, 3600).count(1) == 5


def test_threads_come_back_when_the_time_does() -> None:
    machine = Machine(2, {2: 2.2, 1: 1.8}, share=0.5)
    count = machine.count()
    assert machine.run(count, 20)[-1] == 1
    machine.share, machine.costs = 0.0, {2: 1.0, 1: 1.8}
    assert machine.run(count, threads.WAIT + 2 * threads.WINDOW + 3) == [1, 2]
    assert machine.run(count, 600) == [2]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2])
def test_a_little_stolen_time_changes_nothing(share: float) -> None:
    machine = Machine(2, {2: 1.0, 1: 1.0}, share=share)
    assert machine.run(machine.count(), 600) == [2]


def test_a_new_limit_ends_a_trial() -> None:
    machine = Machine(4, {4: 1.0, 2: 1.0, 1: 1.0}, share=0.5)
    count = machine.count()
    assert machine.run(count, threads.WINDOW + 1) == [4, 2]
    machine.processors, machine.share = 1, 0.0
    assert machine.run(count, 60) == [2, 1]


def test_the_engine_computes_with_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a number of its own from the environment; a limit that changes between steps changes no token."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert tiny_core().threads is None
    monkeypatch.delenv("OMP_NUM_THREADS")
    try:
        torch.set_num_threads(3)
        core, machine = tiny_core(), Machine(3, dict.fromkeys((1, 2, 3), 1.0))
        assert core.threads is not None and core.threads.count <= 3
        expected = core.generate(prompts(3), greedy(12))
        core.threads = machine.count()
        for request in (core.new_request(prompt, greedy(12), nonce=0) for prompt in prompts(3)):
            core.batcher.add(request)
        made: dict[int, list[int]] = {}
        seen = set()
        while core.loop.has_work:
            for output in core.loop.step():
                made.setdefault(output.request.prompt_length, []).extend(output.tokens)
            machine.now += threads.LOOK + 0.1
            machine.processors = 1 + machine.processors % 3
            core.follow_processors()
            seen.add(torch.get_num_threads())
        assert seen == {1, 2, 3}
        assert sorted(made.values()) == sorted(expected)
    finally:
        torch.set_num_threads(before)


def test_torch_keeps_one_thread_where_the_kernels_multiply() -> None:
    """An engine that is loaded after another computes with as many threads, though torch has one."""
    before, kernels = torch.get_num_threads(), ReferenceKernels()
    try:
        torch.set_num_threads(3)
        assert threads_in_use() == 3
        use_threads(3, kernels, products=True)
        assert (torch.get_num_threads(), kernels.threads, threads_in_use()) == (1, 3, 3)
        use_threads(2, kernels, products=False)
        assert (torch.get_num_threads(), kernels.threads, threads_in_use()) == (2, 2, 2)
        torch.set_num_threads(4)
        assert threads_in_use() == 4
    finally:
        torch.set_num_threads(before)
