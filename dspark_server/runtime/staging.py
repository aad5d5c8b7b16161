"""A step's inputs from host to device: one pinned buffer, one copy, addresses that never change."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from dspark_server.runtime.device import Device

ALIGN = 64  # bytes

Field = tuple[tuple[int, ...], torch.dtype]


class Staging:
    """Named arrays in the same order in pinned host memory (`host`) and on the device (`there`).

    Captured work reads `there`. A step writes every field of `host` and uploads all of them, so that no input is left
    from an earlier step.
    """

    def __init__(self, device: Device, fields: Mapping[str, Field]) -> None:
        offsets, size = {}, 0
        for name, (shape, dtype) in fields.items():
            offsets[name] = size
            size += -(-prod(shape) * dtype.itemsize // ALIGN) * ALIGN
        self._device = device
        self._bytes = device.pinned(size)
        self._there = device.zeros((size,), torch.uint8)
        self._fields = dict(fields)
        self._offsets = offsets
        self._last: Any = None
        self.host = {name: self._view(self._bytes, name) for name in fields}
        self.there = {name: self._view(self._there, name) for name in fields}

    def _view(self, memory: Tensor, name: str) -> Tensor:
        shape, dtype = self._fields[name]
        first = self._offsets[name]
        return memory[first : first + prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def upload(self, values: Mapping[str, Tensor | Sequence[int]], rows: int | None = None) -> None:
        """Write values to the beginning of every field, zeros after them, and queue the copy.

        A value may be smaller than its field in any dimension. Of the last field only `rows` rows are sent (None: all);
        the others keep old values.
        """
        assert values.keys() == self._fields.keys(), f"staged {sorted(values)}, declared {sorted(self._fields)}"
        if self._last is not None:  # waits for this buffer's copy only: others are queued behind this step's work
            self._device.uploaded(self._last)
        end, last = len(self._bytes), next(reversed(self._fields))
        if rows is not None:
            shape, dtype = self._fields[last]
            end = self._offsets[last] + rows * prod(shape[1:]) * dtype.itemsize
        for name, value in values.items():
            field = self.host[name][:rows] if name == last else self.host[name]
            field.zero_()
            value = torch.as_tensor(value, dtype=field.dtype)
            if value.numel():
                field[tuple(map(slice, value.shape))] = value
        self._last = self._device.upload(self._bytes[:end], self._there[:end])
