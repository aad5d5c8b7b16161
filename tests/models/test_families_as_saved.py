"""Configs as transformers 5.23 saves them, and fields of the wrong kind: what is absent, padded or misshapen."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dspark_kernels import load
from transformers import Qwen2MoeConfig, Qwen3MoeConfig

from dspark_server.errors import CheckpointError
from dspark_server.models.decoder import Decoder
from dspark_server.models.gemma4 import GEMMA4
from dspark_server.models.qwen2_moe import QWEN2_MOE
from dspark_server.models.qwen3_moe import QWEN3_MOE
from dspark_server.models.registry import load_config

from .support import expected
from .test_decoder import SCHEDULES, run_schedule, sequences
from .test_gemma4 import FULL, save_gemma
from .test_gemma4 import SHAPE as GEMMA
from .test_gemma4 import SLIDING as SLIDING_LAYER
from .test_moe import SHAPE, save_moe

WINDOWED = {"use_sliding_window": True, "sliding_window": 7}


def windows(config: Any) -> list[int | None]:
    return [layer.attention.window for layer in config.layers]


def test_every_layer_of_qwen3_moe_has_the_window(tmp_path: Path) -> None:
    """transformers' Qwen3MoeModel masks all layers alike; its config has no max_window_layers and no layer_types."""
    model = save_moe(tmp_path, "qwen3", **WINDOWED)
    decoder = Decoder.load(tmp_path, torch.float32, load("reference"), max_model_len=256)
    assert windows(decoder.config) == [7, 7, 7]
    logits, _ = run_schedule(decoder, SCHEDULES["one chunk each"])
    for ours, tokens in zip(logits, sequences(), strict=True):
        assert (ours - expected(model, tokens)[0]).abs().max() <= 1e-4


def test_qwen3_moe_without_head_dim_divides_the_width() -> None:
    """Qwen3MoeConfig has no field head_dim, and Qwen3MoeAttention falls back to hidden_size / heads, not to 128."""
    fields = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    assert "head_dim" not in Qwen3MoeConfig(**fields).to_dict()
    assert QWEN3_MOE.parse(fields, {}).layers[0].attention.head_dim == 64 // 4


def test_default_windows_of_qwen2_moe() -> None:
    """Without layer_types transformers gives even layers below max_window_layers the window: not Qwen2's rule."""
    fields = {**SHAPE, **WINDOWED, "num_hidden_layers": 4, "max_window_layers": 3}
    types = Qwen2MoeConfig(**{k: v for k, v in fields.items() if k != "head_dim"}).layer_types
    theirs = [7 if kind == "sliding_attention" else None for kind in types or []]
    assert windows(QWEN2_MOE.parse(fields, {})) == theirs


def test_default_width_of_qwen2_moe_experts() -> None:
    """llama.py: the defaults of absent fields are those of transformers 5 for the same architecture."""
    fields = {name: value for name, value in SHAPE.items() if name != "moe_intermediate_size"}
    assert QWEN2_MOE.parse(fields, {}).layers[0].mlp.features == Qwen2MoeConfig().moe_intermediate_size


def test_layers_named_with_leading_zeros(tmp_path: Path) -> None:
    """transformers 5.23 pads the names in per_layer_config to one width: of 48 layers "05", "11", …."""
    types = [FULL if index % 6 == 5 else SLIDING_LAYER for index in range(12)]
    save_gemma(tmp_path, num_hidden_layers=12, layer_types=types)
    decoder = Decoder.load(tmp_path, torch.float32, load("reference"), max_model_len=64)
    assert [layer.attention.head_dim for layer in decoder.config.layers] == [16, 16, 16, 16, 16, 32] * 2


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": 3},
        {"layer_types": {"a": 1}},
        {"layer_types": [["full_attention"]] * 4},
        {"rope_parameters": {"full_attention": {"rope_type": ["x"]}, "sliding_attention": {"rope_type": "default"}}},
    ],
)
def test_misshapen_fields_of_gemma_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        GEMMA4.parse({"text_config": {**GEMMA, **change}}, {})


@pytest.mark.parametrize(
    "change", [{"layer_types": 3}, {"layer_types": [[1]] * 3}, {**WINDOWED, "max_window_layers": "x"}]
)
def test_misshapen_fields_of_qwen2_moe_are_named(change: dict[str, Any]) -> None:
    fields = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    with pytest.raises(CheckpointError):
        QWEN2_MOE.parse({**fields, **change}, {})


@pytest.mark.parametrize("architectures", [True, 3, [["LlamaForCausalLM"]], {"0": 1}])
def test_misshapen_architectures_are_named(architectures: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures}))
    with pytest.raises(CheckpointError):
        load_config(tmp_path)
