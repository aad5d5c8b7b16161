"""A decoder's dimensions, layer by layer, as its family read them from config.json."""

import math
from dataclasses import dataclass, replace

from dspark_server.errors import ConfigError
from dspark_server.models.layers.attention import AttentionConfig
from dspark_server.models.layers.mlp import MlpConfig
from dspark_server.models.layers.moe import MoeConfig
from dspark_server.models.layers.rope import RopeConfig
from dspark_server.models.layers.streams import StreamConfig


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer."""

    attention: AttentionConfig
    mlp: MlpConfig | MoeConfig
    streams: StreamConfig | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder. `max_length` is the longest sequence that its positions support, in tokens.

    `eos_token_ids` are those of config.json and generation_config.json; the tokenizer may have another. Embeddings are
    multiplied by `embedding_scale`; a logit becomes softcap * tanh(logit / softcap) if there is a `softcap`. With
    `streams` the residual has several of them.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    rms_norm_eps: float
    max_length: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    embedding_scale: float = 1.0
    softcap: float | None = None
    streams: StreamConfig | None = None

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def ropes(self) -> set[tuple[RopeConfig, int]]:
        """The rotary embeddings of all layers, with their head sizes."""
        return {(layer.attention.rope, layer.attention.head_dim) for layer in self.layers}

    @property
    def has_experts(self) -> bool:
        """Whether a layer is a mixture of experts."""
        return any(isinstance(layer.mlp, MoeConfig) for layer in self.layers)

    def with_whole_experts(self) -> "ModelConfig":
        """The config whose routed experts lie whole on one rank each; the same where there are none."""

        def whole(layer: LayerConfig) -> LayerConfig:
            return replace(layer, mlp=replace(layer.mlp, whole=True)) if isinstance(layer.mlp, MoeConfig) else layer

        return replace(self, layers=tuple(map(whole, self.layers)))

    def shared_by(self, size: int) -> "ModelConfig":
        """Return the config of one of `size` ranks: whole heads and equal shares of the feed-forward.

        Raises ConfigError, which names the sizes that work, if the layers cannot be divided so.
        """
        heads = sorted({layer.attention.kv_heads for layer in self.layers})
        whole = sorted({layer.mlp.parts for layer in self.layers if _whole_experts(layer)})
        features = sorted({layer.mlp.parts for layer in self.layers if not _whole_experts(layer)})
        most = math.gcd(*(layer.attention.parts for layer in self.layers), *features, *whole)

        def works(size: int) -> bool:
            return most % size == 0 and all(count % size == 0 or size % count == 0 for count in heads)

        if not works(size):
            units = [f"{_named(features)} feed-forward units"] if features else []
            units += [f"{_named(whole)} experts"] if whole else []
            working = " or ".join(str(n) for n in range(1, most + 1) if works(n))
            raise ConfigError(
                f"--tensor-parallel-size must divide this model's {_named(heads)} key/value heads and "
                f"{' and '.join(units)}: it can be {working}, not {size}."
            )
        layers = [
            replace(each, attention=each.attention.shared_by(size), mlp=each.mlp.shared_by(size))
            for each in self.layers
        ]
        return replace(self, layers=tuple(layers))


def _whole_experts(layer: LayerConfig) -> bool:
    return isinstance(layer.mlp, MoeConfig) and layer.mlp.whole


def _named(values: list[int]) -> str:
    return " and ".join(map(str, values))
