"""`make test-reliability`: every case of RELIABILITY on a live server, canary requests beside it; prints a table.

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
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.reliability.cases import CASES, Bench, Case


def run(case: Case, bench: Bench) -> tuple[bool, str, float]:
    """(passed, what was seen, seconds)."""
    began = time.monotonic()
    try:
        seen, passed = case.run(bench), True
    except Exception as error:
        traceback.print_exc()
        seen, passed = f"{type(error).__name__}: {error}"[:300], False
    finally:
        bench.close()
    return passed, seen, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only cases whose name has one of these words in it")
    parser.add_argument("--fast", action="store_true", help="only the cases that take a few seconds")
    parser.add_argument("--soak", type=float, default=300.0, help="seconds of the soak (default: 300)")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    chosen = [
        case
        for case in CASES
        if (not arguments.words or any(word in case.name for word in arguments.words))
        and not (arguments.fast and case.slow)
    ]
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for case in chosen:
            print(f"... {case.name}", file=sys.stderr, flush=True)
            bench = Bench(Path(directory), soak=arguments.soak)
            rows.append((case, *run(case, bench)))
    table = Table("case", "expected", "seen", "s", "", title="Reliability: faults on a live server")
    for case, passed, seen, seconds in rows:
        table.add_row(case.name, case.expected, seen, f"{seconds:.0f}", "ok" if passed else "[red]FAILED")
    Console(width=180 if not sys.stdout.isatty() else None).print(table)
    if arguments.markdown:
        lines = ["| case | expected | seen | |", "| --- | --- | --- | --- |"]
        lines += [f"| {c.name} | {c.expected} | {seen} | {'ok' if ok else '**failed**'} |" for c, ok, seen, _ in rows]
        arguments.markdown.write_text("\n".join(lines) + "\n")
    failed = [case.name for case, passed, *_ in rows if not passed]
    print(
        f"{len(rows) - len(failed)} of {len(rows)} cases as expected"
        + (f"; not: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
