"""Qwen2: Llama with biases of queries, keys and values; some layers may have a window."""

from dspark_server.models.config import ModelConfig
from dspark_server.models.family import Family
from dspark_server.models.fields import Fields, flag, integer, names, whole
from dspark_server.models.layers.prenorm import PreNormLayer
from dspark_server.models.llama import FULL, SLIDING, read_decoder, windows_by_type


def parse(fields: Fields, generation: Fields) -> ModelConfig:
    """Read the config of a Qwen2 model."""
    return read_decoder(fields, generation, windows=windows(fields), bias=True)


def windows(fields: Fields) -> list[int | None]:
    """Each layer's window: `layer_types` lists the windowed layers, or `max_window_layers` gives the first."""
    layers = integer(fields, "num_hidden_layers")
    window = fields.get("sliding_window", 4096) if flag(fields, "use_sliding_window") else None
    first = layers if window is None else whole(fields, "max_window_layers", 28)
    types = [FULL if index < first else SLIDING for index in range(layers)]
    return windows_by_type(fields, names(fields, "layer_types") or types, window)


QWEN2 = Family(parse, PreNormLayer)
