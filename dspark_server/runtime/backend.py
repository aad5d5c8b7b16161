"""The choice of kernels and attention for a device."""

import dspark_kernels
import torch
from dspark_kernels import Kernels

from dspark_server.errors import ConfigError
from dspark_server.runtime.device import Device


def choose_kernels(
    attention: str,
    device: Device | None,
    dtype: torch.dtype,
    block_size: int,
    cache: str = "auto",
    obstacle: str | None = None,
) -> Kernels:
    """Return the CPU's kernels, or a GPU's Triton kernels, with flash-attn's attention if that is requested.

    `attention` is "auto", "flash-attn" or "triton"; `cache` names the KV cache's dtype; for fp8, auto takes Triton.
    `obstacle` says why flash-attn cannot serve the model, None: it can.
    Raises ConfigError for an attention that is not installed, or does not support `dtype` or `block_size`.
    """
    if device is None:
        return dspark_kernels.load()
    try:
        kernels = dspark_kernels.load("triton")
    except (dspark_kernels.KernelBuildError, ValueError) as error:
        raise ConfigError(
            f"--device {device.name} needs the Triton kernels, which do not load ({error}): "
            "pip install dspark-server[gpu]."
        ) from None
    if attention == "triton":
        return kernels
    from dspark_kernels import flash

    if attention == "auto" and (not flash.installed() or dtype == torch.float32 or cache == "fp8" or obstacle):
        return kernels
    try:
        if obstacle:
            raise flash.FlashAttentionError(obstacle)
        return flash.over(kernels, dtype, block_size)
    except flash.FlashAttentionError as error:
        raise ConfigError(f"--attention-backend {attention}: {error} Or take --attention-backend triton.") from None


_in_use: tuple[int, int] | None = None  # torch's threads as last set here, and those that compute


def use_threads(count: int, kernels: Kernels, *, products: bool) -> None:
    """Compute with `count` threads on the CPU; `products`: the kernels have the matrix products.

    torch is then left with operations too small to be shared, and gets one thread. More of them sleep between these
    operations, are woken up some ten times a step, and find the processors taken by the kernels' own.
    """
    global _in_use
    kernels.threads = count
    _in_use = (1 if products else count), count
    torch.set_num_threads(_in_use[0])


def threads_in_use() -> int:
    """Number of threads that compute: as set by `use_threads`, or by torch, whichever came last."""
    now = torch.get_num_threads()
    return _in_use[1] if _in_use and _in_use[0] == now else now
