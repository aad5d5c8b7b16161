#!/usr/bin/env python3
"""Recorded passes (CUDA graphs) in the simulator: what it gains to price a pass as it runs.

    python loadtest/stairs.py                                # Qwen3-8B and V4, 4 to 512 users, two sets of sizes
    python loadtest/stairs.py --users 64 --recorded 1,2,4,8,16,32,64,128,256,512

Passes and drafts run at recorded sizes; past the largest, eagerly, which costs --eager more. `smooth` is `causal` with
the same costs measured at sizes that double, and lines between them; `oracle` sees the survivals it cuts by, and tries
every number. Virtual time: no figure depends on this machine.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dspark_server.engine.simulate import DOMAINS
from dspark_server.errors import DSparkServerError
from dspark_server.evaluation.roofline import Machine
from dspark_server.evaluation.simulation import Point, Simulation, Workload
from dspark_server.evaluation.stairs import Oracle, smoothed, stepped
from dspark_server.runtime.graphs import default_sizes

PROFILES = Path(__file__).parents[1] / "configs/profiles"
DEFAULT = [PROFILES / "qwen3-8b-h100.json", PROFILES / "deepseek-v4-flash-8xh200.json"]
USERS = (4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
COARSE = tuple(1 << power for power in range(10))
SYSTEMS = ("none", "smooth", "causal", "lagged", "oracle")


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate and print."""
    args = parser().parse_args(arguments)
    workload = Workload(domain=args.domain)
    console, rows = Console(width=None if sys.stdout.isatty() else 150), []
    try:
        for path in args.profile:
            machine = Machine.load(path)
            for sizes in args.recorded:
                truth = stepped(machine, sizes, args.eager)
                title = f"{machine.name}, {len(sizes)} recorded sizes to {sizes[-1]}, eager +{1e3 * args.eager:g} ms"
                table = Table("users", *SYSTEMS, "causal / smooth", "causal / oracle", "lagged / oracle", title=title)
                for users in args.users:
                    asked = replace(workload, requests=args.each * users)  # so that the first steps count little
                    points = {name: point(truth, name, users, asked) for name in SYSTEMS}
                    made = {name: each.throughput for name, each in points.items()}
                    cells = [f"{made[name] / 1e3:.2f} ({points[name].budget:.2f})" for name in SYSTEMS]
                    pairs = (("causal", "smooth"), ("causal", "oracle"), ("lagged", "oracle"))
                    table.add_row(str(users), *cells, *(f"{made[a] / made[b]:.3f}" for a, b in pairs))
                    rows += [{"sizes": sizes, "system": name} | asdict(each) for name, each in points.items()]
                console.print(table)
    except DSparkServerError as error:
        print(f"stairs: {error}", file=sys.stderr)
        return 2
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def point(truth: Machine, system: str, users: int, workload: Workload) -> Point:
    """One system at one concurrency."""
    if system == "smooth":
        return Simulation(truth, "causal", users, workload, believed=smoothed(truth)).run()
    if system == "oracle":
        return Simulation(truth, "causal", users, workload, selection=Oracle).run()
    return Simulation(truth, system, users, workload).run()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--profile", type=Path, nargs="+", default=DEFAULT, help="machines; default Qwen3-8B and V4-Flash")
    add("--users", type=_numbers, default=USERS, metavar="N,N", help="users at a time; default 4 to 512")
    add(
        "--recorded",
        type=_numbers,
        nargs="+",
        default=[default_sizes(1 << 14), COARSE],
        metavar="N,N",
        help="recorded sizes; default the server's, and powers of two to 512",
    )
    add("--eager", type=float, default=2e-3, help="seconds more of a pass past the largest; default 0.002")
    add("--domain", choices=DOMAINS, default="code", help="whose acceptance; default code")
    add("--each", type=int, default=1, help="requests of each user after the first; default 1")
    add("--out", type=Path, help="JSON of every point")
    return result


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("sizes are at least 1")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
