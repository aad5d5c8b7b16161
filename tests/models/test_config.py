"""config.json is read strictly: what transformers writes parses, what we do not run is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from dspark_server.errors import CheckpointError
from dspark_server.models.config import ModelConfig
from dspark_server.models.registry import FAMILIES, load_config

from .support import ARCHITECTURES, save_tiny

SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def parse(family: str, fields: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    return FAMILIES[f"{family.title()}ForCausalLM"].parse(fields, generation or {})


def windows(config: ModelConfig) -> tuple[int | None, ...]:
    return tuple(layer.attention.window for layer in config.layers)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_transformers_saves_is_understood(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, family)
    config = load_config(tmp_path)
    assert config.num_layers == 3
    attention = config.layers[1].attention
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 2, 32)
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)
    assert config.rms_norm_eps == model.config.rms_norm_eps
    assert attention.qk_norm == (family == "qwen3")
    assert attention.bias == (family == "qwen2")


def test_absent_fields_take_the_defaults_of_transformers() -> None:
    config = parse("llama", SHAPE)
    attention = config.layers[0].attention
    assert (attention.kv_heads, attention.head_dim, config.rms_norm_eps) == (4, 16, 1e-6)
    assert (attention.rope.type, attention.rope.theta) == ("default", 10_000.0)
    assert windows(config) == (None,) * 4
    assert parse("qwen3", SHAPE).layers[0].attention.head_dim == 128
    assert windows(parse("mistral", SHAPE)) == (4096,) * 4


def test_end_tokens_of_the_generation_config_win() -> None:
    fields = {**SHAPE, "eos_token_id": 5}
    assert parse("llama", fields, {"eos_token_id": [7, 5, 9]}).eos_token_ids == (5, 7, 9)
    assert parse("llama", fields, {"eos_token_id": None}).eos_token_ids == (5,)


@pytest.mark.parametrize(
    ("family", "extra", "expected"),
    [
        ("mistral", {"sliding_window": None}, (None,) * 4),
        ("mistral", {"sliding_window": 8}, (8,) * 4),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, (None,) * 4),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 8)),
        (
            "qwen3",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            (None, 8, None, 8),
        ),
    ],
)
def test_sliding_windows(family: str, extra: dict[str, Any], expected: tuple[int | None, ...]) -> None:
    assert windows(parse(family, {**SHAPE, **extra})) == expected


def test_a_drafters_config_parses_whatever_its_architecture_is_called() -> None:
    fields = {**SHAPE, "architectures": ["Qwen3DSparkModel"], "head_dim": 32, "block_size": 7, "markov_rank": 16}
    config = parse("qwen3", fields)
    assert (config.num_layers, config.layers[0].attention.head_dim, config.layers[0].attention.qk_norm) == (4, 32, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "only 'silu'"),
        ({"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, "'longrope' is not supported; default"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"missing or not understood: \['factor'\]"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "at least 1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "positive number"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}}, "below"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set for all layers"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method 'bitsandbytes', which is not read"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types is not supported for llama"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer"),
        ({"vocab_size": None}, "vocab_size"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"eos_token_id": "</s>"}, "token ids"),
    ],
)
def test_what_we_do_not_run_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse("llama", {**SHAPE, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types must name"),
        ({"layer_types": ["full_attention"]}, "each of 4 layers"),
        ({"layer_types": ["sliding_attention"] * 4}, "positive sliding_window"),
    ],
)
def test_layer_types_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse("qwen3", {**SHAPE, **change})


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_config_that_is_no_json_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize("architectures", [[], ["GPT2LMHeadModel"], None])
def test_an_unknown_architecture_is_told_what_is_supported(architectures: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "architectures": architectures}))
    with pytest.raises(CheckpointError, match="LlamaForCausalLM, MistralForCausalLM"):
        load_config(tmp_path)


def test_an_absent_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_config(tmp_path)
