"""What the machine does to a server: files, disks, the clock, and damaged checkpoints."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import torch
from dspark_kernels.cpu.build import find_compilers
from safetensors.torch import load_file, save_file

from tests.reliability.cases.bench import Bench, case
from tests.reliability.support import FIXTURE, Command


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


@case("wall clock jumps by + 1 h and - 1 h", "no deadline, limit or watchdog sees it")
def _clock(bench: Bench) -> str:
    shim, offset = bench.directory / "clock.so", bench.directory / "offset"
    source = Path(__file__).parents[1] / "clock.c"
    compiler = next(find_compilers())
    subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-o", str(shim), str(source), "-ldl"], check=True)
    offset.write_text("0")
    keys = [f"key-{number}" for number in range(5)]
    options = ["--request-timeout", "4", "--queue-timeout", "20", "--step-timeout", "3", "--shutdown-timeout", "3"]
    options += ["--key-requests-per-minute", "3", *(f"--api-key={key}" for key in keys)]
    # Some 900 steps of 20 ms: no long request can end before its deadline.
    environment = {"DSPARK_FAILPOINTS": "step.plan=sleep:0.02", "CLOCK_OFFSET": str(offset), "LD_PRELOAD": str(shim)}
    long = {"prompt": "abc", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
    seen = []
    with Command(bench.directory, *options, **environment) as command, ThreadPoolExecutor(1) as pool:

        def ask(number: int, **fields: Any) -> tuple[int, float, Any]:
            began = time.monotonic()
            headers = {"Authorization": f"Bearer {keys[number]}"}
            answer = command.http.post("/v1/completions", json=long | fields, headers=headers)
            return answer.status_code, time.monotonic() - began, answer.json()

        def date() -> float:
            return parsedate_to_datetime(command.http.get("/live").headers["date"]).timestamp()

        expected = ask(0, max_tokens=8)[2]["choices"]
        for number, hours in enumerate((1, -1), 1):
            waiting = pool.submit(ask, number)
            time.sleep(1)
            offset.write_text(str(3600 * hours))
            for _ in range(10):
                assert command.http.get("/health").status_code == 200
                time.sleep(0.2)
            assert abs(date() - time.time() - 3600 * hours) < 60, "the server's clock has not jumped"
            assert ask(0, max_tokens=8)[2]["choices"] == expected
            status, seconds, _ = waiting.result()
            assert status == 504 and 3.9 < seconds < 10, (status, seconds)
            seen.append(f"{hours:+d} h: 504 after {seconds:.1f} s of 4")
        limited = [ask(3, max_tokens=1)[0] for _ in range(4)]
        offset.write_text("7200")
        assert limited == [200, 200, 200, 429] and ask(3, max_tokens=1)[0] == 429, limited
        waiting = pool.submit(ask, 4)
        time.sleep(0.5)
        command.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        offset.write_text("-7200")
        assert command.process.wait(20) == 0 and waiting.result()[0] == 503
        drained = time.monotonic() - began
        assert 2.5 < drained < 15, drained
    return f"{'; '.join(seen)}; 429 stays 429; drain {drained:.1f} s of 3; ready all the time, canaries equal"


@case("damaged checkpoints", "a clear error, exit code not 0, never ready")
def _checkpoints(bench: Bench) -> str:
    seen = []
    for name, damage in damages().items():
        directory = bench.directory / name
        damage(directory)
        command = [sys.executable, "-c", "from dspark_server.cli import main; main()", "serve", str(directory)]
        done = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0 and "Traceback" not in done.stderr and " ready: " not in done.stderr, done
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
