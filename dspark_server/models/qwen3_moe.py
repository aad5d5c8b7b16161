"""Qwen3-MoE: Qwen3 with a mixture of experts in place of the feed-forward of most layers."""

from dspark_server.errors import CheckpointError
from dspark_server.models.config import ModelConfig
from dspark_server.models.family import Family
from dspark_server.models.fields import Fields, flag, integer
from dspark_server.models.layers.mlp import MlpConfig
from dspark_server.models.layers.moe import MoeConfig
from dspark_server.models.layers.prenorm import PreNormLayer
from dspark_server.models.llama import read_decoder


def parse(fields: Fields, generation: Fields) -> ModelConfig:
    """Read the config of a Qwen3-MoE model."""
    biased = flag(fields, "attention_bias")
    return read_decoder(
        fields,
        generation,
        # Unlike in Qwen3: one window for all layers, and hidden_size / heads channels where there is no head_dim.
        windows=[window(fields)] * integer(fields, "num_hidden_layers"),
        qk_norm=True,
        bias=biased,
        output_bias=biased,
        mlp=feed_forwards(fields, routing(fields, experts=128, chosen=8, features=768)),
    )


def window(fields: Fields) -> int | None:
    """The window of layers that have one; None: none has."""
    if not flag(fields, "use_sliding_window") or fields.get("sliding_window", 4096) is None:
        return None
    return integer(fields, "sliding_window", 4096)


def routing(fields: Fields, *, experts: int, chosen: int, features: int, shared: int = 0) -> MoeConfig:
    """Number, width and choice of experts, with these defaults.

    Raises CheckpointError if a token has more experts than there are.
    """
    # transformers 5.2x writes the second name.
    experts = integer(fields, "num_local_experts" if "num_local_experts" in fields else "num_experts", experts)
    chosen = integer(fields, "num_experts_per_tok", chosen)
    if chosen > experts:
        raise CheckpointError(f"config.json: num_experts_per_tok {chosen} exceeds num_experts {experts}")
    width = integer(fields, "moe_intermediate_size", features)
    return MoeConfig(experts, chosen, width, flag(fields, "norm_topk_prob"), shared)


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
