"""KV pool tensors: the target's and the drafter's layers under one block table (ARCHITECTURE, decision 2)."""

from dataclasses import dataclass
from math import prod

import torch
from dspark_kernels import Kernels, huge_zeros
from torch import Tensor

from dspark_server.errors import ConfigError
from dspark_server.runtime.device import Device


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one shape: the target's, or the drafter's."""

    layers: int
    kv_heads: int
    head_dim: int


class KVPool:
    """Key and value rows by slot. Each layer's tensors are [S, Hkv, d] with S = num_blocks * block_size.

    On a device there is one block more, which belongs to no request: padding writes to its first slot, `scratch`.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        groups: list[LayerGroup],
        dtype: torch.dtype,
        device: Device | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.scratch = num_blocks * block_size
        slots = self.scratch + (block_size if device else 0)
        self._layers: list[list[tuple[Tensor, Tensor]]] = []
        for group in groups:
            shape = (group.layers, 2, slots, group.kv_heads, group.head_dim)
            size = prod(shape) * dtype.itemsize
            memory = device.zeros((size,), torch.uint8) if device else huge_zeros(size)
            rows = memory.view(dtype).view(shape)
            self._layers.append([(rows[i, 0], rows[i, 1]) for i in range(group.layers)])

    def layers(self, group: int) -> list[tuple[Tensor, Tensor]]:
        """(keys, values) of each layer of a group, each [S, Hkv, d]."""
        return self._layers[group]

    @staticmethod
    def bytes_per_block(block_size: int, groups: list[LayerGroup], dtype: torch.dtype) -> int:
        """Bytes that one block of `block_size` tokens takes over all layers of all groups."""
        per_token = sum(2 * g.layers * g.kv_heads * g.head_dim for g in groups)
        return block_size * per_token * dtype.itemsize


def cache_dtype(name: str, dtype: torch.dtype, kernels: Kernels, device: Device | None) -> torch.dtype:
    """The dtype of the KV cache, by the setting's name, for a model that computes in `dtype`.

    fp8 is e4m3 with scale 1, as vLLM's default: values are clamped to its range of +-448. Raises ConfigError for a
    dtype that the kernels or the device cannot read.
    """
    if name == "fp8":
        if not kernels.reads_fp8:
            raise ConfigError(f"--kv-cache-dtype fp8: the kernels {kernels.name} cannot read it; leave it at auto.")
        stored = torch.float8_e4m3fn
    else:
        stored = {"auto": dtype, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
        if stored != dtype:
            model = str(dtype).removeprefix("torch.")
            raise ConfigError(
                f"--kv-cache-dtype {name}: the model computes in {model}, and its cache is in the same type or in "
                "fp8; leave it at auto, or change --dtype."
            )
    if device:
        device.check(stored)
    return stored


def blocks_that_fit(device: Device, utilization: float, working: int, block_bytes: int) -> int:
    """KV blocks for the share `utilization` of all device memory, less memory in use and a step's `working` bytes.

    Raises ConfigError if that leaves none.
    """
    free, total = device.memory()
    room = int(utilization * total) - (total - free) - working
    if room < block_bytes:
        gib = 1 << 30
        raise ConfigError(
            f"--gpu-memory-utilization {utilization}: of {total / gib:.1f} GiB, {(total - free) / gib:.1f} are in use "
            f"and a step needs {working / gib:.1f}: nothing is left for the KV cache. Raise it, or lower "
            "--max-num-batched-tokens, or serve a smaller model."
        )
    return room // block_bytes
