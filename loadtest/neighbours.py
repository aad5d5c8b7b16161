#!/usr/bin/env python3
"""How much slower a server gets beside busy neighbours, and on half of the processors' time.

    python loadtest/neighbours.py [--users 1,8,32] [--rounds 5] [--server NAME='COMMAND']...

Each server answers the same greedy requests in three places, in turn: on the quiet machine; beside one endless loop per
core, each a process of equal priority; and under a cgroup quota of half of the cores (needs root; left out, and said,
where cgroups cannot be written). The table has the median seconds of the rounds, and the median of each round's ratio
to its own quiet time. COMMAND lacks only --port; without --server, this checkout's server runs on its default model.
Prefix caching should be off (as it is by default here), so that the same prompts cost the same every time.

Exit status 1 if a median ratio is above its bar: 2.1 at 1 user and 2.5 at more beside loops, 2.2 under the quota. Bars
hold for the first server.
"""

import argparse
import asyncio
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `python loadtest/neighbours.py`

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from loadtest.client import LoadTestError, RequestOptions, closed_loop, connect
from loadtest.options import counts
from loadtest.run import DEFAULT_MODEL
from loadtest.servers import DSPARK_SERVER, Server
from loadtest.workload import Prompts

CORES = len(os.sched_getaffinity(0))
LOOP = (sys.executable, "-S", "-c", "while True: pass")
PERIOD = 100_000  # microseconds: the period of a quota
PLACES = ("quiet", "loops", "quota")


def bar(place: str, users: int) -> float:
    """The greatest allowed ratio of a server's time to its quiet time."""
    return 2.2 if place == "quota" else 2.1 if users == 1 else 2.5


