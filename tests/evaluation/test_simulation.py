"""The simulator: production scheduling on a virtual clock, held to the shape of the paper's figures 7 and 8."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dspark_server.engine.batcher
import dspark_server.engine.step
import dspark_server.speculation.selection as selection
from dspark_server.config import EngineConfig
from dspark_server.engine.simulate import DOMAINS, PAPER_BLOCK, PAPER_TAU, SurvivalModel
from dspark_server.errors import ConfigError
from dspark_server.evaluation.deepseek import FLASH, PRO, Geometry
from dspark_server.evaluation.machines import FLASH_PAIR, MACHINES, derive
from dspark_server.evaluation.memory import need
from dspark_server.evaluation.roofline import EIGHT_H200, H100, QWEN3_8B, Machine
from dspark_server.evaluation.simulation import (
    LOAD_AWARE,
    SYSTEMS,
    Point,
    Simulation,
    Workload,
    at_matched_throughput,
    sweep,
)
from dspark_server.evaluation.stairs import stepped
from dspark_server.models.deepseek_v4 import DEEPSEEK_V4
from loadtest import simulate as command
from loadtest import stairs

from ..deploy.checkpoints import DEEPSEEK, headers

PROFILES = Path(__file__).parents[2] / "configs/profiles"
MOE = "deepseek-v4-flash-8xh200"
USERS = (16, 64, 256, 512, 1000)  # 512 times a block of 6 is where this machine's passes begin to cost more
SHORT = Workload(output_tokens=48, requests=12)


@pytest.fixture(scope="module")
def points() -> dict[str, list[Point]]:
    """A small sweep of the MoE, by policy."""
    made = sweep(derive(MOE), ["none", "mtp-1", "static-2", "causal"], USERS, SHORT)
    return {policy: [point for point in made if point.policy == policy] for policy in SYSTEMS}


def test_batcher_loop_and_selection_are_those_that_serve() -> None:
    classes = {
        "none": selection.Off,
        "mtp-1": selection.Fixed,
        "static-2": selection.Fixed,
        "fixed": selection.Fixed,
        "threshold": selection.Threshold,
        "causal": selection.Causal,
        "lagged": selection.Lagged,
    }
    assert set(classes) == set(SYSTEMS)
    for policy, kind in classes.items():
        built = Simulation(derive(MOE), policy, 2, SHORT)
        assert type(built.batcher) is dspark_server.engine.batcher.Batcher
        assert type(built.loop) is dspark_server.engine.step.StepLoop
        assert type(built.selection) is kind
        assert built.loop.batcher is built.batcher
        # What selection believes is corrected by what it sees; what passes cost is not.
        assert (built.loop.cost_model is not None) == (policy in LOAD_AWARE)
        assert built.loop.cost_model is not built.executor.cost_model


@pytest.mark.parametrize("policy", SYSTEMS)
@pytest.mark.parametrize("shared", [0, 32])
def test_every_request_ends_and_no_block_is_lost(policy: str, shared: int) -> None:
    workload = Workload(prompt_tokens=40, shared_tokens=shared, output_tokens=24, requests=20, max_batched_tokens=128)
    fields = vars(derive(MOE)) | {"kv_tokens": 512}  # 12 users do not fit: some wait, some are preempted
    simulation = Simulation(Machine(**fields), policy, 12, workload)
    point = simulation.run(drain=True)
    assert point.finished == 12 + 20
    assert simulation.loop.stats.generation_tokens >= 20 * 24
    assert not simulation.loop.has_work
    assert simulation.batcher.pool.usage == 0.0
    simulation.batcher.check()


def test_the_same_seed_gives_the_same_figures() -> None:
    def run(seed: int) -> Point:
        return Simulation(derive(MOE), "causal", 24, Workload(output_tokens=32, seed=seed)).run()

    assert run(3) == run(3)
    assert run(3).throughput != run(4).throughput


@pytest.mark.parametrize("drafter", PAPER_TAU)
@pytest.mark.parametrize("domain", DOMAINS)
def test_acceptance_is_the_papers(drafter: str, domain: str) -> None:
    assert SurvivalModel.of(domain, drafter).tau(PAPER_BLOCK) == pytest.approx(PAPER_TAU[drafter][domain], abs=0.01)


def test_served_acceptance_is_the_models() -> None:
    machine = derive("qwen3-8b-h100")
    point = Simulation(machine, "fixed", 64, Workload(requests=200)).run()
    # A last token is never drafted, so the ends of answers are short of a block.
    assert point.committed == pytest.approx(PAPER_TAU["dspark"]["code"], rel=0.1)


def test_budgets_fall_smoothly_with_load(points: dict[str, list[Point]]) -> None:
    few, *budgets = [point.budget for point in points["causal"]]
    assert budgets == sorted(budgets, reverse=True)
    assert 4 <= budgets[0] <= 6  # figure 8 at moderate load
    assert budgets[-1] < budgets[-2] < budgets[0] - 0.3
    assert budgets[-1] < budgets[0] - 1.5
    assert (
        4 <= few <= budgets[0]
    )  # at 16 users each token still needs experts that no other does: it is dearer than later


def test_causal_is_never_below_one_token_drafted_or_none(points: dict[str, list[Point]]) -> None:
    for baseline in ("static-2", "none"):
        for ours, other in zip(points["causal"], points[baseline], strict=True):
            assert ours.throughput > 0.97 * other.throughput, (baseline, ours.concurrency)


def test_a_dense_model_too() -> None:
    """Where a block's draft costs more than a token's verification, drafting ends before the load does."""
    few, many = 32, 384
    made = sweep(derive("qwen3-8b-h100"), ["none", "static-2", "causal"], [few, many], SHORT)
    at = {(point.policy, point.concurrency): point for point in made}
    for users in (few, many):
        best = max(at["none", users].throughput, at["static-2", users].throughput)
        assert at["causal", users].throughput > 0.95 * best
    assert at["causal", few].budget > 6
    assert at["causal", many].budget < 3


def test_users_are_faster_at_the_same_throughput(points: dict[str, list[Point]]) -> None:
    """Figure 7's ordering: DSpark above MTP-1 above plain decoding."""
    for above, below in (("causal", "mtp-1"), ("mtp-1", "none")):
        # Above, the one rank that drafts is the bottleneck: docs/simulation.md.
        few = [point for point in points[below] if point.concurrency <= 256]
        ratios = [ratio for _, ratio in at_matched_throughput(points[above], few)]
        assert ratios
        assert min(ratios) > 1.2


