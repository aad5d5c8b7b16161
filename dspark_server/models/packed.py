"""Weights of 4 or 8 bits packed into 32-bit words: compressed-tensors' pack-quantized, GPTQ, AWQ.

Shapes: O rows, I columns of the weight, G groups of columns; p = 32 / bits integers make a word, the lowest bits first.

| format | words | scales | zeros |
| --- | --- | --- | --- |
| pack-quantized | `weight_packed` [O, I / p], of codes + 2^(bits - 1) | `weight_scale` [O, G] | none |
| GPTQ | `qweight` [I / p, O] | `scales` [G, O] | `qzeros` [G, O / p], less 1 (not so in gptq_v2) |
| AWQ | `qweight` [I, O / p], in a word in the order 0 2 4 6 1 3 5 7 | `scales` [G, O] | `qzeros` [G, O / p] |

GPTQ's `g_idx` [I], and pack-quantized's `weight_g_idx`, name the group of each column (act-order). Sources:
compressed-tensors 0.12 (`pack_to_int32`), the layouts of AutoGPTQ and AutoAWQ.
"""

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.runtime.quantized import QuantizedMatrix

WORDS = ("weight_packed", "qweight")  # in place of "weight" at the end of a name
BESIDE = ("weight_shape", "weight_g_idx", "scales", "qzeros", "g_idx")  # likewise; `weight_scale` is also others'
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # place in its word of each of eight integers

Read = Callable[[str], Tensor | None]  # of the end of a name in place of "weight"; None: there is no such tensor


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """The unsigned integers of int32 words, int32, p times as many along `dim`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (words.movedim(dim, -1).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return values.flatten(-2).movedim(-1, dim)


def read_packed(read: Read, shape: tuple[int, int], version: str) -> QuantizedMatrix:
    """The matrix [O, I] whose tensors `read` gives; `version` is the `checkpoint_format` of GPTQ, or "awq".

    Raises CheckpointError if one is missing, or is of a shape or type that does not belong to the others.
    """
    height, width = shape
    words = read("weight_packed")
    if words is not None:
        bits = _bits(words, (height, width), 1)
        codes = unpacked(words, bits, 1)[:, :width] - (1 << (bits - 1))
        return _matrix(codes, _scales(read("weight_scale"), height), None, read("weight_g_idx"), bits)
    words, scales = _there(read("qweight"), "qweight"), _scales(_there(read("scales"), "scales").t(), height)
    awq = version == "awq"
    bits = _bits(words, (width, height), 1 if awq else 0)
    zero_words = _there(read("qzeros"), "qzeros")
    if _bits(zero_words, (scales.shape[1], height), 1) != bits:
        raise CheckpointError(f"qzeros of shape {list(zero_words.shape)} have other integers than qweight")
    zeros = unpacked(zero_words, bits, 1)
    if awq:
        order = _awq_order(height)
        return _matrix(unpacked(words, bits, 1)[:, order].t(), scales, zeros[:, order].t().float(), None, bits)
    added = 0 if version == "gptq_v2" else 1
    return _matrix(
        unpacked(words, bits, 0)[:width].t(), scales, zeros[:, :height].t().float() + added, read("g_idx"), bits
    )


def count_values(shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], name: str) -> int:
    """The number of integers of words `name`, from the shapes of all tensors; `read` gives a small one.

    Of words without the tensors that belong to them, 8 each.
    """
    packed, gptq = name.removesuffix("weight_packed"), name.removesuffix("qweight")
    if packed != name and f"{packed}weight_shape" in shapes:
        return prod(read(f"{packed}weight_shape").tolist())
    if gptq != name and {f"{gptq}scales", f"{gptq}qzeros"} <= shapes.keys():
        return prod(shapes[name]) * -(-shapes[f"{gptq}scales"][1] // shapes[f"{gptq}qzeros"][1])
    return prod(shapes[name]) * 8


def _matrix(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_of: Tensor | None, bits: int) -> QuantizedMatrix:
    width, groups = codes.shape[1], scales.shape[1]
    if width % groups:
        raise CheckpointError(f"{width} columns make no {groups} groups of one size")
    group, order = width // groups, None
    if group_of is not None and group_of.shape != (width,):
        raise CheckpointError(f"g_idx of shape {list(group_of.shape)} does not name the group of {width} columns")
    if group_of is not None and not torch.equal(group_of.long(), torch.arange(width) // group):
        order = group_of.argsort(stable=True)
        if not torch.equal(group_of[order].long(), torch.arange(width) // group):
            raise CheckpointError(f"g_idx does not name {group} columns of each of {groups} groups")
        codes = codes[:, order]
    if bits == 8 and zeros is not None:  # unsigned integers of 8 bits are moved to signed ones
        codes, zeros = codes - 128, zeros - 128
    offsets = None if zeros is None else -scales * zeros  # exact in float32, as is the weight: 19 bits at most
    return QuantizedMatrix(codes.to(torch.int8), scales, group, bits, offsets, order)


def _scales(scales: Tensor | None, height: int) -> Tensor:
    """Scales [O, G] float32, of [O, G] or [O]."""
    scales = _there(scales, "weight_scale")
    if scales.shape[:1] != (height,) or scales.dim() > 2:
        raise CheckpointError(f"scales of shape {list(scales.shape)} do not belong to {height} rows")
    return scales.float().reshape(height, -1)


def _bits(words: Tensor, shape: tuple[int, int], dim: int) -> int:
    """Bits of an integer, from the shape of the words and that of their matrix, packed along `dim`."""
    for bits in (4, 8):
        expected = list(shape)
        expected[dim] = -(-shape[dim] * bits // 32)
        if list(words.shape) == expected and words.dtype == torch.int32:
            return bits
    raise CheckpointError(
        f"words of shape {list(words.shape)} and type {words.dtype} hold no {list(shape)} integers of 4 or 8 bits"
    )


def _awq_order(height: int) -> Tensor:
    """Places of the integers 0 .. height - 1 among those that were unpacked in order of bits."""
    return (torch.arange(0, height, 8).unsqueeze(1) + torch.tensor(_AWQ_ORDER)).flatten()


def _there(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise CheckpointError(f"{name} is missing beside its words")
    return tensor
