"""Mistral: Llama with one window for all layers."""

from dspark_server.errors import CheckpointError
from dspark_server.models.config import ModelConfig
from dspark_server.models.family import Family
from dspark_server.models.fields import Fields, integer, names
from dspark_server.models.layers.prenorm import PreNormLayer
from dspark_server.models.llama import FULL, SLIDING, read_decoder, windows_by_type


def parse(fields: Fields, generation: Fields) -> ModelConfig:
    """Read the config of a Mistral model."""
    window = fields.get("sliding_window", 4096)
    types = [FULL if window is None else SLIDING] * integer(fields, "num_hidden_layers")
    if names(fields, "layer_types") not in (None, types):
        raise CheckpointError("config.json: layer_types is not supported for mistral models")
    return read_decoder(fields, generation, windows=windows_by_type(fields, types, window))


MISTRAL = Family(parse, PreNormLayer)
