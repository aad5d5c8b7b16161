"""Processes that begin with torch, transformers and the server imported: forked off one that has done so, once."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["dspark_server.api.server", "dspark_server.cli.serving", "dspark_server.engine.core", "transformers"]
)


def _main(
    arguments: Sequence[str],
    log: str,
    environment: Mapping[str, str],
    stdin: Connection | None = None,
    fork_ranks: bool = True,
) -> None:
    from dspark_server.cli import main, ranks

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(output, standard)
    if stdin is not None:
        sys.stdin = os.fdopen(os.dup(stdin.fileno()))
        stdin.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    sys.argv = ["dspark-server", *arguments]
    if fork_ranks:
        # Of the server that made this process, which would start another, as it did not start that one itself.
        forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
        ranks.subprocess = SimpleNamespace(Popen=partial(Rank, log), PIPE=subprocess.PIPE)  # type: ignore[assignment]
    main()


class Rank:
    """A rank that a server starts, as far as it needs one a subprocess.Popen; its process id is in `{log}.rank{n}`."""

    def __init__(
        self, log: str, command: Sequence[str], *, env: Mapping[str, str], stdin: int, start_new_session: bool
    ) -> None:
        assert command[:4] == [sys.executable, "-P", "-m", "dspark_server"]
        assert stdin == subprocess.PIPE and start_new_session
        theirs, self._stdin = processes.Pipe(duplex=False)  # ours is closed when this process ends
        self._process = processes.Process(target=_main, args=(command[4:], log, dict(env), theirs))
        self._process.start()
        theirs.close()
        self._ended = threading.Lock()  # one thread at a time may ask for the exit code
        Path(f"{log}.rank{env['RANK']}").write_text(str(self._process.pid))

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        with self._ended:
            self._process.join()
        code: Any = self._process.exitcode
        assert code is not None
        return int(code)

    def kill(self) -> None:
        """Send SIGKILL."""
        with suppress(ProcessLookupError):
            os.kill(self._process.pid or 0, signal.SIGKILL)


class CommandLine:
    """`dspark-server` with these arguments, writing to `log`: as far as tests need one, a subprocess.Popen.

    It saves the imports, seconds each time. tests/server and tests/distributed start some as a shell would. The ranks
    that a server starts are forks too, unless `fork_ranks` is False.
    """

    def __init__(self, arguments: Sequence[str], log: Path, *, fork_ranks: bool = True, **environment: str) -> None:
        self._process = processes.Process(target=_main, args=(arguments, str(log), environment, None, fork_ranks))
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
