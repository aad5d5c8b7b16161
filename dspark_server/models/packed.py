"""Weights of 4 or 8 bits packed into 32-bit words: compressed-tensors' pack-quantized, GPTQ, AWQ.

Shapes: O rows, I columns of the weight, G groups of columns; p = 32 / bits integers make a word, the lowest bits first.

| format | words | scales | zeros |
| --- | --- | --- | --- |
| pack-quantized | `weight_packed` [O, I / p], of codes + 2^(bits - 1) | `weight_scale` [O, G] | none |
| GPTQ | `qweight` [I / p, O] | `scales` [G, O] | `qzeros` [G, O / p], less 1 (not so in gptq_v2) |
| AWQ | `qweight` [I, O / p], in a word in the order 0 2 4 6 1 3 5 7 | `scales` [G, O] | `qzeros` [G, O / p] |

GPTQ's `g_idx` [I], and pack-quantized's `weight_g_idx`, name the group of each column (act-order).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.runtime.quantized import QuantizedMatrix

WORDS = ("weight_packed", "qweight")  # in place of "weight" at the end of a name
OTHERS = ("weight_shape", "weight_g_idx", "scales", "qzeros", "g_idx")
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # place in its word of each of eight integers

Read = Callable[[str], Tensor | None]  # of the end of a name in place of "weight"; None: there is no such tensor


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """The unsigned integers of int32 words, int32, p times as many along `dim`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (words.movedim(dim, -1).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return values.flatten(-2).movedim(-1, dim)


def read_packed(read: Read, shape: tuple[int, int], version: str) -> QuantizedMatrix:
    """The matrix [O, I] whose tensors `read` gives; `version` is the `checkpoint_format` of GPTQ, or "awq".

    Raises CheckpointError if their shapes do not belong together.
    """
    height, width = shape
    words = read("weight_packed")
    if words is not None:
        scales = _there(read("weight_scale"), "weight_scale").float().view(height, -1)
        bits = _bits(words.shape, (height, width), 1)
        codes = unpacked(words, bits, 1)[:, :width] - (1 << (bits - 1))
        return _matrix(codes, scales, None, read("weight_g_idx"), bits)
    words, scales = _there(read("qweight"), "qweight"), _there(read("scales"), "scales").float().t()
    zero_words = _there(read("qzeros"), "qzeros")
    if version == "awq":
        bits, order = _bits(words.shape, (width, height), 1), _awq_order(height)
        codes = unpacked(words, bits, 1)[:, order].t()
        zeros = unpacked(zero_words, bits, 1)[:, order].t().float()
        return _matrix(codes, scales, zeros, None, bits)
    bits = _bits(words.shape, (width, height), 0)
    codes = unpacked(words, bits, 0)[:width].t()
    zeros = unpacked(zero_words, bits, 1)[:, :height].t().float() + (0 if version == "gptq_v2" else 1)
    return _matrix(codes, scales, zeros, read("g_idx"), bits)


def _matrix(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_of: Tensor | None, bits: int) -> QuantizedMatrix:
    height, width = codes.shape
    groups = scales.shape[1]
    if scales.shape[0] != height or (zeros is not None and zeros.shape != scales.shape):
        raise CheckpointError(f"scales of shape {list(scales.shape)} do not belong to {height} rows")
    if width % groups:
        raise CheckpointError(f"{width} columns make no {groups} groups of one size")
    group, order = width // groups, None
    if group_of is not None and not torch.equal(group_of.long(), torch.arange(width) // group):
        order = group_of.argsort(stable=True)
        if not torch.equal(group_of[order].long(), torch.arange(width) // group):
            raise CheckpointError(f"g_idx does not name {group} columns of each of {groups} groups")
        codes = codes[:, order]
    if bits == 8 and zeros is not None:  # unsigned integers of 8 bits are moved to signed ones
        codes, zeros = codes - 128, zeros - 128
    return QuantizedMatrix(codes.to(torch.int8), scales, group, bits, zeros, order)


def _bits(words: torch.Size, shape: tuple[int, int], dim: int) -> int:
    """Bits of an integer, from the shape of the words and that of their matrix, packed along `dim`."""
    for bits in (4, 8):
        expected = list(shape)
        expected[dim] = -(-shape[dim] * bits // 32)
        if list(words) == expected:
            return bits
    raise CheckpointError(f"words of shape {list(words)} hold no {list(shape)} integers of 4 or 8 bits")


def _awq_order(height: int) -> Tensor:
    """Places of the integers 0 .. height - 1 among those that were unpacked in order of bits."""
    return (torch.arange(0, height, 8).unsqueeze(1) + torch.tensor(_AWQ_ORDER)).flatten()


def _there(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise CheckpointError(f"{name} is missing beside its words")
    return tensor