def test_the_roofline_is_what_the_design_says() -> None:
    assert QWEN3_8B.target.seconds(1, H100) == pytest.approx(4.9e-3, rel=0.01)
    assert QWEN3_8B.target.seconds(295, H100) == QWEN3_8B.target.seconds(1, H100)
    assert QWEN3_8B.target.seconds(310, H100) > 1.04 * QWEN3_8B.target.seconds(1, H100)
    few, many = FLASH_PAIR.target.touched(1), FLASH_PAIR.target.touched(1000)
    assert few == pytest.approx(6)
    assert many == pytest.approx(256)
    assert FLASH_PAIR.target.stored_bytes(EIGHT_H200.count) < 0.9 * EIGHT_H200.memory


DEEPSEEK_SIZES = [  # design notes, 2.5, 2.6 and 2.8: bytes and parameters in 1e9, and FLOPs; a token's bytes of context
    (FLASH, "deepseek-ai/DeepSeek-V4-Flash-0731", 8, 166.9, 284, 13, 10.9, 19.8, 0.9, 6.9e3),
    (PRO, "deepseek-ai/DeepSeek-V4-Pro-0813", 16, 892.7, 1600, 49, None, 77, 2.3, 9.8e3),
]


@pytest.mark.parametrize(
    ("geometry", "model", "ranks", "stored", "parameters", "active", "stages", "drafter", "drafting", "token"),
    DEEPSEEK_SIZES,
)
def test_the_geometry_of_deepseek_is_the_releases(
    geometry: Geometry,
    model: str,
    ranks: int,
    stored: float,
    parameters: float,
    active: float,
    stages: float | None,
    drafter: float,
    drafting: float,
    token: float,
) -> None:
    pair, embedding = geometry.pair(192), geometry.head
    experts = pair.target.layers * pair.target.experts * geometry.expert.count
    whole = pair.target.dense + pair.target.copied + experts + embedding.count
    assert whole / 1e9 == pytest.approx(parameters, rel=0.03)
    assert pair.target.token_flops() / 2e9 == pytest.approx(active, rel=0.03)
    own = pair.draft.dense - embedding.count  # without the target's head
    markov = 2 * 2 * pair.sequential_bytes / 4
    assert (own + 3 * geometry.experts * geometry.expert.count + markov / 2) / 1e9 == pytest.approx(drafter, rel=0.02)
    slot = own - 3 * geometry.width**2 + 3 * 6 * geometry.expert.count  # what projects the taps runs once a token
    assert slot / 1e9 == pytest.approx(drafting, abs=0.05)
    drafts = pair.draft.stored_bytes() - embedding.bytes + markov
    if stages:
        assert drafts / 1e9 == pytest.approx(stages, rel=0.01)
    everything = pair.target.stored_bytes() + drafts + embedding.bytes
    assert everything / 1e9 == pytest.approx(stored, rel=0.002)
    # Far on, a token of context adds an entry and a key for 4 tokens, an entry for 128.
    kept = geometry.indexed * (1024 + 256) / 4 + geometry.heavy * 1024 / 128
    assert kept == pytest.approx(token, rel=0.02)
    # A rank's share, as the server divides weights, and the blocks of a short request.
    config = EngineConfig(model, tensor_parallel_size=ranks, max_model_len=1 << 17, max_num_batched_tokens=8192)
    config = replace(config, block_size=128)
    held = need(headers(model), DEEPSEEK[model], DEEPSEEK_V4, config, rank=1)
    shared = held.weights.packed.total() - held.weights.packed["rotary tables"] - embedding.bytes
    assert pair.target.stored_bytes(ranks) == pytest.approx(shared, rel=0.005)
    leading = need(headers(model), DEEPSEEK[model], DEEPSEEK_V4, config, rank=0)
    assert leading.request_blocks(257) * leading.block_bytes == pytest.approx(geometry.request_bytes, rel=0.01)
    # 2.8: attention over a whole window and all chosen entries, and the indexer, at 128 k tokens of context.
    if geometry is FLASH:
        assert geometry.attention_flops(1 << 17) / 1e6 >= 84 * geometry.indexed
        assert geometry.index_flops(1 << 17) / 1e9 == pytest.approx(11, rel=0.05)


