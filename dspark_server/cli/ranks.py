"""The processes of a tensor-parallel server: made by torchrun, or started by the first one as its children.

Children run the same command with torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Their
stdin is a pipe held by their parent: when the parent ends, in any way, they read end of file and end too. With NNODES
and NODE_RANK one command on each node starts that node's share of the ranks.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from dspark_server.errors import ConfigError, EngineDeadError
from dspark_server.runtime.processors import usable

if TYPE_CHECKING:  # torch takes seconds; a wrong setting is reported before
    from dspark_server.runtime.device import Device
    from dspark_server.runtime.group import Group

EXIT_DEAD = 70  # EX_SOFTWARE: the engine died, and with it the server
LAST_PASS = 10.0  # seconds that other ranks have to end after rank 0 tells them to
_CHILD = "LAUNCHED_BY_DSPARK_SERVER"
_DEFAULT_PORT = "29500"  # torchrun's

logger = logging.getLogger(__name__)


class Ranks:
    """This process's rank (`rank` of `size`), and its children: the end of one ends the server.

    A context manager: at its end the other ranks are told to end; after an error the children are killed.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._group: Group | None = None  # None until the ranks have met
        self._local: int | None = None  # rank within its node; None: LOCAL_RANK
        self._store: Any = None  # where the ranks meet; None: the launcher's
        self._children: list[subprocess.Popen[bytes]] = []
        self._on_death: Callable[[str], None] = self._give_up
        self._ending = False  # ranks that end from now on were told to

    @classmethod
    def start(cls, asked: int, device: str) -> "Ranks":
        """Find this process's rank, and start the ranks that no launcher has started.

        `asked` is --tensor-parallel-size; under torchrun it may be left at 1. `device` is --device. Raises ConfigError
        for variables that disagree with it, and for more ranks on this node than GPUs.
        """
        environment = os.environ
        made_by_launcher = "RANK" in environment and "WORLD_SIZE" in environment
        size = _number("WORLD_SIZE") if made_by_launcher else asked
        if asked not in (1, size):
            raise ConfigError(f"--tensor-parallel-size is {asked}, but WORLD_SIZE says that {size} ranks were started.")
        ranks = cls(_number("RANK") if made_by_launcher else 0, size)
        if environment.pop(_CHILD, None):
            _end_with_parent()
            ranks._store = _store(environment["MASTER_ADDR"], _number("MASTER_PORT"), size)
        elif size > 1 and not made_by_launcher:
            ranks._launch(device)
        return ranks

    def meet(self, device: str, timeout: float) -> "tuple[Group, Device | None]":
        """Take this rank's device, and wait for all ranks; `timeout` is for one collective, in seconds.

        On a node with GPUs the device is GPU number LOCAL_RANK, which becomes the calling thread's. Raises ConfigError
        if there is none, EngineDeadError if not all ranks come.
        """
        from dspark_server.runtime.device import find_device
        from dspark_server.runtime.group import ONE_RANK, TorchGroup

        if self.size == 1:
            self._group = ONE_RANK
            return ONE_RANK, find_device(device)
        mine = find_device(device, self._gpu(device))
        if self.rank == 0:
            logger.info("waiting for the other ranks, %d in all", self.size)
        self._group = TorchGroup.join(self._store, self.rank, self.size, mine.where if mine else None, timeout)
        return self._group, mine

    def _gpu(self, device: str) -> int:
        """Return the number of this rank's GPU; 0 where there is none. Raises ConfigError if there are too few."""
        from dspark_server.runtime.device import cuda_devices

        found = 0 if device == "cpu" else cuda_devices()
        if not found:
            return 0
        local = _number("LOCAL_RANK") if self._local is None else self._local
        if local >= found:
            raise ConfigError(
                f"LOCAL_RANK is {local}, but torch sees {found} GPUs, numbered from 0: start no more ranks on a node "
                "than it has GPUs, show every rank all of them (CUDA_VISIBLE_DEVICES), or give --device cpu."
            )
        return local

    def _launch(self, device: str) -> None:
        """Start this node's ranks except its first, which is this process, and find the store where all meet."""
        size = self.size
        nodes, node = _number("NNODES", "1"), _number("NODE_RANK", "0")
        if nodes < 1 or size % nodes or node >= nodes:
            raise ConfigError(
                f"--tensor-parallel-size {size} cannot be spread over NNODES={nodes} nodes of which this is "
                f"NODE_RANK={node}: the nodes take equal shares and are numbered from 0."
            )
        here = size // nodes
        first = self.rank = node * here
        self._local = 0
        # Before torch is imported: the ranks share the processors.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable() // here)))
        _check_gpus(device, here)
        if nodes == 1:
            if sys.platform.startswith("linux"):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            listener = socket.create_server(("127.0.0.1", 0))
            address, port = "127.0.0.1", listener.getsockname()[1]
            store = _store(address, port, size, listener)
        else:
            if "MASTER_ADDR" not in os.environ:
                raise ConfigError("MASTER_ADDR must name the node with NODE_RANK=0, which the others are to find.")
            address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", _DEFAULT_PORT)
            store = None
        variables = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": here, "MASTER_ADDR": address, "MASTER_PORT": port}
        for local in range(1, here):
            self._start_child(first + local, {**variables, "LOCAL_RANK": local})
        self._store = store or _store(address, port, size, leads=node == 0)

    def _start_child(self, rank: int, variables: dict[str, Any]) -> None:
        own = {_CHILD: "1", "RANK": str(rank)} | {name: str(value) for name, value in variables.items()}
        # The parent's import path and nothing else: -m alone would put the working directory first.
        path = {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "dspark_server", *sys.argv[1:]],
            env=os.environ | path | own,
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for this process, which drains and then ends its children
        )
        self._children.append(child)
        threading.Thread(target=self._watch, args=(rank, child), name=f"rank {rank}", daemon=True).start()

    def _watch(self, rank: int, child: subprocess.Popen[bytes]) -> None:
        status = child.wait()
        how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
        if not self._ending:
            logger.critical("rank %d ended %s", rank, how)
            self._on_death(f"rank {rank} ended {how}")

    def _give_up(self, reason: str) -> None:
        self.leave(EXIT_DEAD)

    def watch(self, on_death: Callable[[str], None]) -> None:
        """From now on report a child's end to `on_death`, on a separate thread; before, it ends this process."""
        self._on_death = on_death

    def leave(self, code: int) -> NoReturn:
        """End this process now with status `code`, and its children, including those that hang."""
        self._ending = True
        self._kill()
        logging.shutdown()
        # Not sys.exit: it waits for threads, and the thread that loads or steps may never end.
        os._exit(code)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # only the error's message should be shown
            self._ending = True
            self._kill()

    def close(self) -> None:
        """Rank 0: tell the others to end, and wait until the children have ended. Other ranks: only leave."""
        from dspark_server.runtime.group import TorchGroup

        group = self._group
        if not isinstance(group, TorchGroup):
            return
        self._ending = True
        patience = threading.Timer(LAST_PASS, self._kill)
        patience.daemon = True
        patience.start()
        if self.rank == 0:
            with contextlib.suppress(EngineDeadError):
                group.send(b"")
        for child in self._children:
            child.wait()
        patience.cancel()
        if group.on_gpus:  # NCCL's communicators end only after the graphs that use them: end the process instead
            self.leave(0)
        group.leave()

    def _kill(self) -> None:
        for child in self._children:
            child.kill()


