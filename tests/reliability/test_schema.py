"""schemathesis over the published OpenAPI schema: data that fits it and data that does not (`make test-reliability`).

It lives in an environment of its own (tests/clients/schemathesis.txt); without it this test is skipped.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from dspark_server.api import ServerSettings

from ..api.support import start

PROGRAM = Path(
    os.environ.get("SCHEMATHESIS", Path(__file__).parents[2] / "build/clients/schemathesis/bin/schemathesis")
)


@pytest.mark.skipif(not PROGRAM.exists(), reason="schemathesis is not installed (make test-reliability)")
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_input_breaks_the_server(mode: str) -> None:
    # What a status means here the schema cannot say (a model's name, lengths that go together), so that a refusal of
    # data that fits it is no failure; accepting what does not fit is.
    checks = "not_a_server_error" + (",negative_data_rejection" if mode == "negative" else "")
    for running in start(ServerSettings(port=0, dashboard=False), step_seconds=0.0005, per_step=50, capacity=1024):
        command = [str(PROGRAM), "run", running.url + "/openapi.json", "--mode", mode, "--checks", checks]
        command += [
            "--max-examples",
            os.environ.get("SCHEMATHESIS_EXAMPLES", "100"),
            "--phases",
            "examples,coverage,fuzzing",
        ]
        command += ["--request-timeout", "20", "--continue-on-failure", "--no-color", "--seed", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        failed = done.returncode
        running.canary()
    assert failed == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ (generated|passed)", done.stdout), done.stdout[-2000:]
