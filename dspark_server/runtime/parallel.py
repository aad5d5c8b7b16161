"""Tensor parallelism: ranks that hold a share of every layer each, and meet over torch.distributed (docs/parallel.md).

Rank 0 leads: it plans, drafts and samples, and tells the others by messages of plain bytes what to run with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_server.errors import ConfigError, EngineDeadError

PATIENCE = 600.0  # seconds to find each other at the start, and for one collective; the watchdog is stricter
_FRAME = 1 << 14  # bytes of a message that travel at once
_PREFIX = 8  # of them its length
_FOREVER = timedelta(days=365)  # how long a rank waits for work: a server may be idle


class Group:
    """The ranks that share a model. In this one there is but one: everything is its own, and nothing is sent."""

    rank = 0
    size = 1

    def share(self, total: int) -> slice:
        """Which of `total` rows, columns or heads are this rank's: equal shares, the last cut short."""
        return slice(None)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, which is written over, on each of them."""
        return x

    def gather(self, x: Tensor, columns: int) -> Tensor:
        """All ranks' x [M, n] beside each other, the first `columns` of them, on rank 0; elsewhere x itself."""
        return x

    def least(self, count: int) -> int:
        """The smallest of all ranks' `count`, on each of them."""
        return count


ALONE = Group()


class TorchGroup(Group):
    """Ranks over torch.distributed. Every call must be made by all of them, in the same order.

    A rank that is gone, or silent for too long, is an EngineDeadError: what was to be computed together never will be.
    """

    def __init__(self, rank: int, size: int, control: dist.ProcessGroup) -> None:
        self.rank = rank
        self.size = size
        self.on_gpus = False
        self._control = control  # for messages and counts, over gloo
        self._tensors: dist.ProcessGroup | None = None  # for tensors; None: the one of all ranks, over gloo

    @classmethod
    def join(
        cls, store: Any, rank: int, size: int, where: torch.device | None = None, timeout: float = PATIENCE
    ) -> "TorchGroup":
        """Meet `size` ranks at `store`, or where torchrun's variables say (None).

        Tensors travel by NCCL if `where`, this rank's device, is a GPU, else by gloo. `timeout` is for one collective,
        in seconds, if it is longer than PATIENCE. Raises EngineDeadError if they do not all come, ConfigError if some
        have a GPU and some have none.
        """
        patience = timedelta(seconds=max(timeout, PATIENCE))
        with _together("the ranks did not meet"):
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
            group = cls(rank, size, dist.new_group(backend="gloo", timeout=_FOREVER))
        group.on_gpus = where is not None and where.type == "cuda"
        if group.least(group.on_gpus) != -group.least(-group.on_gpus):
            mine, theirs = ("a GPU", "none") if group.on_gpus else ("no GPU", "one")
            raise ConfigError(
                f"rank {rank} has {mine}, and another rank has {theirs}: give every rank a GPU, or say --device cpu."
            )
        if group.on_gpus:
            with _together("the ranks' GPUs did not meet over NCCL"):
                group._tensors = dist.new_group(backend="nccl", timeout=patience, device_id=where)
        return group

    def share(self, total: int) -> slice:
        """Which of `total` rows, columns or heads are this rank's: equal shares, the last cut short."""
        each = -(-total // self.size)
        return slice(min(total, self.rank * each), min(total, (self.rank + 1) * each))

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, which is written over, on each of them."""
        with _together():
            dist.all_reduce(x, group=self._tensors)
        return x

    def gather(self, x: Tensor, columns: int) -> Tensor:
        """All ranks' x [M, n] beside each other, the first `columns` of them, on rank 0; elsewhere x itself."""
        if len(x) == 0:
            return x.new_empty(0, columns)
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        with _together():
            dist.gather(x, parts, dst=0, group=self._tensors)
        return x if parts is None else torch.cat(parts, dim=1)[:, :columns].contiguous()

    def least(self, count: int) -> int:
        """The smallest of all ranks' `count`, on each of them; they wait for each other as long as it takes."""
        counts = torch.tensor(int(count))
        with _together():
            dist.all_reduce(counts, dist.ReduceOp.MIN, group=self._control)
        return int(counts)

    def send(self, message: bytes) -> None:
        """Rank 0 tells all others; it waits until they listen."""
        frame = torch.zeros(_FRAME, dtype=torch.uint8)
        content = torch.frombuffer(bytearray(len(message).to_bytes(_PREFIX, "little") + message), dtype=torch.uint8)
        frame[: len(content)] = content[:_FRAME]
        with _together():
            dist.broadcast(frame, 0, group=self._control)
            if len(content) > _FRAME:
                dist.broadcast(content[_FRAME:], 0, group=self._control)

    def receive(self) -> bytes:
        """What rank 0 sends next, however long that takes."""
        frame = torch.empty(_FRAME, dtype=torch.uint8)
        with _together():
            dist.broadcast(frame, 0, group=self._control)
            length = _PREFIX + int.from_bytes(frame[:_PREFIX].numpy().tobytes(), "little")
            if length > _FRAME:
                rest = torch.empty(length - _FRAME, dtype=torch.uint8)
                dist.broadcast(rest, 0, group=self._control)
                frame = torch.cat([frame, rest])
        return frame[_PREFIX:length].numpy().tobytes()

    def leave(self) -> None:
        """End the connections. The group is of no use afterwards."""
        dist.destroy_process_group()


@contextmanager
def _together(failure: str = "another rank is gone, or does not answer") -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all that torch.distributed raises; its text names addresses, clients see ours
        raise EngineDeadError(failure) from error
