"""KV pool tensors: the target's and the drafter's layers under one block table (ARCHITECTURE, decision 2)."""

from dataclasses import dataclass
from math import prod

import torch
from dspark_kernels import huge_zeros
from torch import Tensor


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one shape: the target's, or the drafter's."""

    layers: int
    kv_heads: int
    head_dim: int


class KVPool:
    """Key and value rows by slot. Each layer's tensors are [S, Hkv, d] with S = num_blocks * block_size."""

    def __init__(self, num_blocks: int, block_size: int, groups: list[LayerGroup], dtype: torch.dtype) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        slots = num_blocks * block_size
        self._layers: list[list[tuple[Tensor, Tensor]]] = []
        for group in groups:
            shape = (group.layers, 2, slots, group.kv_heads, group.head_dim)
            rows = huge_zeros(prod(shape) * dtype.itemsize).view(dtype).view(shape)
            self._layers.append([(rows[i, 0], rows[i, 1]) for i in range(group.layers)])

    def layers(self, group: int) -> list[tuple[Tensor, Tensor]]:
        """(keys, values) of each layer of a group, each [S, Hkv, d]."""
        return self._layers[group]

    @staticmethod
    def bytes_per_block(block_size: int, groups: list[LayerGroup], dtype: torch.dtype) -> int:
        """Bytes that one block of `block_size` tokens takes over all layers of all groups."""
        per_token = sum(2 * g.layers * g.kv_heads * g.head_dim for g in groups)
        return block_size * per_token * dtype.itemsize
