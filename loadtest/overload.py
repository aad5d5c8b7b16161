#!/usr/bin/env python3
"""What becomes of a server that is asked for more than it can do: a server is started here, on the real model.

    python loadtest/overload.py [--seconds 20] [--streams 8,32,64,128,256] [--loads 0.5,0.9,1.5,3] [-- serve options]

First so many streams at once, each user sending the next request when the last one ended: output tokens a second of
the requests that finished. Then Poisson arrivals at shares of the best of these: requests finished a second (goodput),
refused ones (503) not among them. Exit status 1 if goodput at the highest load is under 80 % of its peak.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `python loadtest/overload.py`

from rich.console import Console
from rich.table import Table

from loadtest.client import Outcome, RequestOptions, closed_loop, connect, open_loop
from loadtest.run import DEFAULT_MODEL
from loadtest.servers import DSPARK_SERVER, Server
from loadtest.workload import Prompts, poisson_arrivals

KEPT = 0.8  # share of the peak: the bar
HELD = 0.95  # share of the peak: rates from here on count as equal to it
SERVE = ["--max-num-seqs", "32", "--max-num-queued-reqs", "224", "--queue-timeout", "5"]


def rate(outcomes: Sequence[Outcome], seconds: float) -> tuple[float, float]:
    """Finished requests and their output tokens per second."""
    done = [outcome for outcome in outcomes if outcome.error is None]
    return len(done) / seconds, sum(outcome.output_tokens for outcome in done) / seconds


def fates(outcomes: Sequence[Outcome]) -> str:
    """Number of requests by outcome."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(each.error or "done" for each in outcomes).items())


async def measure(url: str, seconds: float, streams: Sequence[int], loads: Sequence[float], console: Console) -> bool:
    """Both tables; returns whether the bar was met."""
    options, prompts = RequestOptions(model=DEFAULT_MODEL, max_tokens=64), Prompts(None)
    found: dict[int, tuple[float, float]] = {}
    async with connect(url) as client:
        await closed_loop(client, options, prompts, users=4, requests=8)
        table = Table("streams", "tok/s", "requests/s", "fates", title="Streams at once")
        for users in streams:
            began = time.perf_counter()
            outcomes = await closed_loop(client, options, prompts, users=users, first=1000 * users, duration=seconds)
            found[users] = rate(outcomes, time.perf_counter() - began)
            table.add_row(str(users), f"{found[users][1]:.1f}", f"{found[users][0]:.2f}", fates(outcomes))
        console.print(table)
        capacity = max(requests for requests, _ in found.values())
        best = max(tokens for _, tokens in found.values())
        held = max(users for users, (_, tokens) in found.items() if tokens >= HELD * best)
        console.print(
            f"held with at least {HELD:.0%} of the best tok/s: {held} streams; capacity {capacity:.2f} requests/s"
        )
        table = Table("load", "offered/s", "goodput/s", "fates", title="Open loop")
        goodput = {}
        for load in loads:
            arrivals = poisson_arrivals(load * capacity, f"overload/{load}", duration=seconds)
            began = time.perf_counter()
            outcomes = await open_loop(client, options, prompts, arrivals=arrivals, first=int(1e6 * load))
            goodput[load] = rate(outcomes, time.perf_counter() - began)[0]
            table.add_row(f"{load:g} x", f"{load * capacity:.2f}", f"{goodput[load]:.2f}", fates(outcomes))
        console.print(table)
    share = goodput[max(loads)] / max(goodput.values())
    console.print(f"goodput at {max(loads):g} x capacity: {share:.0%} of its peak (bar {KEPT:.0%})")
    return share >= KEPT


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (default: 20)")
    parser.add_argument("--streams", default="8,32,64,128,256")
    parser.add_argument("--loads", default="0.5,0.9,1.5,3")
    parser.add_argument("serve", nargs="*", help="options of `dspark-server serve`, behind --")
    given = parser.parse_args()
    server = Server(
        "overload", [*DSPARK_SERVER, "serve", DEFAULT_MODEL, *SERVE, *given.serve], Path("build/overload.log")
    )
    try:
        await server.ready(600)
        streams, loads = [int(part) for part in given.streams.split(",")], [float(p) for p in given.loads.split(",")]
        return 0 if await measure(server.url, given.seconds, streams, loads, Console()) else 1
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
