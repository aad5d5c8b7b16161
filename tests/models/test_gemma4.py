"""Gemma4 against transformers in float32, and its config in both spellings; what is not built is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dspark_kernels import Kernels, load
from safetensors.torch import load_file, save_file
from transformers import Gemma4UnifiedForCausalLM, Gemma4UnifiedTextConfig

from dspark_server.errors import CheckpointError
from dspark_server.models.decoder import Decoder
from dspark_server.models.gemma4 import GEMMA4, GEMMA4_DRAFTER
from dspark_server.models.registry import load_config
from dspark_server.runtime.paging import CacheRows

from .support import VOCABULARY
from .test_decoder import assert_matches

FULL, SLIDING = "full_attention", "sliding_attention"
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "sliding_window": 12,
    "max_position_embeddings": 256,
    "final_logit_softcapping": 30.0,
    "attention_k_eq_v": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "12b-like": {},
    "own values": {"attention_k_eq_v": False},
    "no cap": {"final_logit_softcapping": None},
    "untied": {"tie_word_embeddings": False},
    "wide heads": {"head_dim": 256, "global_head_dim": 512, "num_attention_heads": 2, "num_key_value_heads": 1},
    "odd heads": {"head_dim": 20, "global_head_dim": 36},
    "one geometry": {"global_head_dim": 16, "num_global_key_value_heads": 2, "sliding_window": 5},
}


def save_gemma(directory: Path, **options: Any) -> Gemma4UnifiedForCausalLM:
    """A random float32 model in which every tensor matters."""
    torch.manual_seed(3)
    model = Gemma4UnifiedForCausalLM(Gemma4UnifiedTextConfig(**{**SHAPE, "initializer_range": 0.15, **options})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data += 0.3 * torch.randn_like(parameter)
        if name.endswith("q_norm.weight"):  # scores are not scaled: of wide heads they would decide everything
            parameter.data *= (32 / len(parameter)) ** 0.5
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.copy_(0.7 + 0.5 * torch.rand(1))
    model.set_attn_implementation("eager")
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_transformers(variant: str, kernels: Kernels, tmp_path: Path) -> None:
    """Fed in any chunks, with blocks behind the window given up; taps are outputs after the scalar."""
    model = save_gemma(tmp_path, **VARIANTS[variant])
    assert_matches(model, Decoder.load(tmp_path, torch.float32, kernels, max_model_len=256), relative=True)


def test_both_spellings_are_one_model(tmp_path: Path) -> None:
    """transformers writes `per_layer_config`; the released checkpoints have `global_*` fields under `text_config`."""
    save_gemma(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "per_layer_config" in written
    assert "global_head_dim" not in written
    types = {"rope_parameters": written["rope_parameters"], "eos_token_id": 1, "bos_token_id": 2}
    released = {"architectures": ["Gemma4UnifiedForConditionalGeneration"], "text_config": {**SHAPE, **types}}
    assert GEMMA4.parse(released, {}) == load_config(tmp_path)
    assert [layer.attention.head_dim for layer in load_config(tmp_path).layers] == [16, 32, 16, 32]
    assert [layer.attention.kv_heads for layer in load_config(tmp_path).layers] == [2, 1, 2, 1]


def test_the_released_12b_is_read() -> None:
    types = [FULL if index % 6 == 5 else SLIDING for index in range(48)]
    fields = SHAPE | {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "layer_types": types}
    fields |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "global_head_dim": 512}
    fields |= {"sliding_window": 1024, "max_position_embeddings": 262_144, "vocab_size": 262_144}
    config = GEMMA4.parse({"text_config": fields, "eos_token_id": 1}, {"eos_token_id": [1, 106]})
    caches = [layer.attention.rows(config.max_length) for layer in config.layers]
    assert sum(rows == CacheRows(8, 256, 1024) for rows in caches) == 40
    assert sum(rows == CacheRows(1, 512) for rows in caches) == 8
    assert config.eos_token_ids == (1, 106)
    assert config.embedding_scale**2 == pytest.approx(3840)
    rope = config.layers[5].attention.rope
    assert (rope.type, rope.theta, rope.partial_rotary_factor) == ("proportional", 1e6, 0.25)


def test_a_drafter_may_have_the_targets_spelling() -> None:
    """Its layers are full ones, whatever numbers the target's have."""
    fields = {**SHAPE, "num_hidden_layers": 2, "tie_word_embeddings": False}
    newer = {name: value for name, value in fields.items() if "global" not in name}
    newer["per_layer_config"] = {key: {"head_dim": 32, "num_key_value_heads": 1} for key in ("05", "11", "17")}
    assert GEMMA4_DRAFTER.parse(newer, {}) == GEMMA4_DRAFTER.parse(fields, {})
    newer["per_layer_config"]["11"] = {"head_dim": 64}
    with pytest.raises(CheckpointError, match="the same for all full layers"):
        GEMMA4_DRAFTER.parse(newer, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_layer_config": {"7": {"head_dim": 4}}}, r"per_layer_config names layers \[7\], of 4"),
        ({"per_layer_config": {"one": {"head_dim": 4}}}, "must have numbers of layers for keys"),
        ({"enable_moe_block": True}, "enable_moe_block True is not supported, only False is"),
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input 256 is not supported, only 0 is"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers 2 is not supported"),
        ({"use_double_wide_mlp": True}, "use_double_wide_mlp True"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all' is not supported"),
        ({"hidden_activation": "silu"}, "hidden_activation 'silu' is not supported, only 'gelu_pytorch_tanh' is"),
        ({"layer_types": [SLIDING] * 4}, "the last of layer_types must be 'full_attention'"),
        ({"layer_types": [SLIDING, "linear_attention", SLIDING, FULL]}, "layer_types must name full_attention or"),
        ({"layer_types": [FULL]}, "each of 4 layers"),
        ({"sliding_window": None}, "positive sliding_window"),
        ({"rope_parameters": {FULL: {"rope_type": "default"}}}, "rope_parameters needs an entry for sliding_attention"),
        ({"rope_parameters": {kind: {"rope_type": "axial"} for kind in (FULL, SLIDING)}}, "rope type 'axial'"),
        ({"per_layer_config": {"1": {"sliding_window": 4}}}, "per_layer_config may give a layer head_dim"),
        ({"quantization_config": {"quant_method": "torchao"}}, "quant_method 'torchao', which is not read"),
        ({"num_global_key_value_heads": 3}, "must be a multiple"),
    ],
)
def test_what_is_not_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        GEMMA4.parse({"text_config": {**SHAPE, **change}}, {})


def test_the_towers_of_other_inputs_are_passed_over(tmp_path: Path) -> None:
    save_gemma(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.replace("model.", "model.language_model."): tensor for name, tensor in tensors.items()}
    save_file({**tensors, "model.embed_vision.proj.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    Decoder.load(tmp_path, torch.float32, load("reference"))
    save_file({**tensors, "model.embed_smell.proj.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.embed_smell"):
        Decoder.load(tmp_path, torch.float32, load("reference"))
