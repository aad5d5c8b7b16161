"""The sum of a model's memory from headers alone: against loaded weights, and against the released sizes."""

from functools import cache
from pathlib import Path

import pytest
import torch
from dspark_kernels.reference import ReferenceKernels
from safetensors.torch import load_file
from typer.testing import CliRunner

from dspark_server.cli import app
from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.errors import ConfigError
from dspark_server.evaluation.memory import GIB, Need, need, report, stored_bytes
from dspark_server.models.decoder import Decoder
from dspark_server.models.deepseek_v4 import DEEPSEEK_V4
from dspark_server.models.fields import read_json
from dspark_server.models.loading import WeightReader, open_checkpoint
from dspark_server.models.registry import family_of

from ..deploy.checkpoints import DEEPSEEK, headers

FIXTURES = Path(__file__).parents[1] / "fixtures"
FLASH, PRO = DEEPSEEK
LENGTH = 131072


def of_directory(directory: Path, rank: int = 0, **settings: object) -> Need:
    config = EngineConfig(str(directory), max_num_batched_tokens=100, **settings)
    fields = read_json(directory / "config.json")
    return need(open_checkpoint(directory), fields, family_of(directory), config, rank)


@cache
def released(model: str, ranks: int, rank: int) -> Need:
    sizes = {"max_model_len": LENGTH, "max_num_batched_tokens": 4096, "max_num_seqs": 128, "block_size": 128}
    config = EngineConfig(model, tensor_parallel_size=ranks, **sizes)
    return need(headers(model), DEEPSEEK[model], DEEPSEEK_V4, config, rank)


@pytest.mark.parametrize("name", ["dspark_qwen3_vanilla/target", "dspark_gemma4/target", "dspark_deepseek_v4"])
def test_what_is_counted_is_what_the_loader_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of every tensor that loading the target takes, of families with and without experts."""
    directory = FIXTURES / name
    taken = []
    take, integers = WeightReader.take, WeightReader.integers

    def counted(self, *args, **more):
        taken.append(take(self, *args, **more))
        return taken[-1]

    def counted_integers(self, *args):
        taken.append(integers(self, *args).int())
        return taken[-1]

    monkeypatch.setattr(WeightReader, "take", counted)
    monkeypatch.setattr(WeightReader, "integers", counted_integers)
    Decoder.load(directory, torch.bfloat16, ReferenceKernels())
    monkeypatch.undo()
    found = of_directory(directory, dtype="bfloat16", speculative=SpeculativeConfig("none")).weights.served
    assert found.total() - found["rotary tables"] == sum(tensor.nbytes for tensor in taken)


def test_ranks_share_all_that_loading_shares() -> None:
    """Two ranks together have each split tensor once, and all else twice; rank 0 has the drafter and a second head."""
    directory = FIXTURES / "dspark_deepseek_v4"
    alone = of_directory(directory).weights
    first, second = (of_directory(directory, rank, tensor_parallel_size=2).weights for rank in (0, 1))
    assert first.served["routed experts"] == second.served["routed experts"] == alone.served["routed experts"] / 2
    assert first.served["head"] + second.served["head"] == alone.served["head"]
    assert first.served["embedding"] == second.served["embedding"] == alone.served["embedding"]
    assert first.served["drafter"] == alone.served["drafter"] + alone.served["head"]
    assert second.served["drafter"] == 0
    stages = {n: t for n, t in load_file(directory / "model.safetensors").items() if n.startswith("mtp.")}
    assert alone.packed["drafter"] == sum(tensor.nbytes for tensor in stages.values())


@pytest.mark.parametrize("name", ["dspark_deepseek_v4", "mtp1_deepseek_v4"])
def test_blocks_are_those_of_the_engine(name: str) -> None:
    """With DSpark's stages, and with the MTP layer."""
    settings = {"dtype": "float32", "max_num_seqs": 4, "max_model_len": 256, "block_size": 32}
    config = EngineConfig(str(FIXTURES / name), kv_cache_memory_bytes=4 << 20, **settings)
    pool = EngineCore.load(config).loop.executor.pool
    found = of_directory(FIXTURES / name, **settings)
    assert tuple(found.groups) == tuple(pool.groups)
    assert (4 << 20) // found.block_bytes == pool.num_blocks


