"""Weights stored in 8 or 4 bits beside scales of blocks of them, as DeepSeek releases them; exact in float32.

`X.scale` holds powers of two (e8m0) for `X.weight`. In bfloat16 nothing is lost either: codes have at most four
significant bits.

Shapes: O rows, I columns of the weight.
"""

import torch
from torch import Tensor

from dspark_server.errors import CheckpointError

FP8_BLOCK = 128  # rows and columns of an 8-bit weight that have one scale
FP4_BLOCK = 32  # columns of a row of a 4-bit weight that have one
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1, by the code's lower three bits; the fourth is the sign


def stored_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a weight of this shape has in a file, by its dtype there: two 4-bit columns make a byte."""
    return (shape[0], -(-shape[1] // 2)) if dtype == "I8" and len(shape) == 2 else shape


def scale_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of its scales."""
    rows, columns = shape
    if dtype == "I8":
        return rows, -(-columns // FP4_BLOCK)
    return -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)


def expanded(codes: Tensor, scales: Tensor, shape: tuple[int, ...], rows: slice, columns: slice) -> Tensor:
    """These rows and columns of the weight [O, I] float32; `codes` as stored, e4m3 [O, I] or packed e2m1 [O, I / 2].

    Raises CheckpointError if a scale is NaN.
    """
    exponents = scales.view(torch.uint8)
    if bool((exponents == 255).any()):
        raise CheckpointError("a scale of a quantized weight is NaN")
    factors = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127)
    row, column = torch.arange(shape[0])[rows], torch.arange(shape[1])[columns]
    if codes.dtype == torch.int8:
        packed = codes[rows].view(torch.uint8)
        nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, columns].long()
        values = torch.tensor([*_FP4, *(-each for each in _FP4)])[nibbles]
        return values * factors[row][:, column // FP4_BLOCK]
    return codes[rows][:, columns].float() * factors[row // FP8_BLOCK][:, column // FP8_BLOCK]
