"""`make test-reliability`: everything that shows reliability, and one table at the end: case, expected, seen.

    python -m tests.reliability [--soak SECONDS] [--fuzz SECONDS] [--markdown FILE] [--only WORD]

Tests and fuzzers run in processes of their own, then the chaos cases (`tests.reliability.chaos`), the soak among them.
Exit status 0 if everything was as expected.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.reliability.chaos import Row, cases, show
from tests.reliability.fuzz import TARGETS, fuzz

SUITES = {
    "block pool: random operations": ("tests/engine/test_blocks.py", "free + cached + held == total after each"),
    "batcher, pool and step loop: random histories": (
        "tests/engine/test_machine.py",
        "each request ends once, with exactly its tokens, which hash the KV rows read",
    ),
    "a step fails at each point, the thread dies or hangs": (
        "tests/engine/test_supervision.py",
        "one terminal event each, no block lost",
    ),
    "preemption asked for at every point of a step": (
        "tests/engine/test_preemption.py",
        "in effect between commit and next draft only; the same tokens",
    ),
    "NaN at a draft slot": ("tests/speculation/test_nan.py", "that request's prefix is cut there, no other's"),
    "limits of keys, deadlines, turns, logs": ("tests/api/test_limits.py", "429, 503 and 504 with Retry-After"),
    "bad input": ("tests/api/test_bad_input.py", "each a bounded 4xx, then a canary"),
    "bad input to chat": ("tests/api/test_chat_bad_input.py", "each a bounded 4xx, then a canary"),
    "bad numbers": ("tests/api/test_bad_numbers.py", "each a 4xx in every number there is"),
    "bad bytes": ("tests/api/test_bad_bytes.py", "lies about length, host, path and id are refused or bounded"),
    "the pool's edge, rules without a token": ("tests/api/test_real_bad_input.py", "a 4xx or exactly what fits"),
    "API keys and routes": ("tests/api/test_auth.py", "every route is closed unless listed"),
    "attacks": ("tests/api/test_security.py", "refused or bounded, others unaffected"),
    "cancelled at each await": ("tests/reliability/test_cancel.py", "no place, token, block or task is left"),
    "sources": ("tests/reliability/test_static.py", "no unpickling, foreign code, way out, wall-clock duration"),
    "outbound": ("tests/reliability/test_outbound.py", "no request makes the server connect"),
    "requirements": ("tests/reliability/test_requirements.py", "every package pinned exactly, licence known"),
    "exit code": ("tests/reliability/test_exit_code.py", "a dead engine: 70"),
    "schemathesis, positive and negative": (
        "tests/reliability/test_schema.py",
        "no 5xx; nothing accepted that does not fit",
    ),
}


def suites(word: str) -> Iterator[Row]:
    """Each test file as a row."""
    for name, (path, expected) in SUITES.items():
        if word in name:
            print(f"... {name}", file=sys.stderr, flush=True)
            began = time.monotonic()
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            seen = summary(done.stdout)
            skipped = " skipped" in seen and " passed" not in seen
            if done.returncode:
                print(done.stdout[-5000:] + done.stderr[-2000:], file=sys.stderr)
            yield Row(name, expected, seen, done.returncode == 0 and not skipped, time.monotonic() - began)


def summary(output: str) -> str:
    """pytest's last line, or with -q -q its dots counted."""
    found = re.findall(r"(\d+ (?:passed|failed|skipped|errors?))", output.strip().splitlines()[-1] if output else "")
    if found:
        return ", ".join(found)
    lines = [line.partition(" [")[0] for line in output.splitlines() if re.fullmatch(r"[.sFE]+( +\[ *\d+%\])?", line)]
    counts = {name: "".join(lines).count(mark) for mark, name in ((".", "passed"), ("F", "failed"), ("s", "skipped"))}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing ran"


def fuzzers(word: str, seconds: float) -> Iterator[Row]:
    """Each fuzzer as a row."""
    for target in TARGETS:
        name = f"fuzzer: {target}"
        if word in name:
            print(f"... {name}", file=sys.stderr, flush=True)
            began = time.monotonic()
            broken, seen = fuzz(target, seconds)
            yield Row(name, "no input breaks a property", seen, not broken, time.monotonic() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soak", type=float, default=240.0, help="seconds of the soak (default: 240)")
    parser.add_argument("--fuzz", type=float, default=30.0, help="seconds of each fuzzer (default: 30)")
    parser.add_argument("--only", default="", help="only what has this word in its name")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    given = parser.parse_args()
    began = time.monotonic()
    rows = [*suites(given.only), *fuzzers(given.only, given.fuzz), *cases([given.only], soak=given.soak)]
    return show(rows, given.markdown, time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
