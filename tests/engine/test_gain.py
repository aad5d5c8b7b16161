"""The estimated gain of drafting, against steps whose times are known."""

import time

import pytest

from dspark_server.engine import gain
from dspark_server.engine.gain import WINDOW, Gain, StepTime, seconds_without_drafts
from dspark_server.evaluation.machines import derive
from dspark_server.evaluation.simulation import Simulation, Workload
from dspark_server.speculation.cost_model import CostModel, Profile
from dspark_server.speculation.prefix_scheduler import Load
from tests.dashboard.support import core
from tests.engine.support import greedy, prompts


def cost_model(*, run_context: float = 0.0, query_context: float = 0.0) -> CostModel:
    """10 ms for one token, 1 ms for each further one."""
    profile = Profile((1, 101), (0.010, 0.110), (1, 4), (0.002, 0.003), run_context, query_context)
    return CostModel(profile, 101, 4)


def test_one_request_whose_three_tokens_took_one_step_instead_of_three() -> None:
    load = Load(sampling=1, tokens=1, room=100)
    took = StepTime(draft=0.002, verify=0.014, host=0.001)
    without = seconds_without_drafts(cost_model(), load, drafts=4, committed=3, took=took)
    assert without == pytest.approx(3 * (0.010 + 0.001))
    assert without / took.total == pytest.approx(33 / 17)


def test_a_slow_machine_is_slow_with_and_without_drafts() -> None:
    load = Load(sampling=2, tokens=2, room=100)
    quick, slow = (StepTime(n * 0.002, n * 0.017, n * 0.001) for n in (1, 5))
    gains = [seconds_without_drafts(cost_model(), load, 6, 5, took) / took.total for took in (quick, slow)]
    assert gains[0] == pytest.approx(gains[1])


def test_a_step_without_drafts_gains_nothing() -> None:
    took = StepTime(0.0, 0.013, 0.002)
    assert seconds_without_drafts(cost_model(), Load(3, 3, 100), 0, 3, took) == pytest.approx(took.total)


def test_what_drafts_add_to_the_host_is_not_there_without_them() -> None:
    costs = cost_model()
    for requests in (0, 1, 1, 1, 1, 1, 1) * 20:
        costs.observe(
            tokens=1, context=0.0, pairs=0.0, verify=0.010, requests=requests, draft=0.002 * requests,
            overhead=0.001 + 0.003 * requests,
        )  # fmt: skip
    took = StepTime(draft=0.002, verify=0.010, host=0.004)
    without = seconds_without_drafts(costs, Load(1, 1, 100), drafts=0, committed=1, took=took, drafting=1)
    assert without == pytest.approx(0.010 + 0.001, rel=0.01)


def test_a_draft_that_is_rejected_is_a_loss() -> None:
    took = StepTime(0.002, 0.014, 0.001)
    assert seconds_without_drafts(cost_model(), Load(1, 1, 100), 4, 1, took) == pytest.approx(0.011)


def test_prompt_tokens_are_computed_once_either_way() -> None:
    load = Load(sampling=1, tokens=51, room=50)
    took = StepTime(0.002, 0.064, 0.001)
    assert seconds_without_drafts(cost_model(), load, 4, 3, took) == pytest.approx(0.050 + 3 * (0.010 + 0.001))


def test_a_step_of_prompts_alone_gains_nothing() -> None:
    took = StepTime(0.0, 0.060, 0.001)
    assert seconds_without_drafts(cost_model(), Load(0, 51, 50), 0, 0, took) == pytest.approx(took.total)


def test_attention_of_the_drafts_is_part_of_their_cost() -> None:
    costs = cost_model(run_context=1e-6, query_context=2e-6)
    load = Load(sampling=1, tokens=1, room=100, context=1000, pairs=1000, per_draft=1000)
    took = StepTime(0.0, 0.010 + 0.004 + 0.001 + 0.010, 0.0)  # table, four drafts, context, five queries
    assert seconds_without_drafts(costs, load, 4, 1, took) == pytest.approx(0.010 + 0.001 + 0.002)


def test_the_window_forgets() -> None:
    made = Gain()
    assert made.ratio is None
    made.observe(0.0, 0.0)
    assert made.ratio is None
    for _ in range(100):
        made.observe(0.1, 0.2)
    assert made.ratio == pytest.approx(2)
    for _ in range(int(WINDOW / 0.1)):
        made.observe(0.1, 0.1)
    assert 1 < made.ratio < 1.3
    for _ in range(int(4 * WINDOW / 0.1)):
        made.observe(0.1, 0.1)
    assert made.ratio == pytest.approx(1, abs=0.01)


def test_an_engine_counts_its_steps() -> None:
    made = core(clock=time.perf_counter)
    made.generate(prompts(2), greedy(24))
    assert made.loop.stats.gain.ratio is not None
    made.select("none")
    made.loop.stats.gain = Gain()
    made.generate(prompts(2), greedy(24))
    assert made.loop.stats.gain.ratio == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("users", [1, 16])
def test_the_estimate_is_the_ratio_of_two_simulated_servers(users: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the virtual clock costs are known exactly, and so is the throughput of the same load without drafts.

    Both servers are measured under a steady load: in the tail of a burst the one without drafts has other batches.
    """
    monkeypatch.setattr(gain, "WINDOW", 1e9)  # the whole load counts
    machine, workload = derive("deepseek-v4-flash-8xh200"), Workload(output_tokens=48)
    drafting, plain = (Simulation(machine, policy, users, workload) for policy in ("causal", "none"))
    drafting.serve(1.0)
    plain.serve(1.0)
    drafting.loop.stats.gain = Gain()
    ratio = drafting.serve(1.0) / plain.serve(1.0)
    assert ratio > 1.5
    assert drafting.loop.stats.gain.ratio == pytest.approx(ratio, rel=0.005)
