"""Qwen3: norms of each head's queries and keys; some layers may have a window, as in Qwen2."""

from dspark_server.models.config import ModelConfig
from dspark_server.models.family import Family
from dspark_server.models.fields import Fields, flag
from dspark_server.models.layers.prenorm import PreNormLayer
from dspark_server.models.llama import read_decoder
from dspark_server.models.qwen2 import windows


def parse(fields: Fields, generation: Fields) -> ModelConfig:
    """Read the config of a Qwen3 model."""
    biased = flag(fields, "attention_bias")
    return read_decoder(
        fields, generation, windows=windows(fields), qk_norm=True, bias=biased, output_bias=biased, head_dim=128
    )


QWEN3 = Family(parse, PreNormLayer)
