"""The operations of a decoder, matrix products included: for CPUs, for GPUs, and plain PyTorch references of them.

`load()` gives the native CPU kernels (built once into the user's cache), `load("triton")` those for a CUDA GPU,
`load("reference")` their reference. The contract of all is `Kernels`.
"""

import os
import sys
import warnings

from dspark_kernels.cpu.build import KernelBuildError, build
from dspark_kernels.cpu.memory import huge_zeros
from dspark_kernels.cpu.native import NativeKernels
from dspark_kernels.interface import (
    UNNAMED,
    DraftedTokens,
    Favour,
    Filters,
    FusedLayer,
    Kernels,
    LayerParts,
    PackedExperts,
    PackedLinear,
    Ruled,
    Rules,
)
from dspark_kernels.reference import ReferenceKernels

__all__ = [
    "UNNAMED",
    "DraftedTokens",
    "Favour",
    "Filters",
    "FusedLayer",
    "KernelBuildError",
    "Kernels",
    "LayerParts",
    "PackedExperts",
    "PackedLinear",
    "ReferenceKernels",
    "Ruled",
    "Rules",
    "huge_zeros",
    "load",
]


def load(name: str = "auto") -> Kernels:
    """The kernel set "native", "triton", "reference", or "auto": native if it can be built, else reference, warned.

    The environment variable DSPARK_KERNELS sets the meaning of "auto". Raises KernelBuildError if "native" cannot be
    built or "triton" cannot run here, and ValueError for an unknown name.
    """
    if name == "auto":
        name = os.environ.get("DSPARK_KERNELS") or "auto"
    if name == "reference":
        return ReferenceKernels()
    if name == "triton":
        return _triton()
    if name not in ("auto", "native"):
        raise ValueError(f"kernels must be auto, native, triton or reference, not {name!r}")
    try:
        return NativeKernels(build())
    except (KernelBuildError, OSError) as error:
        if name == "native":
            raise
        message = f"SLOW: running on the plain PyTorch kernels, because: {error}"
        print(f"dspark: {message}", file=sys.stderr)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return ReferenceKernels()


def _triton() -> Kernels:
    try:
        from dspark_kernels.triton.set import TritonKernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise KernelBuildError("the Triton kernels need the PyPI package triton (pip install triton)") from None
    return TritonKernels()
