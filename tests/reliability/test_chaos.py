"""The part of the chaos runner that every `make test` runs; all of it: `make test-reliability`."""

from pathlib import Path

import pytest

from tests.reliability.cases import CASES, Bench

FAST = (
    "forward raises once",
    "commit fails in the middle of a batch",
    "step thread dies",
    "forward hangs (--step-timeout 1)",
    "SIGTERM, 1 s given",
)


@pytest.mark.parametrize("name", FAST)
def test_case(name: str, tmp_path: Path) -> None:
    [case] = [case for case in CASES if case.name == name]
    bench = Bench(tmp_path, soak=0)
    try:
        assert case.run(bench)
    finally:
        bench.close()
