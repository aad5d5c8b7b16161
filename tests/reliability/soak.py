"""The soak: a mixed load at 70 % of capacity, with faults, on one live server, for minutes or days.

    python -m tests.reliability.soak --minutes 75 [--load 0.7] [--hold FILE] [--log FILE]

The mix: greedy and seeded canaries (known tokens), requests of other kinds, clients that leave (close, reset, half
close) after up to 60 ms, bad input. Its capacity is measured first, and again at the end: what so many clients get done
a second that each send the next when the last is done. The load is open: requests come at random times (Poisson) at
that share of the capacity, whatever becomes of those before them. It comes in rounds of three seconds, in every fourth
a fault. Behind each round no request, block, task or file may be left, and memory must not grow.
"""

import argparse
import itertools
import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.support import CANARY, Answer, Server, bodies, body, raw, reset

FAULTS = {
    "step.plan": "raise:RuntimeError*1@4",
    "step.verify": "raise:MemoryError*1@6",
    "step.sample": "raise:RuntimeError*1@6",
    "step.draft": "raise:RuntimeError*3@3",
    "draft.survival": "nan*8",
    "target.logits": "nan:0*1@5",
    "blocks.allocate": "raise:CapacityError*1@8",
    "commit.request": "raise:RuntimeError*1@9",
    "text.push": "raise:ValueError*1@4",
}
SEEDED = {**CANARY, "temperature": 1.0, "seed": 11}
KINDS: tuple[dict[str, Any], ...] = (
    {"logprobs": 3},
    {"n": 3, "temperature": 0.8},
    {"best_of": 3, "temperature": 0.8, "stream": False},
    {"stop": ["ab", "é"], "temperature": 1.0, "ignore_eos": False},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "temperature": 0.7},
    {"structured_outputs": {"regex": "[a-f]{3,9}x"}, "temperature": 1.0, "ignore_eos": False},
    {"prompt": "a text prompt, é and 😀", "echo": True},
    {"prompt_logprobs": 2, "stream": False},
    {"cache_salt": "s", "top_k": 5, "temperature": 1.0},
)
BAD: tuple[dict[str, Any], ...] = (
    {"max_tokens": -1},
    {"temperature": "hot"},
    {"n": 2**63},
    {"prompt": []},
    {"prompt": [2**40]},
    {"stop": [""]},
    {"logit_bias": {"x": 1}},
    {"structured_outputs": {"regex": "("}},
)


MIX = {"canary": 2, "other": 4, "leaver": 3, "bad": 1}  # and how often each comes
ROUND, CALIBRATION = 3.0, 10.0  # seconds
CLIENTS, MOST_AT_ONCE = 32, 128  # that measure capacity; requests that may be on their way in the open loop


@dataclass
class Report:
    """What a soak saw. `capacity`: requests a second before and after; `rounds`: of `ROUND` seconds."""

    seconds: float = 0.0
    rounds: int = 0
    capacity: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[float, float]] = field(default_factory=list)  # seconds, bytes of RSS at idle
    problems: list[str] = field(default_factory=list)

    def slope(self) -> float:
        """RSS in MB an hour, least squares over the samples after a sixth of the time; 0 with less than three."""
        kept = [(at / 3600, rss / 2**20) for at, rss in self.samples if at >= self.seconds / 6]
        if len(kept) < 3:
            return 0.0
        hours, sizes = [sum(values) / len(kept) for values in zip(*kept, strict=True)]
        spread = sum((at - hours) ** 2 for at, _ in kept)
        return sum((at - hours) * (size - sizes) for at, size in kept) / spread

    def growth(self) -> float:
        """Mean RSS in the last quarter of the samples over that in the second."""
        sizes, quarter = [rss for _, rss in self.samples], len(self.samples) // 4
        return sum(sizes[-quarter:]) / sum(sizes[quarter : 2 * quarter]) if quarter else 1.0

    def __str__(self) -> str:
        first, last = (self.samples[0][1] / 2**20, self.samples[-1][1] / 2**20) if self.samples else (0, 0)
        c = self.counts
        rate = c["sent"] / (ROUND * self.rounds) if self.rounds else 0.0
        before, after = self.capacity or (0.0, 0.0)
        return (
            f"{self.seconds / 3600:.2f} h at {rate:.1f} requests/s, capacity {before:.1f} before, {after:.1f} after; "
            f"{c['sent']} requests, {c['leaver']} left early, {c['bad']} bad inputs (all 4xx), {c['faults']} faults; "
            f"{c['canary']} canaries, {c['equal']} equal, {c['hit']} hit by a fault; {c['failed']} others failed by a "
            f"fault; rounds that left blocks or requests: {c['leaked']}; anything wrong: {len(self.problems)}; RSS "
            f"{first:.0f} to {last:.0f} MB, slope {self.slope():+.1f} MB/h"
        )


