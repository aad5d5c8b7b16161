"""configs/serve: each file loads as `serve` loads it, and fits the checkpoints it names.

tests/server/test_real_model.py serves smollm2-cpu.yaml.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from dspark_server.api.settings import ServerSettings
from dspark_server.cli.options import OPTIONS
from dspark_server.config import DEFAULT_CACHE_BYTES, EngineConfig
from dspark_server.errors import CheckpointError
from dspark_server.evaluation.memory import GIB, Need, need
from dspark_server.models.config import ModelConfig
from dspark_server.models.deepseek_v4 import DEEPSEEK_V4
from dspark_server.models.fields import read_json
from dspark_server.models.hub import DEFAULT_MODEL, resolve_model, shipped_drafter
from dspark_server.models.qwen3 import QWEN3
from dspark_server.models.registry import load_config
from dspark_server.resolve import resolve
from dspark_server.speculation.dspark_formats import DSparkConfig

from .checkpoints import DEEPSEEK, DRAFTERS, TARGETS, headers
from .manifests import ROOT

DIRECTORY = ROOT / "configs" / "serve"
RELEASES = sorted(DIRECTORY.glob("deepseek-v4-*.yaml"))
FILES = sorted(set(DIRECTORY.glob("*.yaml")) - set(RELEASES))
GPU_MEMORY = {"h100": 79, "h200": 139, "b200": 178}  # GiB, as their drivers say
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
    assert set(re.findall(r"`(\w[\w-]+\.yaml)`", table)) == {file.name for file in [*FILES, *RELEASES]}


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


@cache
def needs(model: str, ranks: int, settings: EngineConfig) -> tuple[Need, Need]:
    """The needs of rank 0 and of each other one; `settings` without a model."""
    fields = DEEPSEEK[model]
    return tuple(need(headers(model), fields, DEEPSEEK_V4, settings, rank) for rank in (0, 1))


def fitting(own: Sequence[Need], config: EngineConfig, gib: int, packed: bool) -> str:
    """Requests of full length that fit, or what is missing on the fullest rank."""
    share = config.gpu_memory_utilization * gib * GIB
    blocks = min(each.blocks(share, packed) for each in own)
    if blocks < 0:
        totals = [(each.weights.packed if packed else each.weights.served).total() + each.working for each in own]
        return f"no: {max(totals) / GIB:.0f} of {share / GIB:.0f}"
    return f"{blocks // own[0].request_blocks(config.max_model_len)} requests"


@pytest.mark.parametrize("file", RELEASES, ids=lambda file: file.stem)
def test_a_deepseek_file_fits_as_the_readme_says(file: Path) -> None:
    """The row of the README's table, from headers made by the model's dimensions."""
    config, _ = load(file)
    count, gpu = re.search(r"-(\d+)x(\w+)-gpu", file.stem).groups()
    assert config.tensor_parallel_size == int(count)
    assert DEEPSEEK[config.model]["n_routed_experts"] % int(count) == 0, "whole experts on each rank"
    assert "enable-expert-parallel: true\n" in file.read_text()
    own = needs(config.model, int(count), config)
    weights = [f"{e.weights.served.total() / GIB:.1f} ({e.weights.packed.total() / GIB:.1f})" for e in own]
    fits = [fitting(own, config, GPU_MEMORY[gpu], packed) for packed in (False, True)]
    row = f"| `{file.name}` | {weights[0]} | {weights[1]} | {own[0].working / GIB:.1f} | {fits[0]} | {fits[1]} |"
    assert row in (DIRECTORY / "README.md").read_text(), row
    said = "does not fit until" if fits[0].startswith("no") else "fits with weights in bfloat16"
    assert said in file.read_text()
    assert not fits[1].startswith("no"), "not even with weights kept as stored"
