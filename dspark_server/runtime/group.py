"""Tensor parallelism: each rank holds a share of every layer; ranks meet over torch.distributed (docs/parallel.md).

Rank 0 leads: it plans, drafts and samples, and tells the others what to run, by messages of plain bytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_server.errors import ConfigError, EngineDeadError

PATIENCE = 600.0  # seconds to meet at the start, and for one collective; the watchdog is stricter
_FRAME = 1 << 14  # bytes of a message that are sent at once
_PREFIX = 8  # bytes of these for its length
_FOREVER = timedelta(days=365)  # for the wait for work: a server may be idle


class Group:
    """The ranks that share a model; this group has a single rank, so nothing is shared or sent."""

    rank = 0
    size = 1

    def share(self, total: int) -> slice:
        """Return this rank's slice of `total` rows, columns or heads: equal shares, the last cut short."""
        return slice(None)

    def share_of_heads(self, heads: int, channels: int) -> slice:
        """Return this rank's rows of `heads` times `channels`; with fewer heads than ranks, several have the same."""
        if heads % self.size == 0:
            return self.share(heads * channels)
        first = self.rank * heads // self.size * channels
        return slice(first, first + channels)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' x on every rank; x is overwritten."""
        return x

    def gather(self, x: Tensor, columns: int) -> Tensor:
        """Return all ranks' x [M, n] side by side, the first `columns` of them, on rank 0; elsewhere x itself."""
        return x

    def least(self, count: int) -> int:
        """Return the smallest `count` of all ranks, on every rank."""
        return count


ONE_RANK = Group()


class TorchGroup(Group):
    """Ranks over torch.distributed. All of them must make the same calls in the same order.

    A rank that is gone, or silent for too long, raises EngineDeadError: the common computation cannot be finished.
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
        """Meet `size` ranks at `store`, or by torchrun's variables (None).

        Tensors travel by NCCL if `where`, this rank's device, is a GPU, else by gloo. `timeout` is for one collective,
        in seconds, if it is longer than PATIENCE. Raises EngineDeadError if not all ranks come, ConfigError if some
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
        """Return this rank's slice of `total` rows, columns or heads: equal shares, the last cut short."""
        each = -(-total // self.size)
        return slice(min(total, self.rank * each), min(total, (self.rank + 1) * each))

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' x on every rank; x is overwritten."""
        with _together():
            dist.all_reduce(x, group=self._tensors)
        return x

    def gather(self, x: Tensor, columns: int) -> Tensor:
        """Return all ranks' x [M, n] side by side, the first `columns` of them, on rank 0; elsewhere x itself."""
        if len(x) == 0:
            return x.new_empty(0, columns)
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        with _together():
            dist.gather(x, parts, dst=0, group=self._tensors)
        return x if parts is None else torch.cat(parts, dim=1)[:, :columns].contiguous()

    def least(self, count: int) -> int:
        """Return the smallest `count` of all ranks, on every rank; waits for the others without a limit."""
        counts = torch.tensor(int(count))
        with _together():
            dist.all_reduce(counts, dist.ReduceOp.MIN, group=self._control)
        return int(counts)

    def send(self, message: bytes) -> None:
        """Send a message from rank 0 to all others; waits until they receive it."""
        frame = torch.zeros(_FRAME, dtype=torch.uint8)
        content = torch.frombuffer(bytearray(len(message).to_bytes(_PREFIX, "little") + message), dtype=torch.uint8)
        frame[: len(content)] = content[:_FRAME]
        with _together():
            dist.broadcast(frame, 0, group=self._control)
            if len(content) > _FRAME:
                dist.broadcast(content[_FRAME:], 0, group=self._control)

    def receive(self) -> bytes:
        """Return rank 0's next message; waits without a limit."""
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
        """Close the connections. The group cannot be used afterwards."""
        dist.destroy_process_group()


@contextmanager
def _together(failure: str = "another rank is gone, or does not answer") -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed raises nothing else; its text has addresses, so clients see ours
        raise EngineDeadError(failure) from error
