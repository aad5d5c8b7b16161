"""The chaos runner: every case on a live server, canary requests beside it; prints a table.

    python -m tests.reliability.chaos [WORDS ...] [--fast] [--soak SECONDS] [--markdown FILE]

A case gets a server in a process of its own (the real engine, a tiny model), injects its fault and returns what was
seen; an assertion that fails is the case's failure. Canaries are greedy requests with known tokens: whatever is
injected, one may be refused or fail with an honest error, but never say anything else.
"""

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.reliability.cases import CASES, Bench, Case


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    expected: str
    seen: str
    passed: bool
    seconds: float


def cases(words: Sequence[str], *, soak: float, fast: bool = False) -> Iterator[Row]:
    """Run the cases that have one of these words in their names."""
    with tempfile.TemporaryDirectory() as directory:
        for case in CASES:
            if any(word in case.name for word in words) and not (fast and case.slow):
                print(f"... {case.name}", file=sys.stderr, flush=True)
                row = run(case, Bench(Path(directory), soak=soak))
                print(f"    {'ok' if row.passed else 'FAILED'}: {row.seen}", file=sys.stderr, flush=True)
                yield row


def run(case: Case, bench: Bench) -> Row:
    """Run one."""
    began = time.monotonic()
    try:
        seen, passed = case.run(bench), True
    except Exception as error:
        traceback.print_exc()
        seen, passed = f"{type(error).__name__}: {error}"[:300], False
    finally:
        bench.close()
    return Row(case.name, case.expected, seen, passed, time.monotonic() - began)


def show(rows: Sequence[Row], markdown: Path | None, seconds: float) -> int:
    """Print the table, write it too; the exit code."""
    table = Table("case", "expected", "seen", "s", "", title="Reliability")
    for row in rows:
        mark = "ok" if row.passed else "[red]FAILED"
        table.add_row(row.name, row.expected, row.seen.replace("[", r"\["), f"{row.seconds:.0f}", mark)
    Console(width=180 if not sys.stdout.isatty() else None).print(table)
    if markdown:
        lines = ["| case | expected | seen | s | |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {row.name} | {row.expected} | {row.seen} | {row.seconds:.0f} | {'ok' if row.passed else '**failed**'} |"
            for row in rows
        ]
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text("\n".join(lines) + "\n")
    failed = [row.name for row in rows if not row.passed]
    print(
        f"{len(rows) - len(failed)} of {len(rows)} as expected in {seconds / 60:.0f} min"
        + (f"; not: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", default=[""], help="only cases whose name has one of these words in it")
    parser.add_argument("--fast", action="store_true", help="only the cases that take a few seconds")
    parser.add_argument("--soak", type=float, default=240.0, help="seconds of the soak (default: 240)")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    given = parser.parse_args()
    began = time.monotonic()
    rows = list(cases(given.words or [""], soak=given.soak, fast=given.fast))
    return show(rows, given.markdown, time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