@pytest.mark.parametrize("name", MACHINES)
def test_profiles_are_what_the_roofline_derives(name: str) -> None:
    assert vars(Machine.load(PROFILES / f"{name}.json")) == vars(derive(name))


def test_passes_are_priced_as_they_run() -> None:
    """On passes recorded at powers of two: near the best there is, and far above a policy that knows no stairs."""
    truth = stepped(derive("qwen3-8b-h100"), [1 << power for power in range(10)], eager=2e-3)
    assert truth.costs.tokens[9:11] == (512, 513)
    assert truth.costs.verify[10] > truth.costs.verify[9] + 2e-3
    made = {
        name: stairs.point(truth, name, 64, Workload(output_tokens=48, requests=64)).throughput
        for name in ("smooth", "causal", "oracle")
    }
    assert made["causal"] > 1.2 * made["smooth"]
    assert made["causal"] > 0.9 * made["oracle"]


def test_the_command_of_stairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, profile = tmp_path / "points.json", str(PROFILES / "qwen3-8b-h100.json")
    assert stairs.main(["--profile", profile, "--users", "2", "--recorded", "1,2,4,8,16", "--out", str(out)]) == 0
    assert "5 recorded sizes to 16" in capsys.readouterr().out
    assert {row["system"] for row in json.loads(out.read_text())} == set(stairs.SYSTEMS)
    assert stairs.main(["--profile", str(tmp_path / "none.json")]) == 2


def test_the_command_writes_tables_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--concurrency", "2,8", "--policies", "static-2,causal", "--output-tokens", "16", "--requests", "8"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "static-2" in capsys.readouterr().out
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"points.json", "points.csv", "figure7.png", "figure8.png"}


def test_user_errors_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.json").write_text("{}")
    assert command.main(["--profile", str(tmp_path / "broken.json")]) == 2
    assert "not a machine profile" in capsys.readouterr().err
    for wrong in ({"domain": "poems"}, {"drafter": "guess"}):
        settings: dict[str, Any] = wrong
        with pytest.raises(ConfigError, match="No acceptance is known"):
            Simulation(derive(MOE), "causal", 1, Workload(**settings))
    with pytest.raises(ConfigError, match="not known"):
        Simulation(derive(MOE), "psychic", 1, SHORT)
    with pytest.raises(ConfigError, match="not shared"):
        Workload(prompt_tokens=8, shared_tokens=8)
