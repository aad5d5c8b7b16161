"""Gemma4, text: layers of two geometries, norms on both sides of attention and feed-forward, a scale for each layer.

Dense checkpoints of `gemma4` and `gemma4_unified`. Sliding layers have their own heads, head size and rotary embedding;
full layers may use their keys as values.
"""

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any

from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.models.config import LayerConfig, ModelConfig
from dspark_server.models.family import Family
from dspark_server.models.fields import Fields, flag, integer, names, number, refuse
from dspark_server.models.layers.attention import Attention, AttentionConfig
from dspark_server.models.layers.mlp import Mlp, MlpConfig
from dspark_server.models.layers.parts import Parts
from dspark_server.models.layers.rope import rope_parameters
from dspark_server.models.llama import FULL, SLIDING, special_tokens, windows_by_type
from dspark_server.models.quantization import check_quantization
from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import LayerCache
from dspark_server.runtime.linear import Linear

# Fields that add parts which are not built here, and the values that add none.
_WITHOUT: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "enable_moe_block": (False,),
    "hidden_size_per_layer_input": (0,),
    "num_kv_shared_layers": (0,),
    "use_double_wide_mlp": (False,),
    "use_bidirectional_attention": (False, "vision"),
    "attention_bias": (False,),
}

# What transformers takes where a config has no rope_parameters.
_ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}


class SandwichLayer:
    """x += norm(attention(norm(x))), x += norm(mlp(norm(x))), x *= scalar. The residual stream holds the output."""

    def __init__(
        self,
        parts: Parts,
        config: LayerConfig,
        prefix: str,
        make_attention: Callable[[Parts, AttentionConfig, str], Any] = Attention.load,
    ) -> None:
        """Read the weights under `prefix`, such as "model.layers.3."."""
        self._kernels, self._eps = parts.kernels, parts.eps
        self._input_norm = parts.norm(f"{prefix}input_layernorm")
        self._post_attention_norm = parts.norm(f"{prefix}post_attention_layernorm")
        self._pre_feedforward_norm = parts.norm(f"{prefix}pre_feedforward_layernorm")
        self._post_feedforward_norm = parts.norm(f"{prefix}post_feedforward_layernorm")
        self._scalar = float(parts.reader.take(f"{prefix}layer_scalar", (1,)))
        self.attention = make_attention(parts, config.attention, f"{prefix}self_attn.")
        assert isinstance(config.mlp, MlpConfig)
        self.mlp = Mlp(parts, config.mlp, f"{prefix}mlp.")

    @property
    def products(self) -> list[Linear]:
        """The layer's matrix products in order."""
        return [*self.attention.products, *self.mlp.products]

    def forward(
        self, delta: Tensor | None, residual: Tensor, batch: Batch, caches: Sequence[LayerCache], causal: bool = True
    ) -> None:
        """See `Layer.forward`; the output is in `residual`."""
        assert delta is None
        (cache,) = caches
        kernels, eps = self._kernels, self._eps
        x = kernels.rms_norm(residual, self._input_norm, eps)
        kernels.norm_add(self.attention.forward(x, batch, cache, causal), residual, self._post_attention_norm, eps)
        x = kernels.rms_norm(residual, self._pre_feedforward_norm, eps)
        kernels.norm_add(self.mlp.forward(x), residual, self._post_feedforward_norm, eps, self._scalar)


def parse(fields: Fields, generation: Fields) -> ModelConfig:
    """Read the config of a Gemma4 model: its `text_config`, or the text model's own."""
    text = fields.get("text_config", fields)
    if not isinstance(text, Mapping):
        raise CheckpointError(f"config.json: text_config should be an object, not {text!r}")
    outer = ("tie_word_embeddings", "eos_token_id", "bos_token_id", "quantization_config")
    text = {name: fields[name] for name in outer if name in fields} | dict(text)
    layers = integer(text, "num_hidden_layers")
    types = names(text, "layer_types") or [FULL if index % 6 == 5 else SLIDING for index in range(layers)]
    numbers = _by_layer(text) if text.get("per_layer_config") is not None else {}
    if beyond := [number for number in numbers if number >= layers]:
        raise CheckpointError(f"config.json: per_layer_config names layers {beyond}, of {layers}")
    if types[-1] != FULL:
        raise CheckpointError(f"config.json: the last of layer_types must be {FULL!r}, not {types[-1]!r}")
    return _decoder({"tie_word_embeddings": True} | text, generation, types)


