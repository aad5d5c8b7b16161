"""Weights stored in 8 or 4 bits beside scales; exact in float32.

DeepSeek's releases have powers of two (e8m0) in `X.scale` for `X.weight`, of blocks of e4m3 or runs of e2m1. In
bfloat16 nothing is lost either: codes have at most four significant bits. Others have floats, of a tensor, of each row
or of blocks: in `X.weight_scale_inv` (which is the scale, not its inverse) or `X.weight_scale`.

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


def scaled(codes: Tensor, scales: Tensor, rows: slice, columns: slice) -> Tensor:
    """These rows and columns of the weight [O, I] float32; `codes` e4m3 or int8 [O, I].

    `scales`, of floats, has one element, [O, 1] or [O], or one for each block of 128 x 128.

    Raises CheckpointError if it has another shape.
    """
    height, width = codes.shape
    values, factors = codes[rows][:, columns].float(), scales.float()
    if factors.numel() == 1:
        return values * factors.flatten()
    if tuple(factors.shape) in ((height, 1), (height,)):
        return values * factors.view(-1, 1)[rows]
    if tuple(factors.shape) != (-(-height // FP8_BLOCK), -(-width // FP8_BLOCK)):
        raise CheckpointError(
            f"its scales have shape {list(factors.shape)}: neither one, nor one of each of {height} rows, nor of each "
            f"block of {FP8_BLOCK} x {FP8_BLOCK}"
        )
    row, column = torch.arange(height)[rows], torch.arange(width)[columns]
    return values * factors[row // FP8_BLOCK][:, column // FP8_BLOCK]
