"""configs/serve: each file loads as `serve` loads it, and fits the checkpoints it names.

tests/server/test_real_model.py serves smollm2-cpu.yaml.
"""

import re
from pathlib import Path

import pytest

from dspark_server.api.settings import ServerSettings
from dspark_server.cli.options import OPTIONS
from dspark_server.config import DEFAULT_CACHE_BYTES, EngineConfig
from dspark_server.errors import CheckpointError
from dspark_server.models.config import ModelConfig
from dspark_server.models.fields import read_json
from dspark_server.models.hub import DEFAULT_MODEL, resolve_model, shipped_drafter
from dspark_server.models.qwen3 import QWEN3
from dspark_server.models.registry import load_config
from dspark_server.resolve import resolve
from dspark_server.speculation.dspark_formats import DSparkConfig

from .checkpoints import DRAFTERS, TARGETS
from .manifests import ROOT

DIRECTORY = ROOT / "configs" / "serve"
FILES = sorted(DIRECTORY.glob("*.yaml"))
SIZES = ("4b", "8b", "14b")
BYTES_PER_VALUE = {"auto": 2, "bfloat16": 2, "float32": 4}
GIGABYTE = 1 << 30


def load(file: Path) -> tuple[EngineConfig, ServerSettings]:
    """The settings that `serve --config FILE` has."""
    resolution = resolve(OPTIONS, {}, {}, file)
    return resolution.make(EngineConfig), resolution.make(ServerSettings)


def pair(config: EngineConfig) -> tuple[ModelConfig, DSparkConfig]:
    """Target and drafter of a file, their config.json read as the server reads it. Raises CheckpointError."""
    if config.model == DEFAULT_MODEL:
        directory = resolve_model(config.model, progress=False)
        drafter = shipped_drafter(directory)
        assert drafter is not None
        target = load_config(directory)
        return target, DSparkConfig.parse(read_json(drafter / "config.json"), target)
    assert config.speculative.model is not None
    target = QWEN3.parse(TARGETS[config.model], {})
    return target, DSparkConfig.parse(DRAFTERS[config.speculative.model], target)


def token_bytes(config: EngineConfig) -> int:
    """KV bytes of one token, of target and drafter."""
    values = 0
    for decoder in (pair(config)[0], pair(config)[1].decoder):
        values += sum(2 * layer.attention.keys for layer in decoder.layers)
    return values * BYTES_PER_VALUE[config.dtype]


def test_every_pair_has_a_file_for_cpus_and_one_for_gpus() -> None:
    pairs = ["smollm2", *(f"qwen3-{size}" for size in SIZES)]
    assert {file.stem for file in FILES} == {f"{name}-{device}" for name in pairs for device in ("cpu", "gpu")}
    table = (DIRECTORY / "README.md").read_text()
    assert set(re.findall(r"`(\w[\w-]+\.yaml)`", table)) == {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_loads_and_fits_its_checkpoints(file: Path) -> None:
    config, _ = load(file)
    target, drafter = pair(config)
    assert config.max_model_len is not None
    assert config.max_model_len <= target.max_length
    assert (config.speculative.num_speculative_tokens or 0) <= drafter.block_size
    tokens = (config.kv_cache_memory_bytes or DEFAULT_CACHE_BYTES) // token_bytes(config)
    assert tokens >= config.max_model_len + drafter.block_size, "not even one request of full length"
    said = int(re.search(r"GiB: ([\d,]+)\s", file.read_text() + " ")[1].replace(",", ""))
    assert tokens == pytest.approx(said, rel=0.03), "the file's comment"


@pytest.mark.parametrize("size", SIZES)
def test_target_and_drafter_are_of_one_size(size: str) -> None:
    for device in ("cpu", "gpu"):
        config, _ = load(DIRECTORY / f"qwen3-{size}-{device}.yaml")
        assert config.model == f"Qwen/Qwen3-{size.upper()}"
        assert config.speculative.model == f"deepseek-ai/dspark_qwen3_{size}_block7"


def test_a_drafter_of_another_size_is_found() -> None:
    target = QWEN3.parse(TARGETS["Qwen/Qwen3-4B"], {})
    with pytest.raises(CheckpointError, match="not a pair"):
        DSparkConfig.parse(DRAFTERS["deepseek-ai/dspark_qwen3_8b_block7"], target)


@pytest.mark.parametrize("field", ["block_size", "mask_token_id", "target_layer_ids", "markov_rank", "vocab_size"])
def test_a_field_that_a_checkpoint_must_have_is_missed(field: str) -> None:
    target = QWEN3.parse(TARGETS["Qwen/Qwen3-8B"], {})
    fields = {**DRAFTERS["deepseek-ai/dspark_qwen3_8b_block7"]}
    del fields[field]
    with pytest.raises(CheckpointError, match=field):
        DSparkConfig.parse(fields, target)
