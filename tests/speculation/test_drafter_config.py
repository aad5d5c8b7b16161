"""A drafter's config.json is read strictly; what suggests that it belongs to another target is said at start."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.errors import CheckpointError
from dspark_server.models.registry import load_config
from dspark_server.speculation.dspark_formats import DSparkConfig
from dspark_server.speculation.pair import head_digest

from ..engine.support import FIXTURES, greedy, tiny_core

PAIR = FIXTURES / "dspark_qwen3_vanilla"
FIELDS: dict[str, Any] = json.loads((PAIR / "draft" / "config.json").read_text())


def parse(**changes: Any) -> DSparkConfig:
    return DSparkConfig.parse({**FIELDS, **changes}, load_config(PAIR / "target"))


@pytest.mark.parametrize("name", ["dspark_qwen3_vanilla", "dspark_qwen3_rnn", "dspark_gemma4"])
def test_what_deepspec_writes_is_known(name: str) -> None:
    fields = json.loads((FIXTURES / name / "draft" / "config.json").read_text())
    assert DSparkConfig.parse(fields, load_config(FIXTURES / name / "target")).block_size == 7


@pytest.mark.parametrize("name", ["sample_from_anchor", "norm_before_fc", "attention_sink"])
def test_a_field_that_nobody_reads_is_an_error(name: str) -> None:
    """It may say how slots are counted: passed over, it would only show in acceptance."""
    with pytest.raises(CheckpointError, match=f"has {name}, which this server does not know"):
        parse(**{name: False})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["Qwen3Eagle9Model"]},
            "'Qwen3Eagle9Model' is no DSpark or DFlash drafter; Qwen3DSparkModel",
        ),
        ({"hidden_size": 128}, "The drafter's hidden_size is 128, the target's 64: not a pair"),
        ({"vocab_size": 516}, "The drafter's vocab_size is 516, the target's 512"),
        ({"target_layer_ids": [1, 5]}, "must increase and lie within -1 .. 4"),
        ({"mask_token_id": 512}, "mask_token_id 512 is outside the embedding"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope type 'spiral' is not supported"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(**changes)


def altered(directory: Path, **changes: Any) -> Path:
    shutil.copytree(PAIR, directory)
    (directory / "draft" / "config.json").write_text(json.dumps({**FIELDS, **changes}))
    return directory


def load(pair: Path) -> EngineCore:
    draft = SpeculativeConfig(method="dspark", model=str(pair / "draft"), selection="fixed")
    return EngineCore.load(EngineConfig(model=str(pair / "target"), dtype="float32", speculative=draft, num_blocks=64))


def test_a_drafter_for_other_weights_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair = altered(tmp_path / "pair", target_digest=head_digest(PAIR / "target"))
    load(pair)
    assert "other weights" not in caplog.text
    path = pair / "target" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * 1.01
    save_file(tensors, path)
    load(pair)
    assert "trained for other weights" in caplog.text


def test_positions_that_end_early_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(altered(tmp_path / "pair", max_position_embeddings=64))
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.args[0] for record in warnings if "positions end" in record.msg] == [64]  # type: ignore[index]


def test_acceptance_by_the_contexts_length() -> None:
    core = tiny_core(num_blocks=400)
    text = [(7 * place) % 500 for place in range(300)]
    core.generate([text, text[:20]], greedy(12))
    stats = core.loop.stats
    assert set(stats.judged_by_context) == {256, 512}
    assert sum(stats.judged_by_context.values()) == stats.draft_tokens
    assert sum(stats.accepted_by_context.values()) == stats.accepted_tokens
