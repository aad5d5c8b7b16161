"""Detects a step thread that has ended, or that has been busy with one step for too long."""

import asyncio
import threading
from collections.abc import Callable
from time import monotonic

TICK = 0.2  # seconds between checks


class Heartbeat:
    """Written by the step thread, read by the watchdog. Waiting for work does not count as silence."""

    def __init__(self) -> None:
        self.beats = 0
        self.waiting = True

    def wait(self) -> None:
        """The thread has nothing to do."""
        self.waiting = True

    def beat(self) -> None:
        """The thread begins work: called every step, so that a long prompt, which takes many, counts as progress."""
        self.beats += 1
        self.waiting = False


async def watch(
    thread: threading.Thread, heart: Heartbeat, timeout: float, on_death: Callable[[str], None], tick: float = TICK
) -> None:
    """Return after one call of `on_death(reason)`: the thread ended, or did not beat for `timeout` seconds of work.

    Time counts only while this coroutine runs too: a process that was stopped and continued has not hung.
    """
    seen, silent, before = -1, 0.0, monotonic()
    while True:
        await asyncio.sleep(tick)
        now = monotonic()
        if not thread.is_alive():
            on_death("its thread ended")
            return
        silent = 0.0 if heart.waiting or heart.beats != seen else silent + min(now - before, 2 * tick)
        seen, before = heart.beats, now
        if silent >= timeout:
            on_death(f"a step has not ended for {timeout:g} s")
            return
