"""`dspark-server serve` itself, failpoints armed by the environment: what it exits with when the engine is dead."""

from pathlib import Path

import pytest

from .support import EXIT_DEAD, Command


@pytest.mark.parametrize("fault", ["engine.thread=die@3", "step.verify=hang@3", "step.verify=raise:RuntimeError"])
def test_a_dead_engine_ends_the_process(fault: str, tmp_path: Path) -> None:
    options = ("--log-format", "json", "--step-timeout", "1")
    with Command(tmp_path, *options, DSPARK_FAILPOINTS=fault) as command:
        for _ in range(3):
            answer = command.http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 50, "ignore_eos": True})
            assert answer.status_code in (500, 503)
        assert command.http.get("/live").status_code == 200
        assert command.process.wait(10) == EXIT_DEAD
        written = command.log.read_text()
    assert "failpoints are armed" in written
    assert '"level":"critical"' in written
