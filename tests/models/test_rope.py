"""Rotary tables against transformers' own rotary embedding modules."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dspark_server.models.layers.rope import rope_config, rotary_table
from dspark_server.models.llama import LLAMA

from .support import ROPES

MAX_POSITION = 256
CASES = {
    **ROPES,
    "yarn-mscale": {**ROPES["yarn"], "mscale": 1.0, "mscale_all_dim": 0.8},
    "yarn-attention-factor": {**ROPES["yarn"], "attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2},
    "yarn-no-truncation": {**ROPES["yarn"], "truncate": False},
    "llama3-long": {**ROPES["llama3"], "factor": 32.0, "original_max_position_embeddings": 8192},
}


def config_fields(rope: dict[str, Any], theta: float = 500_000.0) -> dict[str, Any]:
    return {
        "vocab_size": 8,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": MAX_POSITION,
        "rope_parameters": {"rope_theta": theta, **rope},
    }


def reference(fields: dict[str, Any], length: int) -> Tensor:
    """transformers' table for one forward over `length` tokens, in our layout."""
    embedding = LlamaRotaryEmbedding(LlamaConfig(**fields))
    cos, sin = embedding(torch.zeros(1), torch.arange(length).unsqueeze(0))
    half = cos.shape[-1] // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=1)


def table_of(fields: dict[str, Any], length: int, positions: int | None = None) -> torch.Tensor:
    return rotary_table(rope_config(fields, fields["max_position_embeddings"]), 64, length, positions)


@pytest.mark.parametrize("length", [40, MAX_POSITION, 2 * MAX_POSITION])
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, length: int) -> None:
    fields = config_fields(CASES[case])
    table = table_of(fields, length)
    assert table.shape == (length, 64)
    assert table.dtype == torch.float32
    assert (table - reference(fields, length)).abs().max() <= 1e-4


def test_old_fields_mean_the_same() -> None:
    new = config_fields({"rope_type": "linear", "factor": 4.0})
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": 500_000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    tables = [table_of(fields, 50) for fields in (new, old)]
    assert torch.equal(*tables)


def test_dynamic_is_default_within_the_trained_length_whatever_rows_are_added() -> None:
    plain = table_of(config_fields(ROPES["default"]), 200, positions=264)
    dynamic = table_of(config_fields(ROPES["dynamic"]), 200, positions=264)
    assert plain.shape == (264, 64)
    assert torch.equal(plain, dynamic)


@pytest.mark.parametrize(("rope", "longest"), [("default", 256), ("dynamic", 512), ("yarn", 256), ("linear", 256)])
def test_longest_sequence(rope: str, longest: int) -> None:
    assert LLAMA.parse(config_fields(ROPES[rope]), {}).max_length == longest
