"""Qwen2-MoE: as Qwen3-MoE, with Qwen2's attention, and an expert that all tokens share."""

from dspark_server.models.config import ModelConfig
from dspark_server.models.family import Family
from dspark_server.models.fields import Fields, flag, integer, names, whole
from dspark_server.models.layers.prenorm import PreNormLayer
from dspark_server.models.llama import FULL, SLIDING, read_decoder, windows_by_type
from dspark_server.models.qwen3_moe import feed_forwards, routing, window


def parse(fields: Fields, generation: Fields) -> ModelConfig:
    """Read the config of a Qwen2-MoE model."""
    shared = integer(fields, "shared_expert_intermediate_size", 5632)
    moe = routing(fields, experts=60, chosen=4, features=1408, shared=shared)
    # Unlike in Qwen2, every other layer of the first ones has the window.
    own, last = window(fields), whole(fields, "max_window_layers", 28)
    layers = range(integer(fields, "num_hidden_layers"))
    types = [SLIDING if own is not None and index % 2 == 0 and index < last else FULL for index in layers]
    windows = windows_by_type(fields, names(fields, "layer_types") or types, own)
    bias = flag(fields, "qkv_bias", True)
    return read_decoder(fields, generation, windows=windows, bias=bias, mlp=feed_forwards(fields, moe))


QWEN2_MOE = Family(parse, PreNormLayer)
