"""Llama, and how the families that are variations of it read their configs.

The defaults of absent fields are those of transformers 5 for the same architecture.
"""

from collections.abc import Sequence
from typing import Any

from dspark_server.errors import CheckpointError
from dspark_server.models.config import LayerConfig, ModelConfig
from dspark_server.models.family import Family
from dspark_server.models.fields import Fields, flag, integer, names, number, refuse, token_ids
from dspark_server.models.layers.attention import AttentionConfig
from dspark_server.models.layers.mlp import MlpConfig
from dspark_server.models.layers.moe import MoeConfig
from dspark_server.models.layers.prenorm import PreNormLayer
from dspark_server.models.layers.rope import rope_config
from dspark_server.models.quantization import check_quantization

FULL, SLIDING = "full_attention", "sliding_attention"


def parse(fields: Fields, generation: Fields) -> ModelConfig:
    """Read the config of a Llama model."""
    layers = integer(fields, "num_hidden_layers")
    if names(fields, "layer_types") not in (None, [FULL] * layers):
        raise CheckpointError("config.json: layer_types is not supported for llama models")
    biased = flag(fields, "attention_bias")
    return read_decoder(fields, generation, bias=biased, output_bias=biased, mlp_bias=flag(fields, "mlp_bias"))


def read_decoder(
    fields: Fields,
    generation: Fields,
    *,
    windows: Sequence[int | None] | None = None,
    qk_norm: bool = False,
    bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    head_dim: int | None = None,
    mlp: Sequence[MlpConfig | MoeConfig] | None = None,
) -> ModelConfig:
    """Read a config of Llama's fields.

    `windows` of the layers, None: all see everything; `head_dim` where the config has none (None: hidden_size / heads);
    `mlp` are the layers' feed-forwards, None: gated ones of `intermediate_size`.

    Raises CheckpointError for a field that changes a layer's computation in an unsupported way. A drafter's config has
    fields of its own beside these: unknown ones are passed over.
    """
    refuse(fields, "hidden_act", ("silu",))
    check_quantization(fields)
    if fields.get("rope_interleaved"):
        raise CheckpointError("config.json: rope_interleaved is not supported; rotary pairs must be (i, i + d/2)")
    heads, hidden = integer(fields, "num_attention_heads"), integer(fields, "hidden_size")
    max_position = integer(fields, "max_position_embeddings")
    windows = windows or [None] * integer(fields, "num_hidden_layers")
    rope = rope_config(fields, max_position)
    if mlp is None:
        mlp = [MlpConfig(integer(fields, "intermediate_size"), bias=mlp_bias)] * len(windows)

    def layer(window: int | None, feed_forward: MlpConfig | MoeConfig) -> LayerConfig:
        attention = AttentionConfig(
            heads=heads,
            kv_heads=integer(fields, "num_key_value_heads", heads),
            head_dim=integer(fields, "head_dim", head_dim or hidden // heads),
            rope=rope,
            window=window,
            qk_norm=qk_norm,
            bias=bias,
            output_bias=output_bias,
        )
        return LayerConfig(attention, feed_forward)

    return ModelConfig(
        vocab_size=integer(fields, "vocab_size"),
        hidden_size=hidden,
        layers=tuple(map(layer, windows, mlp)),
        rms_norm_eps=number(fields, "rms_norm_eps", 1e-6),
        max_length=rope.max_length(max_position),
        tie_word_embeddings=flag(fields, "tie_word_embeddings"),
        **special_tokens(fields, generation),
    )


def special_tokens(fields: Fields, generation: Fields) -> dict[str, Any]:
    """`eos_token_ids` and `bos_token_id` of a ModelConfig."""
    ends = [token for each in (fields, generation) for token in token_ids(each.get("eos_token_id"))]
    return {
        "eos_token_ids": tuple(dict.fromkeys(ends)),
        "bos_token_id": next(iter(token_ids(fields.get("bos_token_id"))), None),
    }


def windows_by_type(fields: Fields, types: Sequence[str], window: Any) -> list[int | None]:
    """Each layer's window, from a type for each layer. Raises CheckpointError for types that are not known."""
    layers = integer(fields, "num_hidden_layers")
    if len(types) != layers or not set(types) <= {FULL, SLIDING}:
        raise CheckpointError(
            f"config.json: layer_types must name full_attention or sliding_attention for each of {layers} layers, "
            f"not {types!r}"
        )
    if SLIDING in types and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise CheckpointError(f"config.json: sliding_attention layers need a positive sliding_window, not {window!r}")
    return [window if kind == SLIDING else None for kind in types]


LLAMA = Family(parse, PreNormLayer)
