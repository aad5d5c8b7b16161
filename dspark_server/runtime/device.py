"""The narrow interface to a device with its own memory and queue, and its CUDA implementation.

All other code for GPUs uses `Device`. Tests replace it by one without hardware that enforces CUDA's rules
(tests/runtime/twin.py; docs/gpu.md). On a CPU there is no Device: the engine runs on plain tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from dspark_server.errors import ConfigError

T = TypeVar("T")


class Graph(Protocol[T]):
    """Recorded work: the same kernels on the same addresses, with Python's numbers at recording time."""

    result: T  # what the recorded function returned; each replay writes into these tensors

    def replay(self) -> None:
        """Queue the work again."""


class Device(Protocol):
    """A device, its queue and the host memory it reads by itself. Only the step thread uses it."""

    name: str  # "cuda"
    label: str  # the model of the hardware, for people
    where: torch.device
    syncs: int  # number of times the host has waited for results

    def pinned(self, size: int) -> Tensor:
        """Return `size` zero bytes [size] uint8 of host memory, which `upload` copies without the host's help."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return zeroed memory on the device."""

    def upload(self, host: Tensor, there: Tensor) -> Any:
        """Queue a copy of pinned bytes to the device. `host` must not change before a call of `uploaded`."""

    def uploaded(self, upload: Any) -> None:
        """Wait until an upload has read its host memory; returns at once if there was a `fetch` since."""

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Wait until all queued work is done (counted in `syncs`) and return host copies of device tensors."""

    def capture(self, work: Callable[[], T]) -> Graph[T]:
        """Run `work` once, then record it. It must not read results, nor allocate depending on them."""

    def mark(self) -> Any:
        """Return a point in the queue, for `seconds`."""

    def seconds(self, first: Any, last: Any) -> float:
        """Return the device's time from mark to mark, both of them before the last `fetch`."""

    def memory(self) -> tuple[int, int]:
        """Return the bytes that are free, and all bytes."""

    def peak(self, work: Callable[[], object]) -> int:
        """Return the peak memory of `work` in bytes, beyond what is already allocated."""

    def check(self, dtype: torch.dtype) -> None:
        """Raise ConfigError if the device cannot compute in `dtype`, or store a KV cache in it."""


class CudaGraph(Generic[T]):
    """torch.cuda.CUDAGraph and what its recorded function returned."""

    def __init__(self, graph: Any, result: T) -> None:
        self._graph = graph
        self.result = result

    def replay(self) -> None:
        self._graph.replay()


class CudaDevice:
    """One NVIDIA GPU through torch.cuda. No part of this class has run here: docs/gpu.md, "Not checked".

    It becomes the current device of the calling thread; that of every other thread is GPU 0, which is rank 0's.
    """

    name = "cuda"

    def __init__(self, index: int = 0) -> None:
        """Raises ConfigError if there is no such GPU."""
        found = cuda_devices()
        if index >= found:
            raise ConfigError(f"--device cuda: there is no GPU {index}; torch sees {found}.")
        self.where = torch.device("cuda", index)
        self.syncs = 0
        torch.cuda.set_device(self.where)
        self.label = torch.cuda.get_device_name(self.where)
        self._pool: Any = None  # graphs never run at the same time, so they share their intermediate memory
        self._landing: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}

    def pinned(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, pin_memory=True)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, device=self.where)

    def upload(self, host: Tensor, there: Tensor) -> Any:
        there.copy_(host, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return event

    def uploaded(self, upload: Any) -> None:
        upload.synchronize()

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        landed = []
        for index, tensor in enumerate(tensors):
            key = (index, tensor.shape, tensor.dtype)
            if key not in self._landing:
                if len(self._landing) > 256:
                    self._landing.clear()
                self._landing[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            landed.append(self._landing[key].copy_(tensor, non_blocking=True))
        torch.cuda.current_stream().synchronize()
        self.syncs += 1
        return [tensor.clone() for tensor in landed]  # the next fetch overwrites the pinned tensors

    def capture(self, work: Callable[[], T]) -> CudaGraph[T]:
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            work()  # a first run, not recorded, compiles kernels and sets up libraries
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog may query its events meanwhile, on its own thread.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        self._pool = self._pool or graph.pool()
        return CudaGraph(graph, result)

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        return float(first.elapsed_time(last)) / 1e3

    def memory(self) -> tuple[int, int]:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.where)
        return free, total

    def peak(self, work: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.where)
        before = torch.cuda.memory_allocated(self.where)
        work()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated(self.where) - before)

    def check(self, dtype: torch.dtype) -> None:
        major, minor = torch.cuda.get_device_capability(self.where)
        if dtype == torch.bfloat16 and major < 8:
            raise ConfigError(f"--dtype bfloat16 needs compute capability 8.0, this GPU has {major}.{minor}: float16.")
        if dtype == torch.float8_e4m3fn and (major, minor) < (8, 9):
            raise ConfigError(
                f"--kv-cache-dtype fp8 needs compute capability 8.9, this GPU has {major}.{minor}: leave it at auto."
            )


def find_device(name: str, index: int = 0) -> CudaDevice | None:
    """Return the device "auto", "cpu" or "cuda" (the GPU of this index); None: the CPU, the fallback of "auto".

    Raises ConfigError for "cuda" where torch sees no GPU, with the reason.
    """
    if name == "cpu" or (name == "auto" and not cuda_devices()):
        return None
    if not cuda_devices():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no NVIDIA driver or GPU answers"
        raise ConfigError(f"--device cuda: {why} (torch {torch.__version__}). Install a CUDA build, or --device cpu.")
    return CudaDevice(index)


def cuda_devices() -> int:
    """Number of GPUs that torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
