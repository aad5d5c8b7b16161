#!/usr/bin/env python3
"""Thousands of concurrent users without a GPU: the production batcher and selection on a virtual clock.

    python loadtest/simulate.py                                     # the default sweep, about a minute on one core
    python loadtest/simulate.py --profile configs/profiles/qwen3-8b-h100.json --domain chat --concurrency 1,64,256
    python loadtest/simulate.py --prompt-tokens 128 --shared-tokens 0   # prompts are computed in the same passes
    python loadtest/simulate.py --derive configs/profiles           # write the profiles anew from the roofline

A profile says what passes and drafts cost; acceptance is drawn from a model calibrated to the paper's table 1. Results
go to --out: points.json, points.csv, figure7.png (throughput against speed per user) and figure8.png (throughput and
budget against concurrency), after the paper's figures of these numbers. docs/simulation.md explains them.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from dspark_server.engine.simulate import DOMAINS, PAPER_TAU
from dspark_server.errors import DSparkServerError
from dspark_server.evaluation.machines import MACHINES, derive
from dspark_server.evaluation.roofline import Machine
from dspark_server.evaluation.simulation import SYSTEMS, Point, Workload, at_matched_throughput, sweep

PROFILE = Path(__file__).parents[1] / "configs/profiles/deepseek-v4-flash-8xh200.json"
CONCURRENCY = [1, 8, 32, 64, 128, 256, 512, 1000, 2000]
BASELINES = ("mtp-1", "static-2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Derive profiles, or simulate a sweep and write it down."""
    args = parser().parse_args(arguments)
    try:
        if args.derive:
            args.derive.mkdir(parents=True, exist_ok=True)
            for name in MACHINES:
                derive(name).save(args.derive / f"{name}.json")
            return 0
        workload = Workload(**{f.name: getattr(args, f.name) for f in fields(Workload)})
        points = []
        machines = [Machine.load(path) for path in args.profile]
        total = len(machines) * len(args.policies) * len(args.concurrency)
        with tqdm(total=total, unit="point", dynamic_ncols=True) as bar:

            def progress(point: Point) -> None:
                bar.set_description(f"{point.machine}: {point.policy} x {point.concurrency}")
                bar.update()

            for machine in machines:
                points += sweep(machine, args.policies, args.concurrency, workload, progress)
    except DSparkServerError as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2
    report(points, workload, args.out)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--profile", type=Path, nargs="+", default=[PROFILE], help=f"machines; default {PROFILE.name}")
    add("--concurrency", type=_numbers, default=CONCURRENCY, metavar="N,N", help="users at a time; default 1 to 2000")
    add(
        "--policies",
        type=_policies,
        default=list(SYSTEMS),
        metavar="A,B",
        help=f"default all: {','.join(SYSTEMS)}; static-2 verifies one token of the same drafter, mtp-1 one token of "
        "a drafter of one layer, which costs less",
    )
    add("--domain", choices=DOMAINS, default="code", help="whose acceptance (GSM8K, HumanEval, MT-Bench); default code")
    add("--drafter", choices=list(PAPER_TAU), default="dspark", help="whose acceptance; only dspark knows confidence")
    add("--requests", type=int, default=16, help="measured at a point, at least; half of the users if more")
    add("--prompt-tokens", type=int, default=129, help="default 129")
    add("--shared-tokens", type=int, default=128, help="of the prompt, found in the prefix cache; default 128")
    add("--output-tokens", type=int, default=128, help="of each answer; default 128")
    add("--max-batched-tokens", type=int, default=Workload.max_batched_tokens, help="of a pass, as in serving")
    add("--threshold", type=float, default=0.5, help="of policy threshold; default 0.5")
    add("--seed", type=int, default=0, help="same seed, same figures; default 0")
    add("--out", type=Path, default=Path("build/simulation"), help="directory; default build/simulation")
    add("--derive", type=Path, metavar="DIR", help="only write the profiles derived from the roofline into DIR")
    return result


