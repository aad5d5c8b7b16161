#!/usr/bin/env python3
"""What sampling fields cost: output tokens a second with each, with drafts and without, beside plain sampling.

    python loadtest/fields.py [--users 1,8,32] [--rounds 3] [--fields repetition-1.1,logprobs-5] [--server 'COMMAND']

One server answers the same requests with the fields of each row, in turn, once with its drafter and once without
(`"speculation": {"enabled": false}`). Figures are medians of the rounds; `drafts` is the median of each round's ratio
of the two, and `of plain` that of its speed without drafts to plain sampling at the same temperature without drafts:
what the fields cost. COMMAND lacks only --port. Prefix caching should be off, as it is by default.

Exit status 1 if a row misses a bar: drafts at least 0.97 of none; penalties, biases, words and logprobs at least 0.95
of plain sampling, JSON schemas 0.90. Filters have no bar here.
"""

import argparse
import asyncio
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `python loadtest/fields.py`

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from loadtest.client import LoadTestError, RequestOptions, closed_loop, connect
from loadtest.options import count, counts
from loadtest.run import DEFAULT_MODEL
from loadtest.servers import DSPARK_SERVER, Server
from loadtest.workload import Prompts

DRAFTS = 0.97  # least speed with drafts, of that without


@dataclass(frozen=True)
class Fields:
    """Fields of a request; `plain`: the row they are compared with; `least`: the bar of that ratio, None: no bar."""

    body: dict[str, Any]
    plain: str = "greedy"
    least: float | None = 0.95


# An answer that cannot end before --max-tokens: a shorter one would be compared for its prompt.
_THING = {"type": "object", "properties": {"name": {"type": "string"}, "parts": {"type": "array", "items": {"type": "string"}, "minItems": 90}}, "required": ["name", "parts"]}  # fmt: skip  # noqa: E501
_SCHEMA = {"type": "json_schema", "json_schema": {"name": "thing", "schema": _THING}}

ROWS = {
    "greedy": Fields({}),
    "temperature-0.7": Fields({"temperature": 0.7}, "temperature-0.7"),
    "temperature-0.1": Fields({"temperature": 0.1}, "temperature-0.1"),
    "repetition-1.1": Fields({"repetition_penalty": 1.1}),
    "repetition-1.3": Fields({"repetition_penalty": 1.3}),
    "frequency-0.5": Fields({"frequency_penalty": 0.5}),
    "biases": Fields({"logit_bias": {str(token): -1.0 for token in range(200, 500)}}),
    "bad-words": Fields({"bad_words": ["however", "in conclusion", "moreover", "delve"]}),
    "logprobs-5": Fields({"logprobs": 5}),
    "logprobs-20": Fields({"logprobs": 20}),
    "qwen": Fields(
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}, "temperature-0.7", None
    ),
    "sharp-top-k-50": Fields({"temperature": 0.1, "top_k": 50}, "temperature-0.1", None),
    "schema": Fields({"response_format": _SCHEMA}, least=0.90),
}

Found = dict[tuple[str, int, bool], list[float]]  # output tokens a second of every round, by row, users, with drafts


async def speed(url: str, model: str, users: int, requests: int, tokens: int, body: dict[str, Any]) -> float:
    """Output tokens a second of `requests` requests of `users` users. Raises LoadTestError if one fails."""
    async with connect(url) as client:
        began = time.perf_counter()
        options = RequestOptions(model=model, max_tokens=tokens, extra_body=body)
        outcomes = await closed_loop(client, options, Prompts(None), users=users, requests=requests)
        seconds = time.perf_counter() - began
    if failed := next((each for each in outcomes if each.error), None):
        raise LoadTestError(f"a request failed: {failed.error} {failed.detail}")
    return sum(each.output_tokens for each in outcomes) / seconds


async def measure(arguments: argparse.Namespace, found: Found, console: Console) -> None:
    """Fill `found`, round by round."""
    rows = list(dict.fromkeys([*(ROWS[name].plain for name in arguments.fields), *arguments.fields]))
    with ExitStack() as stack:
        server = Server("dspark", arguments.server, Path("build/fields.log"))
        stack.callback(server.stop)
        await server.ready(600)
        progress = stack.enter_context(Progress(console=console, transient=True))
        bar = progress.add_task("warming up", total=2 * arguments.rounds * len(rows) * len(arguments.users))
        for users in arguments.users:
            await speed(server.url, arguments.model, users, users, 32, {})
        for round_ in range(arguments.rounds):
            for users in arguments.users:
                for name in rows if round_ % 2 == 0 else rows[::-1]:
                    for drafts in (True, False) if round_ % 2 == 0 else (False, True):
                        progress.update(bar, description=f"{name}, {users} users, drafts {drafts}")
                        body = ROWS[name].body | ({} if drafts else {"speculation": {"enabled": False}})
                        requests = max(4, 2 * users)
                        tokens_a_second = await speed(
                            server.url, arguments.model, users, requests, arguments.max_tokens, body
                        )
                        found.setdefault((name, users, drafts), []).append(tokens_a_second)
                        server.check(f"with {users} users, {name}")
                        progress.advance(bar)


def report(found: Found, console: Console) -> bool:
    """Print the table; returns whether all bars are kept. Rounds may have been cut short."""
    table = Table("fields", "users", "with drafts", "without", "drafts", "of plain", "missed")
    kept = True
    for name, users in dict.fromkeys((name, users) for name, users, _ in found):
        with_, without = (found.get((name, users, drafts), []) for drafts in (True, False))
        plain = found.get((ROWS[name].plain, users, False), [])
        ratios, costs = _ratios(with_, without), _ratios(without, plain)
        if not ratios or not costs:
            continue
        least = ROWS[name].least
        bars = (("drafts", median(ratios), DRAFTS), ("of plain", median(costs), least))
        missed = [label for label, ratio, bar in bars if bar is not None and ratio < bar]
        kept &= not missed
        table.add_row(
            name, str(users), f"{median(with_):.0f}", f"{median(without):.0f}", f"{median(ratios):.2f}",
            f"{median(costs):.2f}", ", ".join(missed),
        )  # fmt: skip
    console.print(table)
    return kept


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=False)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", type=lambda text: text.split(","), default=list(ROWS), help="rows; default: all")
    parser.add_argument("--users", type=counts, default=[1, 8, 32], help="users at once (default: 1,8,32)")
    parser.add_argument("--rounds", type=count, default=3, help="default: 3")
    parser.add_argument("--max-tokens", type=count, default=96, help="of each answer (default: 96)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name that the server knows the model by")
    parser.add_argument("--server", type=shlex.split, help="command; default: this checkout's, on its default model")
    arguments = parser.parse_args()
    if unknown := [each for each in arguments.fields if each not in ROWS]:
        parser.error(f"--fields: {unknown[0]!r} is not one of {', '.join(ROWS)}")
    arguments.server = arguments.server or [*DSPARK_SERVER, "serve", DEFAULT_MODEL, "--no-enable-prefix-caching"]
    console, found, ended = Console(), Found(), None
    try:
        asyncio.run(measure(arguments, found, console))
    except LoadTestError as error:
        ended = f"[red]{error}[/red]"
    except KeyboardInterrupt:
        ended = "interrupted"
    kept = report(found, console)
    if ended is not None:
        console.print(ended)
        return 2
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
