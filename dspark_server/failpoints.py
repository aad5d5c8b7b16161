"""Failpoints: named places where a test may make the server fail. Unarmed, each costs one call and one comparison.

    failpoints.hit("step.verify")                     may raise, sleep, hang or kill the process
    logits = failpoints.passed("target.logits", logits)   may also put NaN or inf into a tensor's rows

They are armed by `arm` (tests) or, in a separate process, by the environment: `DSPARK_FAILPOINTS` holds
`NAME=ACTION[:ARGUMENT][*TIMES][@AFTER]`, separated by semicolons. TIMES hits fire (default: all) after AFTER have
passed. No request, header or route can arm one.

Actions: raise:NAME (a built-in exception or CapacityError), sleep:SECONDS, hang (until disarmed), die (ends the thread,
whatever it catches), kill (SIGKILL to the process), nan[:ROW] and inf[:ROW] (only `passed`; all rows without ROW).
"""

import builtins
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from dspark_server.errors import CapacityError, ConfigError

VARIABLE = "DSPARK_FAILPOINTS"

# All points, and where they lie; `arm` refuses others, and a test looks for each in the sources.
POINTS = {
    "engine.load": "before a model is read",
    "engine.thread": "step thread, outside a step",
    "step.plan": "before requests are scheduled",
    "blocks.allocate": "each time KV blocks are taken",
    "step.draft": "before the drafter runs",
    "draft.survival": "predicted survival [R, gamma] of the drafts",
    "step.verify": "before the target's pass",
    "target.logits": "logits [M, V] of the target's pass",
    "step.sample": "before tokens are accepted",
    "step.commit": "before accepted tokens are committed",
    "commit.request": "the same, for each request",
    "engine.post": "step thread, before a step's tokens are handed over",
    "tokenizer.encode": "tokenizer thread",
    "text.push": "event loop, before tokens become text",
}
ACTIONS = ("raise", "sleep", "hang", "die", "kill", "nan", "inf")

T = TypeVar("T")


class ThreadDeath(BaseException):
    """Ends a thread: `except Exception` does not catch it."""


@dataclass
class Fault:
    """Action of an armed point: it fires at the `times` hits after the first `after`."""

    action: str
    argument: str = ""
    times: int | None = None
    after: int = 0
    hits: int = 0

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Read ACTION[:ARGUMENT][*TIMES][@AFTER]. Raises ConfigError."""
        rest, _, after = text.partition("@")
        rest, _, times = rest.partition("*")
        action, _, argument = rest.partition(":")
        counts = (times or "1", after or "0")
        if action not in ACTIONS or not all(count.isdecimal() for count in counts):
            raise ConfigError(
                f"{text!r} is no fault: write ACTION[:ARGUMENT][*TIMES][@AFTER] with {'|'.join(ACTIONS)}."
            )
        fault = cls(action, argument, int(times) if times else None, int(after or 0))
        fault._check()
        return fault

    def _check(self) -> None:
        try:
            if self.action == "raise" and not issubclass(_exception(self.argument), BaseException):
                raise ValueError
            if self.action == "sleep":
                float(self.argument)
            if self.action in ("nan", "inf") and self.argument:
                int(self.argument)
        except (ValueError, AttributeError, TypeError):
            raise ConfigError(f"{self.action} does not take {self.argument!r}.") from None

    @property
    def due(self) -> bool:
        """Count a hit and return whether it fires."""
        self.hits += 1
        return self.hits > self.after and (self.times is None or self.hits <= self.after + self.times)


_armed: dict[str, Fault] | None = None


def hit(name: str) -> None:
    """Fail here if the point is armed."""
    if _armed is not None:
        _fire(name)


def passed(name: str, value: T) -> T:
    """Return `value`, or a damaged copy if the point is armed; it may also fail as `hit` does."""
    return value if _armed is None else _damaged(name, value)


def arm(faults: Mapping[str, str]) -> None:
    """Arm exactly these points, by name. Raises ConfigError for an unknown point or a fault that cannot be read."""
    global _armed
    for name in faults:
        if name not in POINTS:
            raise ConfigError(f"there is no failpoint {name!r}; there are {', '.join(POINTS)}.")
    _armed = {name: Fault.parse(text) for name, text in faults.items()} or None


def disarm() -> None:
    """Disarm all points; hanging threads go on."""
    arm({})


@contextmanager
def armed(**faults: str) -> Iterator[None]:
    """Arm points for a block; their dots are written as underscores (step_verify="raise:MemoryError")."""
    names = {name.replace(".", "_"): name for name in POINTS}
    arm({names.get(name, name): text for name, text in faults.items()})
    try:
        yield
    finally:
        disarm()


def arm_from_environment(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Arm the points in DSPARK_FAILPOINTS and return their names. Raises ConfigError."""
    entries = [entry.strip() for entry in environment.get(VARIABLE, "").split(";") if entry.strip()]
    faults = {name.strip(): text.strip() for name, _, text in (entry.partition("=") for entry in entries)}
    arm(faults)
    return tuple(faults)


def _fire(name: str) -> None:
    fault = None if _armed is None else _armed.get(name)
    if fault is not None and fault.due:
        _act(name, fault)


def _act(name: str, fault: Fault) -> None:
    if fault.action == "raise":
        raise _exception(fault.argument)(f"failpoint {name}")
    if fault.action == "die":
        raise ThreadDeath(f"failpoint {name}")
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.action == "sleep":
        time.sleep(float(fault.argument))
    while fault.action == "hang" and _armed is not None and _armed.get(name) is fault:
        time.sleep(0.01)


def _damaged(name: str, value: T) -> T:
    fault = None if _armed is None else _armed.get(name)
    if fault is None or fault.action not in ("nan", "inf"):
        _fire(name)
        return value
    rows = int(fault.argument) if fault.argument else slice(None)
    if isinstance(rows, int) and rows >= len(value):  # type: ignore[arg-type]
        return value  # no such row here: not a hit
    if not fault.due:
        return value
    copy = value.clone()  # type: ignore[attr-defined]
    copy[rows] = math.nan if fault.action == "nan" else math.inf
    return copy  # type: ignore[no-any-return]


def _exception(name: str) -> type[BaseException]:
    kind: type[BaseException] = CapacityError if name == "CapacityError" else getattr(builtins, name)
    return kind