class Soak:
    """One server, soaked round by round."""

    def __init__(self, server: Server, *, load: float = 0.7, hold: Path | None = None) -> None:
        self.server, self.load, self.hold = server, load, hold
        self.report = Report()
        self._numbers, self._lock = itertools.count(), threading.Lock()
        self._fault: str | None = None  # of the round
        for _ in range(3):  # warm: allocators, caches
            server.ask_all(bodies(16, 60))
        self.canaries = [(CANARY, server.ask(CANARY).tokens), (SEEDED, server.ask(SEEDED).tokens)]

    def run(self, seconds: float, log: Path | None = None) -> Report:
        """Rounds for so many seconds, those held not counted."""
        report = self.report
        with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
            report.capacity = 2 * [self._capacity(pool)]
            self.before = self._idle()
            report.counts.clear()
            while report.seconds < seconds:
                while self.hold is not None and self.hold.exists():
                    time.sleep(1)
                began = time.monotonic()
                self._round(pool, self.load * report.capacity[0])
                report.seconds += time.monotonic() - began
                if log is not None and (report.rounds % 50 == 0 or report.problems):
                    log.write_text(f"{report}\n" + "".join(f"{problem}\n" for problem in report.problems[:20]))
            sent = report.counts.copy()
            report.capacity[1] = self._capacity(pool)
            report.counts = sent
        if report.growth() > 1.1:
            report.problems.append(f"RSS grew by a factor of {report.growth():.2f}")
        return report

    def _capacity(self, pool: ThreadPoolExecutor) -> float:
        """Requests of the mix a second, each client sending the next when the last is done."""
        began = time.monotonic()

        def client() -> int:
            done = 0
            while time.monotonic() < began + CALIBRATION:
                self._one()
                done += 1
            return done

        done = sum(future.result() for future in [pool.submit(client) for _ in range(CLIENTS)])
        return done / (time.monotonic() - began)

    def _round(self, pool: ThreadPoolExecutor, rate: float) -> None:
        report, server, number = self.report, self.server, self.report.rounds
        dice = random.Random(number)
        self._fault = dice.choice(sorted(FAULTS)) if number % 4 == 3 else None
        if self._fault is not None:
            report.counts["faults"] += 1
            server.tell({self._fault: FAULTS[self._fault]})
        futures, due = [], time.monotonic()
        end = due + ROUND
        while (due := due + dice.expovariate(rate)) < end:
            time.sleep(max(0.0, due - time.monotonic()))
            futures.append(pool.submit(self._one))
        for future in futures:
            future.result()
        report.counts["sent"] += len(futures)
        report.rounds += 1
        if self._fault is not None:
            server.arm()
        figures = self._idle()
        report.samples.append((report.seconds, figures["rss"]))
        for name, most in (("files", CLIENTS), ("threads", 8), ("tasks", CLIENTS)):
            if figures[name] > self.before[name] + most:
                report.problems.append(f"round {number}: {name}: {self.before[name]:.0f} to {figures[name]:.0f}")

    def _idle(self) -> dict[str, float]:
        """The server's figures once nothing is left in it."""
        try:
            self.server.wait_idle()
        except AssertionError:
            self.report.counts["leaked"] += 1
            self.report.problems.append(
                f"round {self.report.rounds} ({self._fault}): not idle: {self.server.figures()}"
            )
        return self.server.figures()

    def _one(self) -> None:
        """The next of the mix, to its end."""
        number = next(self._numbers)
        dice = random.Random(number)
        [kind] = dice.choices(list(MIX), weights=list(MIX.values()))
        streamed = {"stream": dice.random() < 0.5}
        if kind == "leaver":
            self._leave(number, dice.random() * 0.06)
            with self._lock:
                self.report.counts[kind] += 1
        elif kind == "bad":
            self._judge(self.server.ask(CANARY | dice.choice(BAD)), kind, None)
        elif kind == "canary":
            asked, tokens = dice.choice(self.canaries)
            self._judge(self.server.ask(asked | streamed), kind, tokens)
        else:
            asked = body(number, dice.randint(1, 80)) | streamed | dice.choice(KINDS)
            self._judge(self.server.ask(asked), kind, None)

    def _judge(self, answer: Answer, kind: str, tokens: list[int] | None) -> None:
        with self._lock:
            counts, fault = self.report.counts, self._fault
            counts[kind] += 1
            if kind == "bad":
                fine = 400 <= answer.status < 500
            else:
                fine = answer.ok and (tokens is None or answer.tokens == tokens)
                counts["equal"] += fine and tokens is not None
            if fine:
                return
            if kind != "bad" and fault is not None and answer.errors == 1 and answer.status in (200, 500, 503):
                counts["hit" if kind == "canary" else "failed"] += 1
                return
            self.report.problems.append(f"{kind} ({fault}): {answer}")

    def _leave(self, seed: int, seconds: float) -> None:
        connection = raw(self.server, body(seed, 500, stream=bool(seed % 2), n=1 + seed % 2, temperature=0.5))
        if seed % 5 == 0:
            connection.shutdown(socket.SHUT_WR)
        time.sleep(seconds)
        if seed % 3 == 0:
            reset(connection)
        connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--load", type=float, default=0.7, help="share of the capacity (default: 0.7)")
    parser.add_argument("--hold", type=Path, help="stand still between rounds while this file exists")
    parser.add_argument("--log", type=Path, help="write the figures here as it goes")
    given = parser.parse_args()
    options = {"max_num_seqs": 8, "num_blocks": 512}
    with tempfile.TemporaryDirectory() as directory, Server(Path(directory), engine=options) as server:
        report = Soak(server, load=given.load, hold=given.hold).run(60 * given.minutes, given.log)
        print(report, json.dumps(server.figures()), *report.problems, sep="\n")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
