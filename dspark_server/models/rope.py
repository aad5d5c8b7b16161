"""Rotary position tables: default, linear, dynamic NTK, llama3 and yarn, as transformers 5 computes them."""

import math

import torch
from torch import Tensor

from dspark_server.models.config import ModelConfig, RopeConfig


def rotary_table(config: ModelConfig, length: int, positions: int | None = None) -> Tensor:
    """cos and sin by position -> [P, d] float32: d/2 cosines, then d/2 sines, attention scaling included.

    `length` is the served maximum length, which determines the frequencies of `dynamic` (the default ones up to the
    model's own maximum). `positions` is P, by default `length`; speculation needs a few rows more, as a block may begin
    at the last position.
    """
    frequencies = _frequencies(config.rope, config.head_dim, length)
    angles = torch.outer(torch.arange(positions or length, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1) * _attention_scaling(config.rope)


def may_be_frequencies(stored: Tensor, config: ModelConfig) -> bool:
    """Whether `stored`, a buffer that an old exporter saved, holds this model's frequencies, or those before scaling.

    They may have been rounded to bfloat16.
    """
    expected = (
        _base_frequencies(config.rope.theta, config.head_dim),
        _frequencies(config.rope, config.head_dim, config.max_position),
    )
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
