"""The thread team under the native kernels: many threads, several callers, children, and little time spent waiting."""

import os
import threading
import time
from collections.abc import Iterator

import dspark_kernels
import numpy as np
import pytest
import torch
from dspark_kernels import Kernels
from torch import Tensor

ROWS, FEATURES = 96, 512
THREADS = 7  # more than most machines of a test have processors


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield dspark_kernels.load("native")
    torch.set_num_threads(before)


def work(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, 2 * FEATURES, generator=generator), torch.randn(64, 8000, generator=generator)


def results(kernels: Kernels, gate_up: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.silu_mul(gate_up), kernels.argmax(logits)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    # By numpy: torch's own threads, which torch.equal may use, do not survive in a child.
    return all(np.array_equal(x.numpy(), y.numpy()) for x, y in zip(a, b, strict=True))


def test_many_threads_give_what_one_gives(kernels: Kernels) -> None:
    given = work(0)
    torch.set_num_threads(1)
    alone = results(kernels, *given)
    for count in (2, 3, THREADS, 2, THREADS):
        torch.set_num_threads(count)
        assert all(same(results(kernels, *given), alone) for _ in range(100))


def test_several_callers_at_once(kernels: Kernels) -> None:
    """One has the team, the others work alone meanwhile; nobody gets another's numbers."""
    wrong: list[int] = []

    def call(seed: int) -> None:
        torch.set_num_threads(THREADS)
        given = work(seed)
        expected = results(kernels, *given)
        wrong.extend(seed for _ in range(200) if not same(results(kernels, *given), expected))

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_child_has_a_team_of_its_own(kernels: Kernels) -> None:
    given = work(1)
    expected = results(kernels, *given)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if all(same(results(kernels, *given), expected) for _ in range(20)) else 1
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert same(results(kernels, *given), expected)


def test_threads_that_wait_sleep(kernels: Kernels) -> None:
    """Processor time of this process, all threads: a neighbour's time does not count, and it must not matter."""
    given = work(2)
    results(kernels, *given)
    used = 0.0
    for _ in range(20):
        results(kernels, *given)
        before = time.process_time()
        time.sleep(0.02)
        used += time.process_time() - before
    # Six waiting threads spin 50 us each time; had they spun all the time, it would be 0.4 s on one processor.
    assert used < 0.1
