"""Servers that a comparison starts itself, one per selection policy."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from loadtest.client import LoadTestError

POLICIES = ("none", "fixed", "threshold", "causal", "lagged")
# The command in the scripts directory of this Python.
DSPARK_SERVER = (sys.executable, "-c", "from dspark_server.cli import main; main()")
LAST_LINES = 15


def speculative_config(policy: str, common: dict[str, Any]) -> str:
    """The --speculative-config of a policy; `common` names the drafter, among others."""
    if policy == "none":
        return json.dumps({"method": "none"})
    return json.dumps(common | {"selection": policy})


class Server:
    """A server process on a free port of 127.0.0.1, its output in a log file."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        """`command` lacks only --port."""
        self.name = name
        self.log = log
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as output:
            try:
                self._process = subprocess.Popen(
                    [*command, "--port", str(port)], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                )
            except OSError as error:
                raise LoadTestError(f"cannot start {command[0]}: {error}") from None

    async def ready(self, timeout: float) -> None:
        """Return when /health is 200. Raises LoadTestError if the process ends first, or after `timeout` seconds."""
        end = time.monotonic() + timeout
        async with httpx.AsyncClient(base_url=self.url, timeout=5.0, trust_env=False) as client:
            while time.monotonic() < end:
                self.check("while starting")
                try:
                    if (await client.get("/health")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.1)
        raise LoadTestError(f"server {self.name!r} was not ready within {timeout:g} s.{self._last_words()}")

    def check(self, when: str) -> None:
        """Raises LoadTestError with the end of its log if the process has ended."""
        status = self._process.poll()
        if status is not None:
            raise LoadTestError(f"server {self.name!r} ended {when}, {_reason(status)}.{self._last_words()}")

    def stop(self, timeout: float = 60.0) -> str | None:
        """SIGTERM, and SIGKILL after `timeout` seconds. Returns what was wrong with the end, or None."""
        if self._process.poll() is not None:
            return None  # `check` reports it
        self._process.terminate()
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return f"server {self.name!r} did not stop within {timeout:g} s of SIGTERM and was killed."
        if status not in (0, -signal.SIGTERM):
            return f"server {self.name!r} stopped with {_reason(status)}.{self._last_words()}"
        return None

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        return f" The end of {os.path.relpath(self.log)}:\n" + "\n".join(f"  {line}" for line in lines)


def _reason(status: int) -> str:
    return f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
