"""eval and calibrate through the real engine on the fixture pair: what they count is what the engine did."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dspark_server.cli import app
from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.request import SamplingParams
from dspark_server.errors import ConfigError
from dspark_server.evaluation import compare, evaluate
from dspark_server.evaluation.calibrate import CalibrateConfig, Scaling, calibrate, predicted
from dspark_server.evaluation.collect import Collected, collect, read_prompts
from dspark_server.evaluation.evaluate import THRESHOLDS, summary
from dspark_server.evaluation.measures import judged
from dspark_server.evaluation.plots import plot_evaluation
from dspark_server.speculation.calibration import Calibration
from dspark_server.training.curve import plot_training
from tests.api.fake_engine import build_tokenizer

PAIR = Path(__file__).parent.parent / "fixtures" / "dspark_qwen3_vanilla"
TARGET, DRAFT = PAIR / "target", PAIR / "draft"
DRAFTED = 7  # the fixture drafter's block size


def run(temperature: float, count: int = 6, tokens: int = 40, drafter: Path = DRAFT, top_k: int = 0) -> Collected:
    return collect(
        [[5 + i, 6, 7, 8] for i in range(count)],
        [SamplingParams(max_tokens=tokens, temperature=temperature, top_k=top_k, ignore_eos=True)] * count,
        model=str(TARGET),
        speculative=SpeculativeConfig(method="dspark", model=str(drafter), selection="fixed"),
        concurrency=4,
        groups=[i % 2 for i in range(count)],
        kv_cache_memory_bytes=8 << 20,
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_blocks_account_for_the_tokens_that_were_made(temperature: float) -> None:
    done = run(temperature)
    assert done.tokens == 6 * 40
    blocks = done.blocks
    # All tokens but the first of each request and those of the blocks cut short near the end.
    assert 6 * (40 - 1 - 8) <= blocks.committed.sum() <= 6 * 39
    assert (blocks.judged == np.where(blocks.alone, blocks.gamma, DRAFTED)).all()
    # The tiny model is greedy in circles: many of its blocks are copies, and those of sampled requests never are.
    assert blocks.alone.any() == (temperature == 0)
    assert (blocks.match[blocks.alone] > 0).all()
    assert np.isnan(blocks.repeated[blocks.match == 0]).all()
    assert (blocks.committed == blocks.accepted + 1).all()
    assert set(blocks.group.tolist()) == {0, 1}
    result = summary(blocks, ["even", "odd"])
    assert result["macro_tau"] == pytest.approx(np.mean([result["domains"][d]["tau"] for d in ("even", "odd")]))
    assert len(result["ece"]) == len(result["per_position"]) == blocks.gamma
    assert len(result["threshold_sweep"]) == len(THRESHOLDS)


def test_without_a_drafter_there_are_tokens_and_no_blocks() -> None:
    params = [SamplingParams(max_tokens=10, ignore_eos=True)]
    done = collect(
        [[5, 6, 7]], params, model=str(TARGET), speculative=SpeculativeConfig(), kv_cache_memory_bytes=8 << 20
    )
    assert (done.tokens, len(done.blocks.accepted)) == (10, 0)


def test_the_tokenizers_end_token_ends_answers(tmp_path: Path) -> None:
    """A fine-tune whose own end token is neither in config.json nor in generation_config.json."""
    target = tmp_path / "target"
    shutil.copytree(TARGET, target)

    def answer_length() -> int:
        return collect(
            [[5, 6, 7]],
            [SamplingParams(max_tokens=10, temperature=0.0)],
            model=str(target),
            speculative=SpeculativeConfig(method="dspark", model=str(DRAFT), selection="fixed"),
            kv_cache_memory_bytes=8 << 20,
        ).tokens

    assert answer_length() == 10
    core = EngineCore.load(EngineConfig(model=str(target), num_blocks=64, speculative=SpeculativeConfig(method="none")))
    (output,) = core.generate([[5, 6, 7]], SamplingParams(max_tokens=10, temperature=0.0))
    tokenizer = build_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(output[2])
    tokenizer.save_pretrained(target)
    assert answer_length() == output.index(output[2]) + 1 < 10


@pytest.mark.parametrize("copying", [True, False])
def test_eval_lets_drafts_copy_or_not(tmp_path: Path, copying: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model is greedy in circles, which are copied in blocks longer than the drafter's."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "to be or not to be", "domain": "play"}\n')
    monkeypatch.setattr(evaluate, "chat_tokens", lambda *_, **__: [[5, 6, 7, 8]])
    flag = "--copying" if copying else "--no-copying"
    options = [*("--model", TARGET), *("--drafter", DRAFT), *("--prompts", prompts), *("--max-tokens", 60)]
    done = CliRunner().invoke(app, ["eval", *map(str, options), flag, "--no-baseline", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["macro_tau"] >= 1
    assert (len(result["per_position"]) > DRAFTED) == copying


def test_a_drafter_without_a_confidence_head_has_no_calibration_of_one(tmp_path: Path) -> None:
    config = json.loads((DRAFT / "config.json").read_text())
    config |= {"enable_confidence_head": False, "confidence_head_with_markov": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(DRAFT / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("confidence_head.")}
    save_file(kept, tmp_path / "model.safetensors")
    result = summary(run(1.0, drafter=tmp_path).blocks, ["even", "odd"])
    assert np.isfinite([result["macro_tau"], *result["ece"][:DRAFTED]]).all()
    assert np.isnan(result["ece_uncalibrated"]).all()


def test_plots_are_written(tmp_path: Path) -> None:
    blocks = run(1.0).blocks
    plot_evaluation(blocks, ["even", "odd"], summary(blocks, ["even", "odd"]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"positions.png", "thresholds.png", "reliability.png"}
    log = tmp_path / "log.csv"
    log.write_text("positions,loss,held_out_tau,held_out_greedy_tau\n1000,2.5,1.2,1.1\n2000,2.2,1.3,1.2\n")
    plot_training(log, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_evaluations_are_compared_in_a_figure(tmp_path: Path) -> None:
    files = []
    for temperature in (0, 1):
        evaluation = {"temperature": temperature, "macro_tau": 1.5, "per_position": [0.5, 0.4, None]}
        files.append(tmp_path / f"{temperature}.json")
        files[-1].write_text(json.dumps(evaluation))
    compare.main([str(tmp_path / "one.png"), f"DSpark={files[0]}"])
    compare.main([str(tmp_path / "both.png"), f"DSpark={files[0]}", f"DSpark={files[1]}", f"DFlash={files[1]}"])
    one, both = (imread(tmp_path / name) for name in ("one.png", "both.png"))
    assert both.shape[1] == 2 * one.shape[1]  # a panel for each temperature
    with pytest.raises(SystemExit, match="usage"):
        compare.main([str(tmp_path / "none.png")])


def test_calibrate_stores_what_the_engine_then_uses(tmp_path: Path) -> None:
    drafter = tmp_path / "draft"
    drafter.mkdir()
    for name in ("config.json", "model.safetensors"):
        (drafter / name).symlink_to(DRAFT / name)
    noise = np.random.default_rng(3)
    np.savez(
        tmp_path / "corpus.npz",
        tokens=noise.integers(0, 500, 400).astype(np.uint16),
        length=np.full(20, 20, np.int32),
        prompt_length=np.full(20, 6, np.int32),
    )
    report = calibrate(
        CalibrateConfig(
            str(drafter), tmp_path / "corpus.npz", str(TARGET), held_out=8, max_tokens=60, plots=tmp_path / "plots"
        )
    )
    gamma = len(report["0"]["temperatures"])
    stored = Calibration.load(drafter, gamma)
    greedy, sampled = Scaling(stored.greedy, stored.greedy_offset), Scaling(stored.sampled, stored.sampled_offset)
    for scaling, part in ((greedy, report["0"]), (sampled, report["1"])):
        assert (list(scaling.temperatures), list(scaling.offsets)) == (part["temperatures"], part["offsets"])
    assert stored != Calibration.identity(gamma)
    assert (tmp_path / "plots" / "calibration-T0.png").exists()
    for temperature, scaling in ((0.0, greedy), (1.0, sampled)):
        blocks = run(temperature, drafter=drafter, top_k=2, tokens=80).blocks
        assert (blocks.match > 0).any()
        expected = predicted(blocks, scaling, stored.copying, temperature)
        known = judged(blocks)
        np.testing.assert_allclose(blocks.survival[known], expected[known], rtol=1e-4)


@pytest.mark.parametrize("text", ["", "[]", '{"text": "x"}', "{"])
def test_bad_prompt_files_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="prompt"):
        read_prompts([path])


def test_prompts_fall_into_domains(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(p) for p in ({"prompt": "a", "domain": "math"}, {"prompt": "b"})))
    assert [(p.text, p.domain) for p in read_prompts([path])] == [("a", "math"), ("b", "mine")]