class Cgroup:
    """A control group of our own for one server, of version 2 or 1, whose quota can change while it runs."""

    def __init__(self, name: str) -> None:
        """Raises OSError if control groups cannot be written."""
        root = Path("/sys/fs/cgroup")
        self._unified = (root / "cgroup.controllers").exists()
        self.path = (root if self._unified else root / "cpu") / f"dspark-{os.getpid()}-{name}"
        self.path.mkdir()
        if not (self.path / ("cpu.max" if self._unified else "cpu.cfs_quota_us")).exists():
            self.path.rmdir()
            raise OSError("the cpu controller is not enabled")

    def limit(self, cores: float | None) -> None:
        """Limit the group to the time of `cores` cores; None: no limit."""
        quota = None if cores is None else int(cores * PERIOD)
        if self._unified:
            (self.path / "cpu.max").write_text(f"{'max' if quota is None else quota} {PERIOD}")
        else:
            (self.path / "cpu.cfs_quota_us").write_text(str(-1 if quota is None else quota))

    def around(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` in this group."""
        return ["sh", "-c", f'echo $$ > {shlex.quote(str(self.path / "cgroup.procs"))} && exec "$@"', "sh", *command]

    def remove(self) -> None:
        """Remove the group, as soon as its last process has ended; one that goes on keeps it, and no figure is lost."""
        for _ in range(100):
            try:
                return self.path.rmdir()
            except OSError:  # a server's own processes end a little after it
                time.sleep(0.1)


@contextmanager
def endless_loops(count: int) -> Iterator[None]:
    """`count` processes that never wait, while the context is open."""
    loops = [subprocess.Popen(LOOP) for _ in range(count)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


async def seconds_of(url: str, model: str, users: int, requests: int, tokens: int) -> float:
    """Seconds for `requests` requests of `users` users. Raises LoadTestError if one of them fails."""
    async with connect(url) as client:
        began = time.perf_counter()
        outcomes = await closed_loop(
            client, RequestOptions(model=model, max_tokens=tokens), Prompts(None), users=users, requests=requests
        )
        seconds = time.perf_counter() - began
    if failed := next((each for each in outcomes if each.error), None):
        raise LoadTestError(f"a request failed: {failed.error} {failed.detail}")
    return seconds


Found = dict[tuple[str, str, int], list[float]]  # seconds of every round, by server, place and number of users


async def measure(arguments: argparse.Namespace, found: Found, stack: ExitStack, console: Console) -> None:
    """Fill `found`, round by round."""
    servers: dict[str, Server] = {}
    groups: dict[str, Cgroup] = {}
    for name, command in arguments.server:
        try:
            groups[name] = Cgroup(name)
            stack.callback(groups[name].remove)
            command = groups[name].around(command)
        except OSError as error:
            console.print(f"no quota for {name}: {error}")
        servers[name] = Server(name, command, Path(f"build/neighbours-{name}.log"))
        stack.callback(servers[name].stop)
        await servers[name].ready(600)
    places = [place for place in arguments.places if place != "quota" or len(groups) == len(servers)]
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("measuring", total=arguments.rounds * len(servers) * len(arguments.users) * len(places))
        for round_ in range(-1, arguments.rounds):
            for name, server in servers.items():
                for users in arguments.users:
                    requests = max(4, 2 * users)
                    if round_ < 0:  # the first time warms up
                        await seconds_of(server.url, arguments.model, users, users, 32)
                        continue
                    for place in places if round_ % 2 == 0 else places[::-1]:
                        progress.update(bar, description=f"{name}, {users} users, {place}")
                        with endless_loops(CORES) if place == "loops" else ExitStack():
                            if place == "quota":
                                groups[name].limit(CORES / 2)
                                await asyncio.sleep(arguments.settle)
                            try:
                                seconds = await seconds_of(
                                    server.url, arguments.model, users, requests, arguments.max_tokens
                                )
                            finally:
                                if place == "quota":
                                    groups[name].limit(None)
                        if place == "quota":
                            await asyncio.sleep(arguments.settle)
                        found.setdefault((name, place, users), []).append(seconds)
                        console.print(f"round {round_ + 1}: {name}, {users} users, {place}: {seconds:.2f} s")
                        progress.advance(bar)
                        server.check(f"with {users} users, {place}")


def report(found: Found, first: str, console: Console) -> bool:
    """Print the table; returns whether the first server keeps its bars. Rounds may have been cut short."""
    table = Table("server", "users", "place", "seconds", "x quiet", "range", "bar")
    kept = True
    for (name, place, users), seconds in found.items():
        ratios = [here / quiet for here, quiet in zip(seconds, found.get((name, "quiet", users), []), strict=False)]
        if not ratios:
            continue
        ratio, limit = median(ratios), ""
        if place != "quiet" and name == first:
            within = ratio <= bar(place, users)
            kept &= within
            limit = f"{bar(place, users):g} {'kept' if within else 'missed'}"
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.add_row(name, str(users), place, f"{median(seconds):.2f}", f"{ratio:.2f}", spread, limit)
    console.print(table)
    return kept


def _server(text: str) -> tuple[str, list[str]]:
    name, separator, command = text.partition("=")
    if not separator or not name.isidentifier() or not command:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COMMAND")
    return name, shlex.split(command)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=counts, default=[1, 8, 32], help="users at once (default: 1,8,32)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--max-tokens", type=int, default=128, help="of each answer (default: 128)")
    parser.add_argument("--places", type=lambda text: text.split(","), default=PLACES, help="default: all three")
    parser.add_argument("--settle", type=float, default=6.0, help="seconds after a quota changes (default: 6)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name that the servers know the model by")
    parser.add_argument("--server", type=_server, action="append", help="NAME=COMMAND, may be repeated")
    arguments = parser.parse_args()
    if unknown := [place for place in arguments.places if place not in PLACES]:
        parser.error(f"--places: {unknown[0]!r} is not one of {', '.join(PLACES)}")
    if "quiet" not in arguments.places:
        parser.error("--places must contain quiet, which the others are compared with")
    if not arguments.server:
        own = [*DSPARK_SERVER, "serve", DEFAULT_MODEL, "--no-enable-prefix-caching"]
        arguments.server = [("dspark", own)]
    console, found, ended = Console(), Found(), None
    try:
        with ExitStack() as stack:
            asyncio.run(measure(arguments, found, stack, console))
    except LoadTestError as error:
        ended = f"[red]{error}[/red]"
    except KeyboardInterrupt:
        ended = "interrupted"
    kept = report(found, arguments.server[0][0], console)
    if ended is not None:
        console.print(ended)
        return 2
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
