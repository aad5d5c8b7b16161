"""Ratios against the better of other policies, and how sure they are."""

import json
import math
from pathlib import Path

import pytest

from loadtest.ratios import cells_of, main, pooled_deviation


def run(label: str, users: int, round_number: int, rate: float) -> dict[str, object]:
    return {
        "label": label,
        "max_concurrency": users,
        "request_rate": "inf",
        "round": round_number,
        "output_throughput": rate,
    }


RUNS = [
    *(run("none", 1, r, 100.0) for r in (1, 2)),
    *(run("fixed", 1, r, rate) for r, rate in ((1, 200.0), (2, 220.0))),
    *(run("causal", 1, r, rate) for r, rate in ((1, 220.0), (2, 198.0))),
    *(run("none", 8, r, 300.0) for r in (1, 2)),
    *(run("fixed", 8, r, 150.0) for r in (1, 2)),
    *(run("causal", 8, r, 300.0) for r in (1, 2)),
    run("none", 16, 1, 10.0),
]


def test_the_better_of_the_others_is_the_measure_round_by_round() -> None:
    one, eight = cells_of("math", RUNS, "causal")
    assert [math.exp(value) for value in one.logs] == pytest.approx([1.1, 0.9])
    assert eight.logs == [0.0, 0.0]
    assert eight.medians == {"none": 300.0, "fixed": 150.0, "causal": 300.0}
    deviation = pooled_deviation([one, eight])
    half = (math.log(1.1) - math.log(0.9)) / 2
    assert deviation == pytest.approx(math.sqrt(2 * half**2 / 2))
    assert pooled_deviation(cells_of("math", [r for r in RUNS if r["round"] == 1], "causal")) is None


def test_the_table_names_cells_intervals_and_the_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("math", "code"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"runs": RUNS}))
    assert main([str(tmp_path / "math"), str(tmp_path / "code")]) == 0
    shown = capsys.readouterr().out
    assert "| math | c=1 | 100.0 | 210.0 | 209.0 | 0.99 | 0.87 to 1.14 |" in shown
    assert "Geometric mean of 4 cells: 0.997 (0.93 to 1.07)" in shown


def test_what_cannot_be_judged_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "is not what run.py writes" in capsys.readouterr().err
    (tmp_path / "results.json").write_text(json.dumps({"runs": RUNS}))
    assert main([str(tmp_path), "--policy", "lagged"]) == 1
    assert "both with lagged and another" in capsys.readouterr().err
