"""What the machine does to a server: files, disks, the clock, and damaged checkpoints."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.reliability.cases.bench import Bench, case
from tests.reliability.support import FIXTURE


@case("32 file descriptors", "connections beyond wait or fail; afterwards it serves")
def _few_files(bench: Bench) -> str:
    server = bench.start(files=32)
    with bench.canaries(server):
        held = []
        for _ in range(60):
            connection = socket.socket()
            connection.settimeout(1)
            try:
                connection.connect(("127.0.0.1", server.port))
                held.append(connection)
            except OSError:
                connection.close()
        time.sleep(1)
        for connection in held:
            connection.close()
        time.sleep(0.5)
    return f"{len(held)} sockets held, then the canary is equal; {server.figures()['files']:.0f} files open"


@case("log on a full disk", "requests are served")
def _full_disk(bench: Bench) -> str:
    server = bench.start(log="/dev/full", settings={"access_log": True})
    with bench.canaries(server) as canaries:
        server.arm(step__verify="raise:RuntimeError*1")
        time.sleep(0.5)
    return f"{canaries.equal} canaries equal, {canaries.refused} failed with the injected fault"


@case("damaged checkpoints", "a clear error, exit code not 0, no listener")
def _checkpoints(bench: Bench) -> str:
    seen = []
    for name, damage in damages().items():
        directory = bench.directory / name
        damage(directory)
        command = [sys.executable, "-c", "from dspark_server.cli import main; main()", "serve", str(directory)]
        done = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0 and "Traceback" not in done.stderr and "Uvicorn running" not in done.stderr, done
        assert "\ndspark-server: " in done.stderr, done.stderr
        seen.append(f"{name}: {done.returncode}")
    return ", ".join(seen)


def damages() -> dict[str, Callable[[Path], None]]:
    """Ways to damage the target of the fixture."""

    def copy(directory: Path) -> Path:
        shutil.copytree(FIXTURE / "target", directory)
        return next(directory.glob("*.safetensors"))

    def truncated(directory: Path) -> None:
        weights = copy(directory)
        weights.write_bytes(weights.read_bytes()[:-1000])

    def oversized(directory: Path) -> None:
        weights = copy(directory)
        weights.write_bytes(weights.read_bytes() + b"\0" * 1000)

    def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
        def damage(directory: Path) -> None:
            weights = copy(directory)
            tensors = load_file(weights)
            name = next(name for name in tensors if "layers.0" in name)
            save_file(tensors | {name: change(tensors[name].clone()).contiguous()}, weights)

        return damage

    return {
        "truncated": truncated,
        "oversized": oversized,
        "NaN weight": changed(lambda tensor: tensor.fill_(float("nan"))),
        "wrong shape": changed(lambda tensor: tensor[:-1]),
    }
