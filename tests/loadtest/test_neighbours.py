"""The measurement beside busy neighbours: on a fake server, and its report of known seconds."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from loadtest import neighbours

FAKE = f"{sys.executable} {Path(__file__).with_name('fake_server.py')} serve model --speculative-config {{}}"


def report(found: dict[tuple[str, str, int], list[float]]) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=120)
    kept = neighbours.report(found, "a", console)
    assert isinstance(console.file, io.StringIO)
    return kept, console.file.getvalue()


def test_ratios_are_of_each_round_and_bars_of_the_first_server() -> None:
    found = {("a", "quiet", 8): [1.0, 2.0, 4.0], ("a", "loops", 8): [2.4, 4.8, 40.0]}
    kept, table = report(found | {("b", "quiet", 8): [1.0], ("b", "loops", 8): [9.0]})
    assert kept
    assert "2.40" in table
    assert "2.40 to 10.00" in table
    assert report(found | {("a", "quota", 8): [2.3, 4.6, 9.2]})[0] is False


@pytest.mark.parametrize(
    ("place", "users", "most"), [("loops", 1, 2.1), ("loops", 8, 2.5), ("loops", 32, 2.5), ("quota", 1, 2.2)]
)
def test_bars(place: str, users: int, most: float) -> None:
    assert neighbours.bar(place, users) == most


def test_a_server_beside_loops_that_end_with_the_measurement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(command: list[str], *rest: object, **options: object) -> subprocess.Popen[bytes]:
        started.append(popen(command, *rest, **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(neighbours.subprocess, "Popen", start)
    monkeypatch.setattr(
        sys, "argv", ["neighbours.py", "--server", f"fake={FAKE}", "--places", "quiet,loops", "--users", "1,2",
                      "--rounds", "1", "--max-tokens", "4", "--model", "ok"]
    )  # fmt: skip
    monkeypatch.setattr(neighbours, "Prompts", lambda _: lambda _index: "ok")
    assert neighbours.main() in (0, 1)
    assert "loops" in capsys.readouterr().out
    loops = [each for each in started if each.args == neighbours.LOOP]
    assert len(loops) == 2 * neighbours.CORES
    assert all(each.poll() is not None for each in started)


def test_a_place_that_is_unknown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["neighbours.py", "--places", "quiet,moon"])
    with pytest.raises(SystemExit):
        neighbours.main()
