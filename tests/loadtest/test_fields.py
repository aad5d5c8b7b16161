"""The tables of sampling fields and of survival: reports of known figures, and runs against the real server."""

import io
import re

import pytest
from rich.console import Console

from loadtest import fields, survival


def printed(report: object, found: object) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=140)
    kept = report(found, console)  # type: ignore[operator]
    assert isinstance(console.file, io.StringIO)
    return kept, console.file.getvalue()


def test_ratios_are_of_each_round() -> None:
    found: fields.Found = {
        ("greedy", 8, True): [200.0, 20.0, 90.0], ("greedy", 8, False): [100.0, 10.0, 100.0],
        ("logprobs-5", 8, True): [196.0, 19.6, 98.0], ("logprobs-5", 8, False): [98.0, 9.8, 98.0],
    }  # fmt: skip
    kept, table = printed(fields.report, found)
    assert kept
    assert re.search(r"greedy +│ 8 +│ 90 +│ 100 +│ 2\.00 +│ 1\.00", table)
    assert re.search(r"logprobs-5 +│ 8 +│ 98 +│ 98 +│ 2\.00 +│ 0\.98", table)


@pytest.mark.parametrize(
    ("with_", "without", "missed"), [(96.0, 100.0, "drafts"), (100.0, 94.0, "of plain"), (97.0, 96.0, "")]
)
def test_bars(with_: float, without: float, missed: str) -> None:
    found = {
        ("greedy", 1, True): [100.0], ("greedy", 1, False): [100.0],
        ("biases", 1, True): [with_], ("biases", 1, False): [without],
    }  # fmt: skip
    kept, table = printed(fields.report, found)
    assert kept is not bool(missed)
    row = next(line for line in table.splitlines() if "biases" in line)
    assert row.rstrip("│ ").endswith(missed or row.rstrip("│ ")[-1])


PAGE = """# TYPE vllm:spec_decode_num_drafts counter
vllm:spec_decode_num_drafts_total{{model_name="m"}} {blocks}
# TYPE dspark:survival_judged counter
dspark:survival_judged_total{{predicted="0.25"}} {low}
dspark:survival_judged_total{{predicted="0.75"}} {high}
# TYPE dspark:survival_predicted counter
dspark:survival_predicted_total{{predicted="0.25"}} {low_predicted}
dspark:survival_predicted_total{{predicted="0.75"}} {high_predicted}
# TYPE dspark:survival_survived counter
dspark:survival_survived_total{{predicted="0.25"}} {low_survived}
dspark:survival_survived_total{{predicted="0.75"}} {high_survived}
"""


def page(blocks: int, low: tuple[int, float, int], high: tuple[int, float, int]) -> survival.Survival:
    names = ("", "_predicted", "_survived")
    numbers = {f"{name}{kind}": value for name, row in (("low", low), ("high", high)) for kind, value in zip(names, row, strict=True)}  # fmt: skip  # noqa: E501
    return survival.Survival.parse(PAGE.format(blocks=blocks, **numbers))


def test_gaps_of_counters() -> None:
    """Errors of tenths add up in the calibration error, and cancel in the gap."""
    before, after = page(10, (4, 1.0, 2), (0, 0.0, 0)), page(60, (104, 26.0, 32), (100, 75.0, 70))
    grown = after.since(before)
    assert (grown.blocks, grown.judged) == (50, 200)
    assert grown.predicted == pytest.approx(50)
    assert grown.observed == pytest.approx(50)
    assert grown.gap == pytest.approx(0)
    assert grown.calibration_error == pytest.approx(5)
    assert printed(survival.report, {"greedy": (before, grown)})[0]
    worse = page(60, (104, 26.0, 22), (100, 75.0, 68)).since(before)
    kept, table = printed(survival.report, {"greedy": (before, worse)})
    assert not kept
    assert "+6.0" in table
