"""DeepSeek-V4 (Flash and Pro): residual streams, attention over compressed entries, hashed and scored experts.

Released tensor names, without a prefix. The stages of a draft (`mtp.*`) in the same checkpoint are not read here.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.models.config import LayerConfig, ModelConfig
from dspark_server.models.family import Family
from dspark_server.models.fields import Fields, flag, integer, number, refuse, whole
from dspark_server.models.layers.latent import IndexConfig, LatentAttention, LatentConfig
from dspark_server.models.layers.moe import ScoredMoe, ScoredMoeConfig
from dspark_server.models.layers.parts import Parts
from dspark_server.models.layers.rope import RopeConfig, rope_parameters
from dspark_server.models.layers.streams import StreamConfig, StreamMix
from dspark_server.models.llama import special_tokens
from dspark_server.models.quantization import check_quantization
from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import LayerCache
from dspark_server.runtime.linear import Linear

INDEXED, HEAVY = 4, 128  # tokens of a compressed entry, with an indexer and without

_AS_RELEASED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "num_key_value_heads": (1,),
    "n_shared_experts": (1,),
    "norm_topk_prob": (True,),
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "tie_word_embeddings": (False,),
}


class StreamLayer:
    """Attention and experts, each between a reading of the streams and a writing into them."""

    def __init__(self, parts: Parts, config: LayerConfig, prefix: str) -> None:
        """Read the weights under `prefix`, such as "layers.3."."""
        assert isinstance(config.attention, LatentConfig)
        assert isinstance(config.mlp, ScoredMoeConfig)
        assert config.streams is not None
        self._before_attention = StreamMix(parts, config.streams, f"{prefix}hc_attn_", f"{prefix}attn_norm")
        self.attention = LatentAttention(parts, config.attention, f"{prefix}attn.")
        self._before_experts = StreamMix(parts, config.streams, f"{prefix}hc_ffn_", f"{prefix}ffn_norm")
        self.mlp = ScoredMoe(parts, config.mlp, f"{prefix}ffn.")

    @property
    def products(self) -> list[Linear]:
        """The layer's matrix products in order."""
        return [*self.attention.products, *self.mlp.products]

    def forward(
        self, delta: Tensor | None, residual: Tensor, batch: Batch, caches: Sequence[LayerCache], causal: bool = True
    ) -> None:
        """See `Layer.forward`; the output is in `residual`, the streams [N, n D]."""
        assert delta is None
        x, post, mixing = self._before_attention.read(residual)
        self._before_attention.write(residual, self.attention.forward(x, batch, caches, causal), post, mixing)
        x, post, mixing = self._before_experts.read(residual)
        self._before_experts.write(residual, self.mlp.forward(x, batch.tokens), post, mixing)

    def read(self, residual: Tensor) -> Tensor:
        """The input [N, D] of attention for streams [N, n D]."""
        return self._before_attention.read(residual)[0]


