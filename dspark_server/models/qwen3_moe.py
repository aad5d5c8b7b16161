"""Qwen3-MoE: Qwen3 with a mixture of experts in place of the feed-forward of most layers."""

from typing import Any

from dspark_server.errors import CheckpointError
from dspark_server.models.config import ModelConfig
from dspark_server.models.family import Family
from dspark_server.models.fields import Fields, flag, integer
from dspark_server.models.layers.mlp import MlpConfig
from dspark_server.models.layers.moe import MoeConfig
from dspark_server.models.layers.prenorm import PreNormLayer
from dspark_server.models.llama import read_decoder
from dspark_server.models.qwen2 import windows


def parse(fields: Fields, generation: Fields) -> ModelConfig:
    """Read the config of a Qwen3-MoE model."""
    biased = flag(fields, "attention_bias")
    return read_decoder(
        fields,
        generation,
        windows=windows(fields),
        qk_norm=True,
        bias=biased,
        output_bias=biased,
        head_dim=128,
        mlp=feed_forwards(fields, MoeConfig(**routing(fields))),
    )


def routing(fields: Fields) -> dict[str, Any]:
    """Number, width and choice of experts. Raises CheckpointError if a token has more experts than there are."""
    # transformers 5.2x writes the second name.
    experts = integer(fields, "num_local_experts" if "num_local_experts" in fields else "num_experts")
    chosen = integer(fields, "num_experts_per_tok", 8)
    if chosen > experts:
        raise CheckpointError(f"config.json: num_experts_per_tok {chosen} exceeds num_experts {experts}")
    return {
        "experts": experts,
        "chosen": chosen,
        "features": integer(fields, "moe_intermediate_size", 768),
        "normalised": flag(fields, "norm_topk_prob"),
    }


def feed_forwards(fields: Fields, moe: MoeConfig) -> list[MlpConfig | MoeConfig]:
    """Each layer's feed-forward: a mixture in every `decoder_sparse_step`-th layer that `mlp_only_layers` leaves."""
    step, plain = integer(fields, "decoder_sparse_step", 1), fields.get("mlp_only_layers") or []
    if not isinstance(plain, list) or not all(isinstance(index, int) for index in plain):
        raise CheckpointError(f"config.json: mlp_only_layers must be a list of layers, not {plain!r}")
    return [
        MlpConfig(integer(fields, "intermediate_size")) if index in plain or (index + 1) % step else moe
        for index in range(integer(fields, "num_hidden_layers"))
    ]


QWEN3_MOE = Family(parse, PreNormLayer)
