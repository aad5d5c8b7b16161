"""Qwen2-MoE: as Qwen3-MoE, with Qwen2's attention, and an expert that all tokens share."""

from dspark_server.models.config import ModelConfig
from dspark_server.models.family import Family
from dspark_server.models.fields import Fields, flag, integer
from dspark_server.models.layers.moe import MoeConfig
from dspark_server.models.layers.prenorm import PreNormLayer
from dspark_server.models.llama import read_decoder
from dspark_server.models.qwen2 import windows
from dspark_server.models.qwen3_moe import feed_forwards, routing


def parse(fields: Fields, generation: Fields) -> ModelConfig:
    """Read the config of a Qwen2-MoE model."""
    shared = integer(fields, "shared_expert_intermediate_size", 5632)
    moe = MoeConfig(**{**routing(fields), "chosen": integer(fields, "num_experts_per_tok", 4)}, shared=shared)
    bias = flag(fields, "qkv_bias", True)
    return read_decoder(fields, generation, windows=windows(fields), bias=bias, mlp=feed_forwards(fields, moe))


QWEN2_MOE = Family(parse, PreNormLayer)