def parse_drafter(fields: Fields, generation: Fields) -> ModelConfig:
    """Read the layers of a DSpark drafter for Gemma4: all of them full, whatever `layer_types` says."""
    layers, own = integer(fields, "num_hidden_layers"), dict[str, Any]()
    if fields.get("per_layer_config") is not None:  # of the target's layers, by their numbers
        full = list(_by_layer(fields).values())
        if any(each != full[0] for each in full):
            raise CheckpointError(f"config.json: per_layer_config should be the same for all full layers, not {full!r}")
        own = {"per_layer_config": dict.fromkeys(map(str, range(layers)), full[0])} if full else {}
    # No copy of the fields: the caller looks which of them are read.
    return _decoder(ChainMap(own, fields), generation, [FULL] * layers)  # type: ignore[arg-type]


def parse_assistant(fields: Fields) -> ModelConfig:
    """Read the layers of an assistant: their keys and values are those of the target's last layers of each type.

    Its masks show the layers with a window one token more than the target's do.
    """
    text = fields.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError(f"config.json: text_config should be an object, not {text!r}")
    layers = integer(text, "num_hidden_layers")
    refuse(text, "num_kv_shared_layers", (layers,), " for an assistant")
    config = _decoder(
        {"tie_word_embeddings": True, **text, "num_kv_shared_layers": 0},
        {},
        names(text, "layer_types") or [SLIDING] * (layers - 1) + [FULL],
    )

    def seen(layer: LayerConfig) -> LayerConfig:
        window = layer.attention.window
        return replace(layer, attention=replace(layer.attention, window=None if window is None else window + 1))

    return replace(config, layers=tuple(map(seen, config.layers)))


def _decoder(fields: Fields, generation: Fields, types: list[str]) -> ModelConfig:
    for name, harmless in _WITHOUT.items():
        refuse(fields, name, harmless)
    check_quantization(fields)
    hidden, max_position = integer(fields, "hidden_size"), integer(fields, "max_position_embeddings")
    window = fields.get("sliding_window")
    layers = tuple(
        LayerConfig(
            _attention(fields, index, kind, window, max_position),
            MlpConfig(integer(fields, "intermediate_size"), activation="gelu_tanh"),
        )
        for index, (kind, window) in enumerate(zip(types, windows_by_type(fields, types, window), strict=True))
    )
    return ModelConfig(
        vocab_size=integer(fields, "vocab_size"),
        hidden_size=hidden,
        layers=layers,
        rms_norm_eps=number(fields, "rms_norm_eps", 1e-6),
        max_length=max_position,
        tie_word_embeddings=flag(fields, "tie_word_embeddings"),
        embedding_scale=sqrt(hidden),
        softcap=None if fields.get("final_logit_softcapping") is None else number(fields, "final_logit_softcapping"),
        **special_tokens(fields, generation),
    )


def _attention(fields: Fields, index: int, kind: str, window: int | None, max_position: int) -> AttentionConfig:
    """One layer's attention. Full layers have `global_*` fields, or entries in `per_layer_config` (newer)."""
    ropes = fields.get("rope_parameters") or _ROPES
    if not isinstance(ropes, Mapping) or not isinstance(ropes.get(kind), Mapping):
        raise CheckpointError(f"config.json: rope_parameters needs an entry for {kind} layers, not {ropes!r}")
    shared = kind == FULL and flag(fields, "attention_k_eq_v")
    kv_heads, head_dim = integer(fields, "num_key_value_heads"), integer(fields, "head_dim")
    if fields.get("per_layer_config") is not None:
        own = _by_layer(fields).get(index, {})
        kv_heads, head_dim = integer(own, "num_key_value_heads", kv_heads), integer(own, "head_dim", head_dim)
    elif kind == FULL:
        head_dim = integer(fields, "global_head_dim", 512)
        kv_heads = integer(fields, "num_global_key_value_heads", kv_heads) if shared else kv_heads
    return AttentionConfig(
        heads=integer(fields, "num_attention_heads"),
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope=rope_parameters(ropes[kind], {}, max_position),
        window=window,
        qk_norm=True,
        shared_values=shared,
        value_norm=True,
        scale=1.0,
    )


def _by_layer(fields: Fields) -> dict[int, Fields]:
    """per_layer_config by number of layer; transformers pads the numbers with zeros to one width."""
    given = fields["per_layer_config"]
    if not isinstance(given, Mapping) or not all(str(key).isdecimal() for key in given):
        raise CheckpointError(f"config.json: per_layer_config must have numbers of layers for keys, not {given!r}")
    for own in given.values():
        if not isinstance(own, Mapping) or set(own) - {"head_dim", "num_key_value_heads"}:
            raise CheckpointError(
                f"config.json: per_layer_config may give a layer head_dim and num_key_value_heads, not {own!r}"
            )
    return {int(key): own for key, own in given.items()}


# A checkpoint of text alone has names without `language_model`.
GEMMA4 = Family(
    parse,
    SandwichLayer,
    prefixes=("model.language_model.", "model."),
    unused=("model.embed_vision.", "model.embed_audio.", "model.vision_tower.", "model.audio_tower."),
)
GEMMA4_DRAFTER = Family(parse_drafter, SandwichLayer)
