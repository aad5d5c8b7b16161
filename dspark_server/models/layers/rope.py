"""Rotary position embedding: its parameters and tables (default, linear, dynamic NTK, llama3, yarn, proportional).

Computed as transformers 5 does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.models.fields import Fields, number

Kind = Literal["default", "linear", "dynamic", "llama3", "yarn", "proportional"]

# Parameters of each kind besides its type and theta: (required, optional).
_PARAMETERS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, set()),
    "yarn": ({"factor"}, {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    "proportional": (set(), {"partial_rotary_factor"}),
}


@dataclass(frozen=True)
class RopeConfig:
    """A rotary embedding. Fields that `type` does not use keep their defaults.

    `original_max_position` is the length the model was trained at before its context was extended. `proportional`
    rotates the first `partial_rotary_factor` of the pairs, at the frequencies that they have among all of them.
    """

    type: Kind
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
    partial_rotary_factor: float = 1.0

    def max_length(self, max_position: int) -> int:
        """The longest sequence that the embedding supports, in tokens, in a model of `max_position` positions."""
        if self.type in ("dynamic", "yarn"):
            return max(max_position, int(self.factor * self.original_max_position))
        return max_position


def rope_config(fields: Fields, max_position: int) -> RopeConfig:
    """Read `rope_parameters` of transformers 5, or the older rope_theta and rope_scaling: one set for all layers.

    Raises CheckpointError for parameters that are not understood.
    """
    given: Any = next(
        (fields[name] for name in ("rope_parameters", "rope_scaling") if fields.get(name) is not None), {}
    )
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise CheckpointError(f"config.json: rope parameters {given!r}: one set for all layers is supported, no other")
    return rope_parameters(given, fields, max_position)


def rope_parameters(given: Fields, fields: Fields, max_position: int) -> RopeConfig:
    """One set of rope parameters; `fields` are the config's own, where older ones are."""
    scaling = {key: value for key, value in given.items() if value is not None}
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    if not isinstance(kind, str) or kind not in _PARAMETERS:
        raise CheckpointError(f"config.json: rope type {kind!r} is not supported; {', '.join(_PARAMETERS)} are")
    theta = number(scaling, "rope_theta", number(fields, "rope_theta", 10_000.0))
    original = scaling.pop("original_max_position_embeddings", max_position)
    # In transformers a top-level field overrides the one in the rope parameters; dynamic uses neither.
    original = fields.get("original_max_position_embeddings") or original
    if kind not in ("llama3", "yarn"):
        original = max_position
    partial = scaling.get("partial_rotary_factor", fields.get("partial_rotary_factor") or 1.0)
    if kind != "proportional" and scaling.pop("partial_rotary_factor", partial) != 1.0:
        raise CheckpointError("config.json: partial_rotary_factor is not supported; the whole head must be rotated")
    scaling.pop("rope_theta", None)

    required, optional = _PARAMETERS[kind]
    if wrong := (required - set(scaling)) | (set(scaling) - required - optional):
        raise CheckpointError(
            f"config.json: rope type {kind!r} takes {sorted(required)} and may take {sorted(optional)}; "
            f"missing or not understood: {sorted(wrong)}"
        )
    truncate = scaling.pop("truncate", True)
    numbers = {key: number(scaling, key) for key in scaling}
    if numbers.get("partial_rotary_factor", 1.0) > 1.0:
        raise CheckpointError(f"config.json: partial_rotary_factor must be at most 1, not {scaling}")
    if numbers.get("factor", 1.0) < 1.0:
        raise CheckpointError(f"config.json: rope factor must be at least 1, not {numbers['factor']}")
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise CheckpointError("config.json: rope type 'llama3' needs low_freq_factor below high_freq_factor")
    return RopeConfig(cast(Kind, kind), theta, int(original), truncate=bool(truncate), **numbers)


def rotary_table(rope: RopeConfig, head_dim: int, length: int, positions: int | None = None) -> Tensor:
    """cos and sin by position -> [P, d] float32: d/2 cosines, then d/2 sines, attention scaling included.

    `length` is the served maximum length, which determines the frequencies of `dynamic` (the default ones up to the
    model's own maximum). `positions` is P, by default `length`; speculation needs a few rows more, as a block may begin
    at the last position.
    """
    frequencies = _frequencies(rope, head_dim, length)
    angles = torch.outer(torch.arange(positions or length, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1) * _attention_scaling(rope)


def may_be_frequencies(stored: Tensor, rope: RopeConfig, head_dim: int) -> bool:
    """Whether `stored`, a buffer that an old exporter saved, holds the frequencies of `rope`, or those before scaling.

    They may have been rounded to bfloat16.
    """
    expected = _base_frequencies(rope.theta, head_dim), _frequencies(rope, head_dim, rope.original_max_position)
    return any(
        stored.shape == each.shape and torch.allclose(stored.float(), each, rtol=2**-7, atol=0) for each in expected
    )


def _frequencies(rope: RopeConfig, head_dim: int, length: int) -> Tensor:
    """Radians per position -> [d/2] float32."""
    match rope.type:
        case "linear":
            return _base_frequencies(rope.theta, head_dim) / rope.factor
        case "dynamic":
            stretch = rope.factor * max(length, rope.original_max_position) / rope.original_max_position
            theta = rope.theta * (stretch - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
            return _base_frequencies(theta, head_dim)
        case "llama3":
            return _llama3_frequencies(rope, head_dim)
        case "yarn":
            return _yarn_frequencies(rope, head_dim)
        case "proportional":
            frequencies = _base_frequencies(rope.theta, head_dim)
            frequencies[int(rope.partial_rotary_factor * head_dim // 2) :] = 0.0
            return frequencies
        case _:
            return _base_frequencies(rope.theta, head_dim)


def _base_frequencies(theta: float, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (theta**exponents)


def _llama3_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Low frequencies are divided by `factor`, high ones kept, those between interpolated (Llama 3.1)."""
    frequencies = _base_frequencies(rope.theta, head_dim)
    turns = rope.original_max_position * frequencies / (2 * math.pi)  # full turns over the training length
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def _yarn_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Interpolation of original and scaled frequencies by dimension (YaRN §3.2)."""

    def dimension_of(turns: float) -> float:
        """The (fractional) pair index whose wave makes `turns` full turns over the training length."""
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    slowed = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = _base_frequencies(rope.theta, head_dim)
    return frequencies / rope.factor * slowed + frequencies * (1 - slowed)


def _attention_scaling(rope: RopeConfig) -> float:
    """YaRN's temperature on attention, applied to cos and sin and thereby to q and k alike."""
    if rope.type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
