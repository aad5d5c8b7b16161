"""KV pool tensors: the blocks of all layers, target's and drafter's, laid out as runtime/paging.py says."""

from typing import NamedTuple

import torch
from dspark_kernels import Kernels, huge_zeros
from torch import Tensor

from dspark_server.errors import ConfigError
from dspark_server.runtime.device import Device
from dspark_server.runtime.paging import CacheLayout, CachePlace


class LayerCache(NamedTuple):
    """A layer's rows: keys and values, each [blocks, C, Hkv, d], C the tokens per block of its group.

    A layer's part of a block is contiguous; the other layers' parts lie between one block and the next. `values` are
    `keys` where the layer keeps none. Where there is one row for several tokens, C is as much smaller.
    """

    keys: Tensor
    values: Tensor
    group: int


class KVPool:
    """The blocks of every layer.

    On a device there is one block more, which belongs to no request: padding writes to its first slot (`scratch`).
    """

    def __init__(self, num_blocks: int, layout: CacheLayout, dtype: torch.dtype, device: Device | None = None) -> None:
        self.num_blocks = num_blocks
        self.groups = layout.groups
        blocks = num_blocks + (1 if device else 0)
        size = blocks * layout.block_bytes
        memory = device.zeros((size,), torch.uint8) if device else huge_zeros(size)

        def cache(place: CachePlace) -> LayerCache:
            heads, head_dim, kind = place.rows.heads, place.rows.head_dim, place.rows.dtype or dtype
            rows = self.groups[place.group].block_size // place.rows.every
            shape = (blocks, rows, heads, head_dim)
            strides = (layout.block_bytes // kind.itemsize, heads * head_dim, head_dim, 1)
            keys, values = (
                memory.view(kind).as_strided(shape, strides, start // kind.itemsize)
                for start in (place.keys, place.values)
            )
            return LayerCache(keys, values, place.group)

        self._layers = [list(map(cache, places)) for places in layout.places]

    def layers(self, owner: int) -> list[LayerCache]:
        """The caches of an owner's layers: 0 the target, 1 the drafter."""
        return self._layers[owner]

    @property
    def scratch(self) -> list[int]:
        """For each group a slot that no request has, on a device."""
        return [self.num_blocks * group.block_size for group in self.groups]


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
