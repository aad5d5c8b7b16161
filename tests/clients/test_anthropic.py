"""The anthropic package: whole, streamed, tokens counted, and an error of its own class."""

import json
from pathlib import Path

from .conftest import Served, installed, run

SCRIPT = Path(__file__).with_name("with_anthropic.py")


def test_messages(served: Served, tmp_path: Path) -> None:
    output = run([installed("anthropic", "python"), str(SCRIPT), served.url, served.model], tmp_path)
    found = json.loads(output.splitlines()[-1])
    whole, final = found["whole"], found["final"]
    assert whole["content"][0]["text"] == found["text"] == final["content"][0]["text"] != ""
    assert whole["stop_reason"] == final["stop_reason"]
    assert final["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    for usage in (whole["usage"], final["usage"]):
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == found["counted"]
    assert found["stopped"]["stop_reason"] == "stop_sequence"
    assert whole["content"][0]["text"].startswith(found["stopped"]["content"][0]["text"])
    assert json.loads(found["formed"])["colour"] in ("red", "blue")
    assert "`messages.0.content.0` is an image" in found["refusal"]
