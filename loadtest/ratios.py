#!/usr/bin/env python3
"""An adaptive policy against the better of others, from results.json files of loadtest/run.py --compare.

A cell is one file and one load. Its ratio is the geometric mean, over rounds, of the policy's output tok/s over those
of the other policy whose median is best there. The noise of a round is taken to be the same in every cell: its variance
is pooled, and 95 % intervals follow from it.

examples:
  loadtest/run.py --compare none,fixed,causal --rounds 3 --steady 10 --prompts math.jsonl --out build/math  # code, chat
  loadtest/ratios.py build/math build/code build/chat
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `python loadtest/ratios.py`

from loadtest.report import Level, level_of

NORMAL = 1.96  # half the width of a 95 % interval, in standard deviations


@dataclass(frozen=True)
class Cell:
    """One load of one file: the median tok/s of every policy, and the log ratio of each round."""

    name: str
    level: Level
    medians: dict[str, float]
    logs: list[float]


def cells_of(name: str, runs: Sequence[dict[str, Any]], policy: str) -> list[Cell]:
    """The cells of one file, in the order its loads were first measured. Loads without both sides are left out."""
    loads: dict[Level, dict[str, dict[int, float]]] = {}
    for run in runs:
        by_policy = loads.setdefault(level_of(run), {})
        by_policy.setdefault(run["label"], {})[run["round"]] = run["output_throughput"]
    cells = []
    for level, by_policy in loads.items():
        medians = {label: statistics.median(rounds.values()) for label, rounds in by_policy.items()}
        others = {label: value for label, value in medians.items() if label != policy}
        if policy not in medians or not others:
            continue
        best = by_policy[max(others, key=lambda label: others[label])]
        logs = [math.log(value / best[r]) for r, value in by_policy[policy].items() if value and best.get(r)]
        cells.append(Cell(name, level, medians, logs))
    return [cell for cell in cells if cell.logs]


def pooled_deviation(cells: Sequence[Cell]) -> float | None:
    """Standard deviation of a round's log ratio within its cell; None where no cell has two rounds."""
    freedom = sum(len(cell.logs) - 1 for cell in cells)
    squares = sum((value - statistics.fmean(cell.logs)) ** 2 for cell in cells for value in cell.logs)
    return math.sqrt(squares / freedom) if freedom else None


def table(cells: Sequence[Cell], policy: str) -> str:
    """Markdown: every cell with its interval, then the geometric mean of all."""
    labels = list(dict.fromkeys(label for cell in cells for label in cell.medians))
    deviation = pooled_deviation(cells)
    lines = [f"| | load | {' | '.join(labels)} | {policy} / better | 95 % |", "| --- " * (len(labels) + 4) + "|"]
    for cell in cells:
        middle = statistics.fmean(cell.logs)
        figures = " | ".join(f"{cell.medians[label]:.1f}" if label in cell.medians else "-" for label in labels)
        interval = _interval(middle, deviation, len(cell.logs))
        lines.append(f"| {cell.name} | {cell.level} | {figures} | {math.exp(middle):.2f} | {interval} |")
    means = [statistics.fmean(cell.logs) for cell in cells]
    rounds = statistics.harmonic_mean([len(cell.logs) for cell in cells]) * len(cells)
    interval = _interval(statistics.fmean(means), deviation, rounds)
    lines += ["", f"Geometric mean of {len(cells)} cells: {math.exp(statistics.fmean(means)):.3f} ({interval})"]
    return "\n".join(lines)


def _interval(middle: float, deviation: float | None, rounds: float) -> str:
    if deviation is None:
        return "one round"
    half = NORMAL * deviation / math.sqrt(rounds)
    return f"{math.exp(middle - half):.2f} to {math.exp(middle + half):.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    description, _, examples = (__doc__ or "").partition("examples:")
    parser = argparse.ArgumentParser(
        prog="loadtest/ratios.py",
        description=description,
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="DIR", help="--out of a run; names its cells")
    parser.add_argument("--policy", default="causal", help="the one to judge (default causal)")
    arguments = parser.parse_args(argv)
    cells: list[Cell] = []
    for directory in arguments.results:
        try:
            runs = json.loads((directory / "results.json").read_text(encoding="utf-8"))["runs"]
        except (OSError, ValueError, KeyError) as error:
            print(f"ratios: {directory / 'results.json'} is not what run.py writes: {error!r}", file=sys.stderr)
            return 1
        cells += cells_of(directory.name, runs, arguments.policy)
    if not cells:
        print(f"ratios: no load was measured both with {arguments.policy} and another policy", file=sys.stderr)
        return 1
    print(table(cells, arguments.policy))
    return 0


if __name__ == "__main__":
    sys.exit(main())
