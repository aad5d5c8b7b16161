"""Service that starts with wrong costs, or whose machine changes: within a minute as fast as with the right ones.

The production batcher, step loop and selection, on the virtual clock. Passes take 30 to 500 ms: on a slow machine a
minute has few steps to learn from.
"""

from dataclasses import replace
from functools import cache

import pytest

from dspark_server.evaluation.roofline import Machine
from dspark_server.evaluation.simulation import Simulation, Workload
from dspark_server.speculation.cost_model import CostModel, Profile

# As measured on two CPU cores for SmolLM2-135M-Instruct (docs/experiments.md), for a model four times as large.
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
VERIFY = (8.0, 8.2, 8.4, 8.7, 9.2, 9.8, 11.0, 12.5, 16.0, 20.0, 29.0, 38.0, 56.0, 75.0, 115.0, 160.0)
REQUESTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
DRAFT = (1.4, 1.7, 2.0, 2.4, 3.2, 4.0, 5.8, 7.6, 11.4, 15.2, 22.8, 30.4)
RIGHT = Profile(TOKENS, tuple(4e-3 * ms for ms in VERIFY), REQUESTS, tuple(4e-3 * ms for ms in DRAFT), 4e-8, 4e-9)
WORKLOAD = Workload(max_batched_tokens=256)
MINUTE = 60.0
WINDOW = {1: 40.0, 8: 25.0, 32: 15.0}  # seconds in which throughput is measured


def times(factor: float, *, verify: bool = True, draft: bool = True, above: int = 0, of: Profile = RIGHT) -> Profile:
    """`of` with passes of more than `above` tokens, drafts, or both `factor` times as dear."""
    passes = tuple(s * (factor if verify and size > above else 1) for size, s in zip(of.tokens, of.verify, strict=True))
    reading = factor if verify and not above else 1.0
    return replace(
        of,
        verify=passes,
        draft=tuple(s * (factor if draft else 1) for s in of.draft),
        run_context=of.run_context * reading,
        query_context=of.query_context * reading,
    )


def simulation(users: int, right: Profile, believed: Profile) -> Simulation:
    machine = Machine("two cores", 7, 100_000, 4e-3, right, right.draft, {})
    made = Simulation(machine, "causal", users, replace(WORKLOAD, seed=users), believed)
    made.executor.jitter = 0.1  # as measured on machines that do little else
    return made


@cache
def throughput_with_the_right_profile(users: int, right: Profile = RIGHT) -> float:
    """With requests whose acceptance is known: nothing else is to be learnt."""
    served = simulation(users, right, right)
    while served.loop.stats.steps < 200 and served.clock.now < MINUTE:
        served.serve(1.0)
    return served.serve(WINDOW[users])


# Profiles, and the numbers of users that start with them: more of these where the error feeds itself, as drafts and
# large passes are chosen because they look cheap.
WRONG = {
    "all too dear": (times(8), (1, 32)),
    "all too cheap": (times(1 / 8), (1, 32)),
    "drafts too dear": (times(8, verify=False), (8,)),
    "drafts too cheap": (times(1 / 8, verify=False), (8, 32)),
    "passes too dear": (times(8, draft=False), (8,)),
    "passes above 1 token too dear": (times(8, draft=False, above=1), (1,)),
    "passes above 8 tokens too dear": (times(8, draft=False, above=8), (8,)),
    "passes above 32 tokens too dear": (times(8, draft=False, above=32), (32,)),
    "passes above 8 tokens too cheap": (times(1 / 8, draft=False, above=8), (8, 32)),
    "passes above 24 tokens too cheap": (times(1 / 8, draft=False, above=24), (8, 32)),
    "passes above 48 tokens too cheap": (times(1 / 8, draft=False, above=48), (8, 32)),
}


@pytest.mark.parametrize(("wrong", "users"), [(wrong, users) for wrong, (_, loads) in WRONG.items() for users in loads])
def test_a_wrong_profile_costs_a_minute_at_most(wrong: str, users: int) -> None:
    served = simulation(users, RIGHT, WRONG[wrong][0])
    served.serve(MINUTE)
    assert served.serve(WINDOW[users]) > 0.95 * throughput_with_the_right_profile(users)


@pytest.mark.parametrize(
    ("factor", "drafts", "users"), [(8.0, 2.0, 8), (8.0, 0.5, 32), (1 / 8, 2.0, 32), (1 / 8, 0.5, 8), (1 / 8, 0.5, 32)]
)
def test_a_machine_that_changes_in_service(factor: float, drafts: float, users: int) -> None:
    """Drafts become dearer or cheaper than passes at that: a neighbour on the drafter's caches, say."""
    before, after = (RIGHT, times(8)) if factor > 1 else (times(8), RIGHT)
    changed = times(drafts, verify=False, of=after)
    served = simulation(users, before, before)
    served.serve(20.0)
    steps = served.loop.stats.steps
    served.executor.cost_model = CostModel(changed, 256, 2048)
    served.serve(MINUTE)
    assert served.serve(WINDOW[users]) > 0.95 * throughput_with_the_right_profile(users, changed)
    assert served.loop.stats.steps > steps
    assert served.loop.cost_model is not None
    assert served.loop.cost_model.slow == (factor > 1)
    assert served.loop.cost_model.slowdown == pytest.approx(factor, rel=0.2)
