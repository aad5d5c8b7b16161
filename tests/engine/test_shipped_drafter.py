"""The drafter inside the package: what ships is whole, small, said to be what it is, and taken by default."""

import json
from pathlib import Path

import dspark_server
from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore, load_tokenizer
from dspark_server.engine.request import SamplingParams
from dspark_server.models.hub import DEFAULT_MODEL, resolve_model, shipped_drafter
from dspark_server.speculation.calibration import Calibration
from tests.engine.support import SMOLLM2_COSTS, still
from tests.models.support import save_tiny

PROMPTS = (
    "<|im_start|>user\nWrite a Python function that adds two numbers.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nNatalia sold 48 clips in April and half as many in May. How many in all?<|im_end|>\n"
    "<|im_start|>assistant\n",
)


def test_it_lies_in_the_package_with_all_that_belongs_to_it() -> None:
    directory = shipped_drafter(resolve_model(DEFAULT_MODEL))
    assert directory is not None
    assert directory.is_relative_to(Path(dspark_server.__file__).parent)
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 64 << 20
    fields = json.loads((directory / "config.json").read_text())
    assert Calibration.load(directory, fields["block_size"]) != Calibration.identity(fields["block_size"])
    card = (directory / "README.md").read_text()
    for said in ("Apache-2.0", "tau", "hours", "ECE"):
        assert said in card


def test_it_belongs_to_that_target_alone(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    assert shipped_drafter(tmp_path) is None


def test_it_drafts_by_default_and_changes_no_greedy_token() -> None:
    """Exactly: the native kernels compute a row the same way whatever the pass holds beside it."""
    tokenizer = load_tokenizer(resolve_model(DEFAULT_MODEL))
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in PROMPTS]
    params = SamplingParams(max_tokens=60, temperature=0.0)
    sizes = {"kv_cache_memory_bytes": 128 << 20, "max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 32}
    core = EngineCore.load(EngineConfig(**sizes), SMOLLM2_COSTS, clock=still)
    outputs = core.generate(prompts, params)
    stats = core.loop.stats
    assert stats.draft_tokens > 0
    assert stats.accepted_tokens > 0.2 * stats.draft_tokens
    if "native linear" in core.backend:
        plain = EngineCore.load(EngineConfig(speculative=SpeculativeConfig(method="none"), **sizes))
        assert plain.generate(prompts, params) == outputs
