"""A kernel launch: the kernel with its grid, arguments and compile-time choices, to be run or compiled ahead."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Gpu:
    """The GPU's properties for tiling: streaming multiprocessors, and the compute capability times ten."""

    processors: int
    capability: int


H100 = Gpu(132, 90)


@dataclass(frozen=True)
class Launch:
    """One launch. `arguments` are the kernel's parameters by name; tensors on the meta device if it never runs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    registers: int | None = 168
    constants: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options; a product may be fused with the sum after it.

        Without a bound on a thread's `registers`, ptxas spills a few bytes of small kernels for the sake of occupancy.
        """
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        if self.registers is not None:
            options["maxnreg"] = min(self.registers, 65536 // (32 * self.num_warps))
        return options

    def run(self) -> None:
        """Start it on the current stream; an empty grid starts nothing."""
        if all(self.grid):
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)

    def signature(self) -> dict[str, str]:
        """Triton's type of each parameter, in the kernel's order."""
        return {name: self._type(name) for name in self.kernel.arg_names}

    def constexprs(self) -> dict[str, Any]:
        """The parameters whose values are compiled in: the constants, and absent tensors."""
        absent = {name: None for name, value in self.arguments.items() if value is None}
        return {**absent, **self.constants}

    def divisible(self) -> list[int]:
        """Parameters that a just-in-time compilation would find to be multiples of 16, as torch aligns tensors at least
        so.
        """
        unspecialized = {parameter.name for parameter in self.kernel.params if parameter.do_not_specialize}
        return [
            index
            for index, name in enumerate(self.kernel.arg_names)
            if isinstance(value := self.arguments.get(name), Tensor)
            or (type(value) is int and value % 16 == 0 and name not in unspecialized)
        ]

    def _type(self, name: str) -> str:
        value = self.arguments.get(name)
        if value is None:
            return "constexpr"
        if isinstance(value, Tensor):
            return "*" + _TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"


def power_of_two(number: int) -> int:
    """The least power of two that is at least `number` (and at least 1)."""
    return 1 << max(number - 1, 0).bit_length()