def report(points: list[Point], workload: Workload, out: Path) -> None:
    """Print the tables; write JSON, CSV and figures."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [asdict(point) for point in points]
    (out / "points.json").write_text(json.dumps({"workload": asdict(workload), "points": rows}, indent=1) + "\n")
    with (out / "points.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    console = Console(width=None if sys.stdout.isatty() else 140)
    for machine, own in _by_machine(points).items():
        console.print(table(machine, own))
        for baseline in BASELINES:
            for policy in ("causal", "lagged"):
                ratios = at_matched_throughput(_of(own, policy), _of(own, baseline))
                text = ", ".join(f"{ratio:.2f} (x {point.concurrency})" for point, ratio in ratios)
                if text:
                    console.print(f"Speed per user of {policy} over {baseline} at its throughput: {text}")
    figure_7(points, out / "figure7.png")
    figure_8(points, out / "figure8.png")
    console.print(f"Written: {out}/points.json, points.csv, figure7.png, figure8.png")


def table(machine: str, points: Sequence[Point]) -> Table:
    """Throughput, speed per user and budget: a row for each concurrency, a column for each policy."""
    result = Table(title=f"{machine}: thousand tok/s, tok/s per user, verified tokens a request and step")
    result.add_column("users", justify="right")
    policies = list(dict.fromkeys(point.policy for point in points))
    for policy in policies:
        result.add_column(policy, justify="right")
    for users in sorted({point.concurrency for point in points}):
        here = {point.policy: point for point in points if point.concurrency == users}
        cells = [f"{p.throughput / 1e3:.1f} {p.user_rate:5.0f} {p.budget:.1f}" for p in map(here.__getitem__, policies)]
        result.add_row(str(users), *cells)
    return result


def figure_7(points: list[Point], path: Path) -> None:
    """Throughput against speed per user, a line for each policy: further up and right is better."""
    machines = _by_machine(points)
    figure = Figure((5.5 * len(machines), 4.2), layout="constrained")
    for axes, (machine, own) in zip(figure.subplots(1, len(machines), squeeze=False)[0], machines.items(), strict=True):
        for policy in dict.fromkeys(point.policy for point in own):
            line = _of(own, policy)
            axes.plot([p.user_rate for p in line], [p.throughput for p in line], marker=".", label=policy)
        axes.set(title=machine, xlabel="tok/s per user", ylabel="tok/s", xlim=(0, None), ylim=(0, None))
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=80)


def figure_8(points: list[Point], path: Path) -> None:
    """Throughput, and the verification budget 1 + l, against concurrency."""
    machines = _by_machine(points)
    figure = Figure((5.5 * len(machines), 6), layout="constrained")
    panels = figure.subplots(2, len(machines), squeeze=False, sharex="col")
    for (above, below), (machine, own) in zip(panels.T, machines.items(), strict=True):
        for policy in dict.fromkeys(point.policy for point in own):
            line = _of(own, policy)
            users = [p.concurrency for p in line]
            above.plot(users, [p.throughput for p in line], marker=".", label=policy)
            below.plot(users, [p.budget for p in line], marker=".", label=policy)
        above.set(title=machine, ylabel="tok/s", xscale="log")
        below.set(xlabel="concurrent requests", ylabel="verified tokens a request, 1 + l", ylim=(0, None))
        above.legend(fontsize="small")
    figure.savefig(path, dpi=80)


def _by_machine(points: Sequence[Point]) -> dict[str, list[Point]]:
    return {name: [p for p in points if p.machine == name] for name in dict.fromkeys(p.machine for p in points)}


def _of(points: Sequence[Point], policy: str) -> list[Point]:
    return sorted((point for point in points if point.policy == policy), key=lambda point: point.concurrency)


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("there must be at least one user")
    return numbers


def _policies(text: str) -> list[str]:
    names = text.split(",")
    if unknown := sorted(set(names) - set(SYSTEMS)):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(SYSTEMS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
