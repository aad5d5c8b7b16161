"""DeepSeek-V4 through the engine, with the drafters inside its checkpoints: tokens are those of the target alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.conformance import replay
from dspark_server.engine.core import EngineCore
from dspark_server.errors import CheckpointError, ConfigError
from dspark_server.models.registry import load_config

from ..models.v4 import DSPARK, SHAPE, save_v4
from .support import FIXTURES, SMOLLM2_COSTS, greedy, prompts, seeded, still

TEXTS = [[2 + token % 250 for token in prompt] for prompt in prompts(6, shortest=20, longest=200)]
PARAMS = [greedy(20) if index % 2 else seeded(index, 20) for index in range(len(TEXTS))]
DRAFTERS: dict[str, dict[str, Any]] = {
    "dspark": {"stages": 3, **DSPARK},
    "dspark of two stages": {"stages": 2, "hc_mult": 2, **DSPARK, "dspark_target_layer_ids": [0, 3]},
    "mtp": {"stages": 1},
}


@pytest.mark.parametrize("folder", ["dspark_deepseek_v4", "mtp1_deepseek_v4"])
def test_the_fixtures_are_reproduced(folder: str) -> None:
    report = replay(FIXTURES / folder)
    assert report.passed, (report.mismatches[:3], report.largest)
    assert report.rounds >= 3


def load(directory: Path, drafter: bool = True, selection: str = "fixed", **settings: Any) -> EngineCore:
    speculative = SpeculativeConfig(selection=selection, copying=False) if drafter else SpeculativeConfig("none")
    values: dict[str, Any] = {"num_blocks": 300, "check_invariants": True} | settings
    config = EngineConfig(str(directory), dtype="float32", speculative=speculative, **values)
    return EngineCore.load(config, SMOLLM2_COSTS, clock=still)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def saved(drafter: str) -> Path:
        if drafter not in made:
            made[drafter] = tmp_path_factory.mktemp("v4")
            save_v4(made[drafter], **DRAFTERS[drafter])
        return made[drafter]

    return saved


@pytest.fixture(scope="module")
def alone(checkpoint: Callable[[str], Path]) -> Callable[[str], list[list[int]]]:
    """Answers to each text, by the target alone."""
    known: dict[str, list[list[int]]] = {}

    def answers(drafter: str) -> list[list[int]]:
        if drafter not in known:
            core = load(checkpoint(drafter), drafter=False, enable_prefix_caching=False)
            known[drafter] = [core.generate([t], [p])[0] for t, p in zip(TEXTS, PARAMS, strict=True)]
        return known[drafter]

    return answers


Maker, Answers = Callable[[str], Path], Callable[[str], list[list[int]]]


@pytest.mark.parametrize("selection", ["fixed", "causal"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_tokens_are_those_of_the_target_alone(drafter: str, selection: str, checkpoint: Maker, alone: Answers) -> None:
    """In a busy batch of chunks, with prefix hits at the second time."""
    core = load(checkpoint(drafter), selection=selection, max_num_batched_tokens=40, max_num_seqs=8)
    assert core.drafter == drafter.split()[0]
    assert core.generate(TEXTS, PARAMS) == alone(drafter)
    assert core.loop.stats.draft_tokens > 0
    assert core.loop.stats.failed_drafts == 0
    assert core.generate(TEXTS, PARAMS) == alone(drafter)
    assert core.loop.stats.prefix_hits > 0


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_after_preemption(drafter: str, checkpoint: Maker, alone: Answers) -> None:
    core = load(checkpoint(drafter), num_blocks=36, max_num_batched_tokens=40, max_num_seqs=6)
    assert core.generate(TEXTS, PARAMS) == alone(drafter)
    assert core.loop.stats.preemptions > 0


def test_v41_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_v4(tmp_path, architectures=["DeepseekV41ForCausalLM"])
    with pytest.raises(
        CheckpointError, match=r"DeepseekV41ForCausalLM is not supported: V4.1 compresses by other ratios"
    ):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "mtp"}, "method is mtp, but the drafter in .* is of method dspark"),
        ({"num_speculative_tokens": 7}, "num_speculative_tokens is 7, but the drafter was trained for blocks of 5"),
    ],
)
def test_settings_that_its_drafter_cannot_follow(settings: dict[str, Any], message: str, checkpoint: Maker) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineCore.load(
            EngineConfig(str(checkpoint("dspark")), dtype="float32", speculative=SpeculativeConfig(**settings))
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dspark_target_layer_ids": [1, 9]}, r"dspark_target_layer_ids \[1, 9\] must be layers of this model"),
        ({"dspark_noise_token_id": 256}, "dspark_noise_token_id 256 is outside the embedding"),
        ({"compress_ratios": SHAPE["compress_ratios"]}, "dspark_block_size without stages"),
    ],
)
def test_stages_that_do_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_v4(tmp_path, stages=0 if "compress_ratios" in changes else 3, **(DSPARK | changes))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
