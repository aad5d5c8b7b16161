"""Mixtures of experts against transformers in float32, for every option of their configs; what cannot be is refused."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dspark_kernels import Kernels, load
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.errors import CheckpointError
from dspark_server.models.decoder import Decoder
from dspark_server.models.layers.mlp import MlpConfig
from dspark_server.models.layers.moe import MoeConfig
from dspark_server.models.qwen3_moe import QWEN3_MOE
from dspark_server.models.registry import load_config
from dspark_server.runtime.linear import Experts

from ..engine.support import FIXTURES, greedy, prompts, seeded
from .support import VOCABULARY
from .test_decoder import SCHEDULES, assert_matches, run_schedule

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "initializer_range": 0.15,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
VARIANTS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {}),
    "qwen3-not-normalised": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"norm_topk_prob": False}),
    "qwen3-all-experts": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"num_experts_per_tok": 8, "tie_word_embeddings": True}),
    "qwen3-one-expert": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"num_experts_per_tok": 1, "attention_bias": True}),
    "qwen3-some-plain": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"mlp_only_layers": [1]}),
    "qwen3-every-other": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"decoder_sparse_step": 2}),
    "qwen2-shared": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {"shared_expert_intermediate_size": 40}),
}


def save_moe(directory: Path, variant: str, **options: Any) -> PreTrainedModel:
    """A random float32 model in which every tensor matters."""
    config_class, model_class, own = VARIANTS[variant]
    torch.manual_seed(4)
    fields = {**SHAPE, **own, **options}
    if variant.startswith("qwen2"):
        del fields["head_dim"]
    model = model_class(config_class(**fields)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", ".bias")):
            parameter.data += 0.3 * torch.randn_like(parameter)
        if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
            parameter.data *= 5  # experts must differ
    model.set_attn_implementation("eager")
    model.save_pretrained(directory)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_transformers(variant: str, kernels: Kernels, tmp_path: Path) -> None:
    model = save_moe(tmp_path, variant)
    assert_matches(model, Decoder.load(tmp_path, torch.float32, kernels, max_model_len=256))


def test_the_layers_that_have_experts(tmp_path: Path) -> None:
    save_moe(tmp_path, "qwen3-some-plain")
    mixed, plain = MoeConfig(8, 2, 24, True), MlpConfig(96)
    assert [layer.mlp for layer in load_config(tmp_path).layers] == [mixed, plain, mixed]
    layers = QWEN3_MOE.parse({**SHAPE, "decoder_sparse_step": 2}, {}).layers
    assert [layer.mlp for layer in layers] == [plain, mixed, plain]


@pytest.mark.parametrize("variant", ["qwen3", "qwen2-shared"])
def test_tokens_do_not_depend_on_the_batch(variant: str, tmp_path: Path) -> None:
    """In bfloat16, whose grouped products are our own: bit for bit, whoever shares the pass."""
    save_moe(tmp_path, variant)
    decoder = Decoder.load(tmp_path, torch.bfloat16, load("native"), max_model_len=256)
    alone, _ = run_schedule(decoder, SCHEDULES["one chunk each"], torch.bfloat16)
    for schedule in SCHEDULES.values():
        together, _ = run_schedule(decoder, schedule, torch.bfloat16)
        assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_drafter_drafts_for_a_mixture(tmp_path: Path) -> None:
    """Selected and verified like any other: the tokens are those without it."""
    save_moe(tmp_path, "qwen3", vocab_size=512, num_hidden_layers=6)
    settings: dict[str, Any] = {"num_blocks": 256, "block_size": 4, "check_invariants": True, "dtype": "float32"}
    draft = SpeculativeConfig("dspark", str(FIXTURES / "dspark_qwen3_vanilla" / "draft"), selection="fixed")
    plain = EngineCore.load(EngineConfig(model=str(tmp_path), speculative=SpeculativeConfig("none"), **settings))
    drafting = EngineCore.load(EngineConfig(model=str(tmp_path), speculative=draft, **settings))
    asked = prompts(6)
    params = [greedy(16) if index % 2 else seeded(index, 16) for index in range(len(asked))]
    assert drafting.generate(asked, params) == plain.generate(asked, params)
    assert drafting.loop.stats.draft_tokens > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds num_experts 8"),
        ({"num_experts": 0}, "num_experts must be a positive integer"),
        ({"mlp_only_layers": "none"}, "mlp_only_layers must be a list"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive integer"),
        ({"hidden_act": "gelu"}, "only 'silu'"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        QWEN3_MOE.parse({**SHAPE, **change}, {})


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    save_moe(tmp_path, "qwen3")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight is missing"):
        Decoder.load(tmp_path, torch.float32, load("reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_are_read_one_after_the_other(dtype: torch.dtype) -> None:
    """A layer of DeepSeek-V4 has 13 GB of them: no more than two exist beside the packed copy."""
    alive: set[int] = set()
    most = 0

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal most
        for number in range(6):
            pair = torch.randn(64, 32).to(dtype), torch.randn(32, 32).to(dtype)
            alive.add(number)
            weakref.finalize(pair[0], alive.discard, number)
            most = max(most, len(alive))
            yield pair
            del pair

    Experts(6, read(), load("native"))
    assert most <= 2