def _check_gpus(device: str, ranks: int) -> None:
    """Raise ConfigError if this node has GPUs, but fewer than `ranks`."""
    if device == "cpu":
        return
    from dspark_server.runtime.device import cuda_devices

    found = cuda_devices()
    if 0 < found < ranks:
        raise ConfigError(
            f"--tensor-parallel-size asks for {ranks} GPUs on this node, and torch sees {found}: ask for fewer ranks, "
            "show it more GPUs (CUDA_VISIBLE_DEVICES), or give --device cpu."
        )


def _number(variable: str, default: str | None = None) -> int:
    value = os.environ.get(variable, default)
    if value is None or not value.isdecimal():
        raise ConfigError(f"the environment variable {variable} must be a whole number, not {value!r}.")
    return int(value)


def _store(address: str, port: int, size: int, listener: socket.socket | None = None, leads: bool = False) -> Any:
    """Return the store where the ranks meet; this process hosts it if it `leads` or listens."""
    import torch.distributed as dist

    from dspark_server.runtime.group import PATIENCE

    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            address,
            port,
            size,
            is_master=leads or listener is not None,
            timeout=timedelta(seconds=PATIENCE),
            wait_for_workers=False,
            master_listen_fd=listener.detach() if listener else None,
        )
    except RuntimeError as error:
        raise EngineDeadError(f"the ranks cannot meet at {address}:{port}: {error}") from error


def _end_with_parent() -> None:
    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(EXIT_DEAD)

    threading.Thread(target=wait, name="parent", daemon=True).start()
