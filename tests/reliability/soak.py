"""The soak: a mixed load with faults on one live server, for minutes or days; every round ends idle and is checked.

    python -m tests.reliability.soak --minutes 75 [--share 0.25] [--hold FILE] [--log FILE]

A round: greedy and seeded canaries (known tokens), requests of other kinds, clients that leave (close, reset, half
close) after up to 60 ms, one bad input; in every fourth a fault. Behind each round no request, block, task or file may
be left. `--share` bounds the processor time of client and server together, as a share of one core.
"""

import argparse
import json
import random
import socket
import sys
import tempfile
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


@dataclass
class Report:
    """What a soak saw."""

    seconds: float = 0.0
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

    def __str__(self) -> str:
        first, last = (self.samples[0][1] / 2**20, self.samples[-1][1] / 2**20) if self.samples else (0, 0)
        c = self.counts
        return (
            f"{self.seconds / 3600:.2f} h, {c['requests']} requests, {c['leavers']} left early, {c['bad']} bad inputs "
            f"(all 4xx), {c['faults']} faults; {c['canaries']} canaries, {c['equal']} equal, {c['hit']} "
            f"hit by a fault; {c['failed']} requests failed by a fault; rounds that left blocks or requests: "
            f"{c['leaked']}; anything wrong: {len(self.problems)}; RSS {first:.0f} to {last:.0f} MB, slope "
            f"{self.slope():+.1f} MB/h"
        )


class Soak:
    """One server, soaked round by round."""

    def __init__(self, server: Server, *, share: float | None = None, hold: Path | None = None) -> None:
        self.server, self.share, self.hold = server, share, hold
        self.report = Report()
        for _ in range(3):  # warm: allocators, caches
            server.ask_all(bodies(16, 60))
        self.canaries = [(CANARY, server.ask(CANARY).tokens), (SEEDED, server.ask(SEEDED).tokens)]
        server.wait_idle()
        self.before = server.figures()

    def run(self, seconds: float, log: Path | None = None) -> Report:
        """Rounds for so many seconds, those held not counted."""
        number, report, used = 0, self.report, self._used()
        with ThreadPoolExecutor(16) as pool:
            while report.seconds < seconds:
                while self.hold is not None and self.hold.exists():
                    time.sleep(1)
                began = time.monotonic()
                self._round(number, pool)
                if self.share:
                    spent, used = self._used() - used, self._used()
                    time.sleep(max(0.0, spent / self.share - (time.monotonic() - began)))
                report.seconds += time.monotonic() - began
                number += 1
                if log is not None and (number % 50 == 0 or report.problems):
                    log.write_text(f"{report}\n" + "".join(f"{problem}\n" for problem in report.problems[:20]))
        return report

    def _used(self) -> float:
        return time.process_time() + self.server.processor_seconds()

    def _round(self, number: int, pool: ThreadPoolExecutor) -> None:
        report, server, dice = self.report, self.server, random.Random(number)
        fault = dice.choice(sorted(FAULTS)) if number % 4 == 3 else None
        if fault is not None:
            report.counts["faults"] += 1
            server.tell({fault: FAULTS[fault]})
        canaries = [(*canary, dice.random() < 0.5) for canary in self.canaries]
        told = [pool.submit(server.ask, asked | {"stream": stream}) for asked, _, stream in canaries]
        others = [
            body(number * 4 + index, dice.randint(1, 80), stream=dice.random() < 0.5) | dice.choice(KINDS)
            for index in range(4)
        ]
        answers = [pool.submit(server.ask, asked) for asked in others]
        leaving = [pool.submit(self._leave, number * 3 + index, dice.random() * 0.06) for index in range(3)]
        bad = server.ask(CANARY | dice.choice(BAD))
        for (_, tokens, _), future in zip(canaries, told, strict=True):
            self._judge(future.result(), fault, "canaries", tokens)
        for future in answers:
            self._judge(future.result(), fault, "requests", None)
        for gone in leaving:
            gone.result()
        report.counts["requests"] += 2 + 3 + 1
        report.counts["leavers"] += 3
        report.counts["bad"] += 1
        if not 400 <= bad.status < 500:
            report.problems.append(f"round {number}: bad input: {bad}")
        if fault is not None:
            server.arm()
        try:
            server.wait_idle()
        except AssertionError:
            report.counts["leaked"] += 1
            report.problems.append(f"round {number} ({fault}): not idle: {server.figures()}")
        figures = server.figures()
        report.samples.append((report.seconds, figures["rss"]))
        for name, most in (("files", 24), ("threads", 8), ("tasks", 24)):
            if figures[name] > self.before[name] + most:
                report.problems.append(f"round {number}: {name}: {self.before[name]:.0f} to {figures[name]:.0f}")

    def _judge(self, answer: Answer, fault: str | None, kind: str, tokens: list[int] | None) -> None:
        self.report.counts[kind] += 1
        if answer.ok and (tokens is None or answer.tokens == tokens):
            self.report.counts["equal"] += tokens is not None
            return
        if fault is not None and answer.errors == 1 and answer.status in (200, 500, 503):
            self.report.counts["hit" if kind == "canaries" else "failed"] += 1
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
    parser.add_argument("--share", type=float, help="most processor time, of one core (default: as fast as it goes)")
    parser.add_argument("--hold", type=Path, help="stand still between rounds while this file exists")
    parser.add_argument("--log", type=Path, help="write the figures here as it goes")
    given = parser.parse_args()
    options = {"max_num_seqs": 8, "num_blocks": 512}
    with tempfile.TemporaryDirectory() as directory, Server(Path(directory), engine=options) as server:
        report = Soak(server, share=given.share, hold=given.hold).run(60 * given.minutes, given.log)
        print(report, json.dumps(server.figures()), *report.problems, sep="\n")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
