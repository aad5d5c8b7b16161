"""Processes that begin with torch, transformers and the server imported: forked off one that has done so, once."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["dspark_server.api.server", "dspark_server.cli.serving", "dspark_server.engine.core", "transformers"]
)


def _main(arguments: Sequence[str], log: str, environment: dict[str, str]) -> None:
    from dspark_server.cli import main

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(output, standard)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    sys.argv = ["dspark-server", *arguments]
    main()


class CommandLine:
    """`dspark-server` with these arguments, writing to `log`: as far as tests need one, a subprocess.Popen.

    It saves the imports, seconds each time. tests/server and tests/distributed start some as a shell would.
    """

    def __init__(self, arguments: Sequence[str], log: Path, **environment: str) -> None:
        self._process = processes.Process(target=_main, args=(arguments, str(log), environment))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when it has ended. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("dspark-server", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it, if it still runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)
