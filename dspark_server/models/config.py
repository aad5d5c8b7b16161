"""Strict reading of a decoder-only checkpoint's config.json: an unsupported option is an error.

The defaults of absent fields are those of transformers 5 for the same architecture.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dspark_server.errors import CheckpointError, ConfigError

Family = Literal["llama", "mistral", "qwen2", "qwen3"]

ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

GGUF_IS_NOT_READ = (
    "GGUF files are not read; give the directory or Hugging Face id of the model they were made of (safetensors)"
)

# Parameters of each rotary embedding besides its type and theta: (required, optional).
_ROPE_FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, set()),
    "yarn": ({"factor"}, {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
}


@dataclass(frozen=True)
class RopeConfig:
    """A rotary embedding. Fields that `type` does not use keep their defaults.

    `original_max_position` is the length the model was trained at before its context was extended.
    """

    type: Literal["default", "linear", "dynamic", "llama3", "yarn"]
    theta: float
    original_max_position: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's dimensions. `sliding_windows[i]` is layer i's window in tokens, None for the whole context.

    `eos_token_ids` are those of config.json and generation_config.json; the tokenizer may have another.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    rope: RopeConfig
    qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    sliding_windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def max_length(self) -> int:
        """The longest sequence that the rotary embedding supports, in tokens."""
        if self.rope.type in ("dynamic", "yarn"):
            return max(self.max_position, int(self.rope.factor * self.rope.original_max_position))
        return self.max_position

    def shared_by(self, size: int) -> "ModelConfig":
        """Return the config of one of `size` ranks: whole heads and equal shares of the feed-forward.

        Raises ConfigError, which names the sizes that work, if the layers cannot be divided so.
        """
        most = math.gcd(self.num_kv_heads, self.intermediate_size)
        if most % size:
            working = " or ".join(str(n) for n in range(1, most + 1) if most % n == 0)
            raise ConfigError(
                f"--tensor-parallel-size must divide this model's {self.num_kv_heads} key/value heads and "
                f"{self.intermediate_size} feed-forward units: it can be {working}, not {size}."
            )
        return replace(
            self,
            num_heads=self.num_heads // size,
            num_kv_heads=self.num_kv_heads // size,
            intermediate_size=self.intermediate_size // size,
        )


def load_config(directory: Path) -> ModelConfig:
    """Read config.json of a target checkpoint, and further end tokens of generation_config.json if there is one.

    Raises CheckpointError if a file is absent or unreadable, or asks for something this server does not support.
    """
    fields = read_json(directory / "config.json")
    architectures = fields.get("architectures") or []
    family = ARCHITECTURES.get(architectures[0]) if len(architectures) == 1 else None
    if family is None:
        raise CheckpointError(
            f"{directory / 'config.json'}: architectures {architectures} is not supported; "
            f"this server runs {', '.join(ARCHITECTURES)}"
        )
    generation = directory / "generation_config.json"
    return parse_decoder(fields, family, read_json(generation) if generation.is_file() else {})


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a checkpoint directory. Raises CheckpointError if there is none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; is {path.parent} a complete model directory?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); download the model again") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(fields).__name__}")
    return fields


def parse_decoder(
    fields: Mapping[str, Any], family: Family, generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Return the decoder that `fields` (a Hugging Face config) describes, regardless of `architectures`.

    A drafter's config is a decoder's plus fields of its own, so unknown fields are allowed here; those that would
    change a layer's computation raise CheckpointError.
    """
    _refuse_unsupported(fields)
    heads = _integer(fields, "num_attention_heads")
    kv_heads = heads if fields.get("num_key_value_heads") is None else _integer(fields, "num_key_value_heads")
    hidden_size = _integer(fields, "hidden_size")
    default_head_dim = 128 if family == "qwen3" else hidden_size // heads
    head_dim = default_head_dim if fields.get("head_dim") is None else _integer(fields, "head_dim")
    if heads % kv_heads or head_dim % 2:
        raise CheckpointError(
            f"config.json: {heads} query heads over {kv_heads} key/value heads of size {head_dim}: "
            "the first must be a multiple of the second, the size even"
        )
    biased = family in ("llama", "qwen3") and _flag(fields, "attention_bias")
    max_position = _integer(fields, "max_position_embeddings")
    end_tokens = [token for each in (fields, generation or {}) for token in _token_ids(each.get("eos_token_id"))]
    return ModelConfig(
        family=family,
        vocab_size=_integer(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(fields, "intermediate_size"),
        num_layers=_integer(fields, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(fields, "rms_norm_eps", 1e-6),
        max_position=max_position,
        rope=_rope(fields, max_position),
        qk_norm=family == "qwen3",
        qkv_bias=biased or family == "qwen2",
        output_bias=biased,
        mlp_bias=family == "llama" and _flag(fields, "mlp_bias"),
        tie_word_embeddings=_flag(fields, "tie_word_embeddings"),
        sliding_windows=_sliding_windows(fields, family),
        eos_token_ids=tuple(dict.fromkeys(end_tokens)),
        bos_token_id=next(iter(_token_ids(fields.get("bos_token_id"))), None),
    )


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a field that changes the arithmetic in an unsupported way."""
    activation = fields.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"config.json: hidden_act {activation!r} is not supported, only 'silu' is")
    if fields.get("quantization_config"):
        raise CheckpointError("config.json: quantized checkpoints are not supported; use the unquantized model")
    if fields.get("rope_interleaved"):
        raise CheckpointError("config.json: rope_interleaved is not supported; rotary pairs must be (i, i + d/2)")


def _rope(fields: Mapping[str, Any], max_position: int) -> RopeConfig:
    """Read `rope_parameters` of transformers 5, or the older rope_theta and rope_scaling."""
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise CheckpointError(f"config.json: rope parameters {given!r}: one set for all layers is supported, no other")
    scaling = {key: value for key, value in given.items() if value is not None}
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    if kind not in _ROPE_FIELDS:
        raise CheckpointError(f"config.json: rope type {kind!r} is not supported; {', '.join(_ROPE_FIELDS)} are")
    theta = _number(scaling, "rope_theta", _number(fields, "rope_theta", 10_000.0))
    original = scaling.pop("original_max_position_embeddings", max_position)
    # In transformers a top-level field overrides the one in the rope parameters; dynamic uses neither.
    original = fields.get("original_max_position_embeddings") or original
    if kind not in ("llama3", "yarn"):
        original = max_position
    if scaling.pop("partial_rotary_factor", fields.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError("config.json: partial_rotary_factor is not supported; the whole head must be rotated")
    scaling.pop("rope_theta", None)

    required, optional = _ROPE_FIELDS[kind]
    if wrong := (required - set(scaling)) | (set(scaling) - required - optional):
        raise CheckpointError(
            f"config.json: rope type {kind!r} takes {sorted(required)} and may take {sorted(optional)}; "
            f"missing or not understood: {sorted(wrong)}"
        )
    truncate = scaling.pop("truncate", True)
    numbers = {key: _number(scaling, key) for key in scaling}
    if numbers.get("factor", 1.0) < 1.0:
        raise CheckpointError(f"config.json: rope factor must be at least 1, not {numbers['factor']}")
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise CheckpointError("config.json: rope type 'llama3' needs low_freq_factor below high_freq_factor")
    return RopeConfig(kind, theta, int(original), truncate=bool(truncate), **numbers)


def _sliding_windows(fields: Mapping[str, Any], family: Family) -> tuple[int | None, ...]:
    """Each layer's window. Mistral has one for all layers; Qwen lists its windowed layers or gives the first."""
    layers = _integer(fields, "num_hidden_layers")
    if family == "llama":
        types = ["full_attention"] * layers
        window = None
    elif family == "mistral":
        window = fields.get("sliding_window", 4096)
        types = ["full_attention" if window is None else "sliding_attention"] * layers
    else:
        window = fields.get("sliding_window", 4096) if _flag(fields, "use_sliding_window") else None
        first = layers if window is None else int(fields.get("max_window_layers", 28))
        types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if family in ("qwen2", "qwen3"):
        types = fields.get("layer_types") or types
    elif fields.get("layer_types") not in (None, types):
        raise CheckpointError(f"config.json: layer_types is not supported for {family} models")

    if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise CheckpointError(
            f"config.json: layer_types must name full_attention or sliding_attention for each of {layers} layers"
        )
    if "sliding_attention" in types and (not isinstance(window, int) or window < 1):
        raise CheckpointError(f"config.json: sliding_attention layers need a positive sliding_window, not {window!r}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _integer(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {name} must be a positive integer, not {value!r}")
    return value


def _number(fields: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise CheckpointError(f"config.json: {name} must be a positive number, not {value!r}")
    return float(value)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} must be true or false, not {value!r}")
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    """One id, a list of them, or null."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise CheckpointError(f"config.json: token ids must be non-negative integers, not {value!r}")
    return tuple(ids)