@pytest.mark.parametrize(("model", "tensors", "gigabytes"), [(FLASH, 72317, 166.9), (PRO, 149782, 892.7)])
def test_the_headers_are_of_the_released_number_and_size(model: str, tensors: int, gigabytes: float) -> None:
    found = headers(model).tensors
    assert len(found) == tensors
    size = sum(stored_bytes(found, name) for name in found if not name.endswith(".scale"))
    assert size / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_weights_of_flash_by_kind() -> None:
    """43 layers of 256 experts, each of three matrices of 4096 x 2048, in 4 bits and a byte of scale for 32 of them."""
    values = 43 * 256 * 3 * 4096 * 2048
    own = released(FLASH, 8, 1).weights
    assert own.served["routed experts"] == values * 2 // 8
    assert own.packed["routed experts"] == (values // 2 + values // 32) // 8
    assert own.served["embedding"] == 129280 * 4096 * 2
    first = released(FLASH, 8, 0).weights
    head = 129280 * 4096 * 2
    assert (first.packed["drafter"] - head) / 1e9 == pytest.approx(10.9, abs=0.05)  # shards 46 to 48
    assert (first.served["drafter"] - head) / 2e9 == pytest.approx(19.8, abs=0.1)  # 10^9 weights


@pytest.mark.parametrize(
    ("model", "indexed", "heavy"), [(FLASH, 21, 20), (PRO, 30, 31)], ids=lambda value: str(value).split("/")[-1]
)
def test_bytes_of_a_token_of_context(model: str, indexed: int, heavy: int) -> None:
    """An entry of 512 and a key of 128 for four tokens, an entry of 512 for 128, in bfloat16; blocks waste a little."""
    exact = indexed * (512 + 128) * 2 / 4 + heavy * 512 * 2 / 128
    found = released(model, 8, 0).token_bytes
    assert exact <= found <= 1.1 * exact


def test_bytes_of_a_request_beside_its_entries() -> None:
    """Rows of 128 tokens and what open windows need do not grow with the length."""
    own = released(FLASH, 8, 0)
    long, longer = (own.request_blocks(length) * own.block_bytes for length in (LENGTH, 2 * LENGTH))
    fixed = long - LENGTH * own.token_bytes
    assert longer - long == pytest.approx(LENGTH * own.token_bytes, rel=0.02)
    assert 20e6 < fixed < 70e6


def test_what_fits() -> None:
    """Weights in bfloat16 fit eight H200; kept as stored they would fit eight H100."""
    needs = [released(FLASH, 8, rank) for rank in (0, 1)]
    for memory, served in ((139, True), (79, False)):
        first, second = report(needs, EngineConfig(FLASH), LENGTH, memory * GIB)
        assert ("do not fit" not in first) == served
        assert "tokens of context" in second


def test_ranks_that_cannot_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="it can be 1 or 2 or 4 or 8, not 16"):
        released(FLASH, 16, 0)


def test_the_command() -> None:
    directory = str(FIXTURES / "dspark_deepseek_v4")
    flags = ["--gpu-memory", "1", "--tensor-parallel-size", "2", "--max-num-batched-tokens", "100"]
    done = CliRunner().invoke(app, ["memory", directory, *flags])
    assert done.exit_code == 0, done.output
    for words in ("routed experts", "rank 0 of 2", "each other rank", "tokens of context"):
        assert words in done.output
    gone = CliRunner().invoke(app, ["memory", "deepseek-ai/DeepSeek-V4-Flash-0731", "--gpu-memory", "79"])
    assert gone.exit_code == 1
    assert "is not a directory" in gone.output + gone.stderr
