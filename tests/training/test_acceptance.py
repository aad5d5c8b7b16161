"""What a trained drafter is worth in the engine is what its laws say: a draft stands with chance 1 - TV."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.request import SamplingParams
from dspark_server.engine.trace import StepTrace
from dspark_server.training.config import TrainConfig
from dspark_server.training.train import train
from tests.training.test_train import TARGET, fresh_cache

PROMPTS = [[5 + i, 6, 7, 8, 9] for i in range(32)]
PARAMS = SamplingParams(max_tokens=120, temperature=1.0, ignore_eos=True)


@pytest.fixture(scope="module")
def answers() -> list[list[int]]:
    """The target's own, to train on."""
    without = EngineConfig(model=str(TARGET), num_blocks=600, speculative=SpeculativeConfig(method="none"))
    return EngineCore.load(without).generate(PROMPTS, PARAMS)


@pytest.mark.parametrize("vocabulary", [None, 384])
def test_measured_acceptance_is_one_minus_tv(
    vocabulary: int | None, answers: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over thousands of judged slots: the sum of (stood - chance) against its standard deviation."""
    fresh_cache(tmp_path / "cache", monkeypatch)
    np.savez(
        tmp_path / "corpus.npz",
        tokens=np.concatenate([np.array(p + a) for p, a in zip(PROMPTS, answers, strict=True)]).astype(np.uint16),
        length=np.full(32, 125, np.int32),
        prompt_length=np.full(32, 5, np.int32),
    )
    run = TrainConfig(
        corpus=str(tmp_path / "corpus.npz"),
        output=str(tmp_path / "out"),
        model=str(TARGET),
        mask_token_id=511,
        target_layer_ids=(1, 3, 4),
        markov_rank=8,
        vocabulary=vocabulary,
        sequences_per_step=2,
        anchors_per_sequence=20,
        held_out=2,
        steps=60,
        eval_every=60,
        save_every=60,
    )
    directory = train(run)

    chances: list[float] = []
    stood: list[bool] = []

    def look(step: StepTrace) -> None:
        block = step.block
        if block is None:
            return
        assert block.q is not None
        for index, start, count in zip(
            step.verified.rows, step.verified.row_start, step.accepted.count.tolist(), strict=False
        ):
            if index < 0:
                continue
            for slot in range(min(count + 1, block.lengths[index])):
                p = step.verified.logits[start + slot].double().softmax(0)
                q = block.q[index, slot].double()
                chances.append(
                    float(torch.minimum(p if block.columns is None else p[block.columns[index, slot]], q).sum())
                )
                stood.append(slot < count)

    speculative = SpeculativeConfig(method="dspark", model=str(directory), selection="fixed", acceptance="ratio")
    core = EngineCore.load(EngineConfig(model=str(TARGET), num_blocks=600, speculative=speculative), trace=look)
    core.generate(PROMPTS, PARAMS)
    chance, survived = np.array(chances), np.array(stood)
    assert len(chance) > 3000
    assert 0.02 < chance.mean() < 0.98
    deviation = np.sqrt((chance * (1 - chance)).sum())
    assert abs((survived - chance).sum()) < 5 * deviation
