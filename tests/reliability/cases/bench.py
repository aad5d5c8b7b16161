"""What a case is, and what cases are made with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.support import CANARY, Answer, Canaries, Server


@dataclass
class Bench:
    """Where cases work; ends the servers they started."""

    directory: Path
    soak: float

    def __post_init__(self) -> None:
        self.servers: list[Server] = []

    def start(self, **options: Any) -> Server:
        """A server of the case's own, warm."""
        self.servers.append(Server(self.directory, **options))
        return self.servers[-1]

    def close(self) -> None:
        for server in self.servers:
            server.close()

    @contextmanager
    def canaries(self, server: Server) -> Iterator[Canaries]:
        """Canaries beside the block; afterwards none may have been wrong, and one must pass."""
        first = server.ask()
        assert first.ok and len(first.tokens) == CANARY["max_tokens"], first
        with Canaries(server, first.tokens) as canaries:
            yield canaries
        assert not canaries.wrong, f"wrong canary: {canaries.wrong[0]}"
        assert server.ask().tokens == first.tokens, "the canary after the fault"
        server.wait_idle()


@dataclass(frozen=True)
class Case:
    name: str
    expected: str
    run: Callable[[Bench], str]
    slow: bool = False


CASES: list[Case] = []


def case(name: str, expected: str, *, slow: bool = False) -> Callable[[Callable[[Bench], str]], Callable[[Bench], str]]:
    """Register the function below as a case."""

    def register(run: Callable[[Bench], str]) -> Callable[[Bench], str]:
        CASES.append(Case(name, expected, run, slow))
        return run

    return register


def fates(answers: list[Answer]) -> str:
    ok = sum(answer.ok for answer in answers)
    return f"{ok} finished, {len(answers) - ok} failed"


def one_error_each(answers: list[Answer]) -> None:
    for answer in answers:
        assert answer.ok or (answer.errors == 1 and answer.status in (200, 500, 503)), answer
