"""Ranks over gloo: rank 0 is the test itself, the others are processes that follow one engine after the other."""

import contextlib
import socket
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.ranks import follow
from dspark_server.runtime.group import ONE_RANK, Group, TorchGroup

from ..engine.support import FIXTURES
from ..processes import processes
from ..runtime.twin import TwinDevice, TwinKernels


def tiny_config(head: str = "vanilla", *, drafter: bool = True, **settings: Any) -> EngineConfig:
    """The fixture pair in float32, so that tokens are compared exactly."""
    pair = FIXTURES / f"dspark_qwen3_{head}"
    speculative = SpeculativeConfig(method="none")
    if drafter:
        speculative = SpeculativeConfig(method="dspark", model=str(pair / "draft"), selection="fixed")
    values: dict[str, Any] = {"model": str(pair / "target"), "num_blocks": 256, "block_size": 4} | settings
    return EngineConfig(dtype="float32", speculative=speculative, check_invariants=True, **values)


def run_rank(orders: Connection, port: int, rank: int, size: int) -> None:
    """Main of a rank other than 0: follows an engine for each configuration it is sent, on the device sent with it."""
    torch.set_num_threads(1)
    group = TorchGroup.join(meet(port, size), rank, size)
    while (order := orders.recv()) is not None:
        config, twin = order
        if twin is None:
            follow(config, group)
        else:
            with TwinDevice(**twin) as device:
                follow(config, group, device=device, kernels=TwinKernels())
    group.leave()


def meet(port: int, size: int, listener: socket.socket | None = None) -> Any:
    """The store where ranks find each other."""
    return dist.TCPStore(
        "127.0.0.1",
        port,
        size,
        is_master=listener is not None,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
        master_listen_fd=listener.detach() if listener else None,
    )


class Together:
    """Rank 0 of a group of `size`."""

    def __init__(self, group: TorchGroup, others: list[tuple[ForkServerProcess, Connection]]) -> None:
        self.group = group
        self.others = [process for process, _ in others]
        self._orders = [orders for _, orders in others]

    @contextlib.contextmanager
    def core(self, config: EngineConfig, **load: Any) -> Iterator[EngineCore]:
        """An engine on all ranks, which are free for the next one afterwards."""
        yield self.load(config, **load)
        self.group.send(b"")

    def load(
        self,
        config: EngineConfig,
        *,
        theirs: EngineConfig | None = None,
        twin: dict[str, int] | None = None,
        **load: Any,
    ) -> EngineCore:
        """An engine on all ranks, their last: the others' by `theirs`, if given, and on twin devices of `twin`."""
        for orders in self._orders:
            orders.send((theirs or config, twin))
        return EngineCore.load(config, group=self.group, **load)

    @classmethod
    @contextlib.contextmanager
    def start(cls, size: int) -> Iterator["Together"]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # two ranks with threads that spin would wait for each other's processors
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        store = meet(port, size, listener)
        others = []
        for rank in range(1, size):
            ours, theirs = processes.Pipe()
            process = processes.Process(target=run_rank, args=(theirs, port, rank, size), daemon=True)
            process.start()
            theirs.close()
            others.append((process, ours))
        try:
            group = TorchGroup.join(store, 0, size)
            yield cls(group, others)
            for _, orders in others:
                with contextlib.suppress(OSError):
                    orders.send(None)
            group.leave()
        finally:
            torch.set_num_threads(threads)
            for process, _ in others:
                process.join(5)
                process.kill()


class Share(Group):
    """A rank that talks to nobody: enough to load its share."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    share = TorchGroup.share


def one_rank(config: EngineConfig) -> EngineCore:
    return EngineCore.load(config, group=ONE_RANK)


def tokenizer(directory: Path) -> Path:
    """A tokenizer for the fixtures, saved there."""
    from ..api.fake_engine import build_tokenizer

    build_tokenizer().save_pretrained(directory)
    return directory