def parse(fields: Fields, generation: Fields) -> ModelConfig:
    """Read the config of a DeepSeek-V4 model, without the stages of its drafter."""
    for name, accepted in _AS_RELEASED.items():
        refuse(fields, name, accepted)
    _check_storage(fields)
    layers, hashed = integer(fields, "num_hidden_layers"), whole(fields, "num_hash_layers", 0)
    ratios = fields.get("compress_ratios")
    if not isinstance(ratios, list) or len(ratios) < layers or set(ratios[layers:]) - {0}:
        raise CheckpointError(
            f"config.json: compress_ratios must have an entry for each of {layers} layers, and then one of 0 for each "
            f"stage of the drafter, not {ratios!r}"
        )
    if wrong := set(ratios) - {0, INDEXED, HEAVY}:
        raise CheckpointError(f"config.json: compress_ratios {sorted(wrong)} are not supported; 0, 4 and 128 are")
    length = integer(fields, "max_position_embeddings")
    streams = StreamConfig(
        integer(fields, "hc_mult"), integer(fields, "hc_sinkhorn_iters"), number(fields, "hc_eps", 1e-6)
    )
    attention = _attention(fields, RopeConfig("default", number(fields, "rope_theta", 1e4), length))
    scaling = dict(fields.get("rope_scaling") or {}) | {"rope_theta": number(fields, "compress_rope_theta", 1.6e5)}
    if scaling.get("rope_type", scaling.get("type")) == "yarn":
        scaling.setdefault("attention_factor", 1.0)  # cosines and sines are not scaled
    stretched = rope_parameters(scaling, {}, length)
    index = IndexConfig(
        integer(fields, "index_n_heads"), integer(fields, "index_head_dim"), integer(fields, "index_topk")
    )
    experts = ScoredMoeConfig(
        experts=integer(fields, "n_routed_experts"),
        chosen=integer(fields, "num_experts_per_tok"),
        features=integer(fields, "moe_intermediate_size"),
        normalised=True,
        shared=integer(fields, "moe_intermediate_size"),
        scale=number(fields, "routed_scaling_factor", 1.0),
        limit=number(fields, "swiglu_limit"),
        vocabulary=integer(fields, "vocab_size"),
    )

    def layer(number: int, ratio: int) -> LayerConfig:
        own = attention
        if ratio:
            own = replace(attention, rope=stretched, ratio=ratio, index=index if ratio == INDEXED else None)
        return LayerConfig(own, replace(experts, hashed=number < hashed), streams)

    return ModelConfig(
        vocab_size=integer(fields, "vocab_size"),
        hidden_size=integer(fields, "hidden_size"),
        layers=tuple(layer(number, ratio) for number, ratio in enumerate(ratios[:layers])),
        rms_norm_eps=number(fields, "rms_norm_eps", 1e-6),
        max_length=length,
        tie_word_embeddings=flag(fields, "tie_word_embeddings"),
        streams=streams,
        **special_tokens(fields, generation),
    )


def _check_storage(fields: Fields) -> None:
    """Raise CheckpointError unless weights are plain, or stored as released (models/block_scaled.py)."""
    check_quantization(fields)
    stored = fields.get("quantization_config") or {}
    refuse(stored, "quant_method", ("fp8",))
    refuse(stored, "scale_fmt", ("ue8m0",))
    refuse(fields, "expert_dtype", ("fp4", "fp8"))


def stage_config(fields: Fields, target: ModelConfig) -> tuple[LayerConfig, int]:
    """The layer of a stage of the checkpoint's drafter, which sees a window alone and scores its experts; their number.

    `num_nextn_predict_layers` is 1 whatever there is: the entries of `compress_ratios` beyond the layers' count.
    """
    attention = _attention(fields, RopeConfig("default", number(fields, "rope_theta", 1e4), target.max_length))
    experts = target.layers[-1].mlp
    assert isinstance(experts, ScoredMoeConfig)
    layer = LayerConfig(attention, replace(experts, hashed=False), target.streams)
    return layer, len(fields["compress_ratios"]) - target.num_layers


def _attention(fields: Fields, rope: RopeConfig) -> LatentConfig:
    heads, groups = integer(fields, "num_attention_heads"), integer(fields, "o_groups")
    rotated = integer(fields, "qk_rope_head_dim")
    if heads % groups:
        raise CheckpointError(f"config.json: o_groups {groups} does not divide num_attention_heads {heads}")
    if rotated % 2 or rotated > integer(fields, "head_dim"):
        raise CheckpointError(f"config.json: qk_rope_head_dim {rotated} must be even, and at most head_dim")
    return LatentConfig(
        heads=heads,
        kv_heads=1,
        head_dim=integer(fields, "head_dim"),
        rope=rope,
        window=integer(fields, "sliding_window"),
        rotated=rotated,
        query_rank=integer(fields, "q_lora_rank"),
        groups=groups,
        output_rank=integer(fields, "o_lora_rank"),
    )


DEEPSEEK_V4 = Family(
    parse,
    StreamLayer,
    prefixes=("",),
    embedding="embed.weight",
    head="head.weight",
    unused=("mtp.",),
    chat_template=Path(__file__).with_name("deepseek_v4.jinja"),
)
