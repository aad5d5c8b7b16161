"""DeepSpec's own outputs, replayed through the real engine by the command users have."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dspark_server.cli import app
from dspark_server.conformance import replay

from .support import FIXTURES, HEADS


@pytest.mark.parametrize("head", HEADS)
def test_fixture_is_reproduced(head: str) -> None:
    report = replay(FIXTURES / f"dspark_qwen3_{head}")
    assert report.passed, report
    assert report.rounds == 10
    assert set(report.largest) == {
        "draft_hidden",
        "base_logits",
        "draft_logits",
        "confidence_logits",
        "target_logits",
    }


def test_gemma4_is_reproduced() -> None:
    """Layers of two geometries under one request, a drafter of the full layers' kind, prompts scored whole."""
    report = replay(FIXTURES / "dspark_gemma4")
    assert report.passed, report
    assert report.rounds > 0
    assert "prefill_logits" in report.largest


def test_eagle3_is_reproduced() -> None:
    """A pass for each token over pairs of the target's features and the next token, rejected ones written over."""
    report = replay(FIXTURES / "eagle3_qwen3")
    assert report.passed, report
    assert report.rounds > 0
    assert {"draft_hidden", "draft_logits"} <= set(report.largest)


def test_gemma4s_assistant_is_reproduced() -> None:
    """It reads rows of the target's own layers, one token further back than the target's window."""
    report = replay(FIXTURES / "mtp_gemma4_assistant")
    assert report.passed, report
    assert report.rounds > 0
    assert {"draft_hidden", "draft_logits"} <= set(report.largest)


@pytest.fixture
def altered(tmp_path: Path) -> Path:
    """A fixture whose expectations a test may spoil."""
    return Path(shutil.copytree(FIXTURES / "dspark_qwen3_vanilla", tmp_path / "pair"))


@pytest.mark.parametrize("kind", ["draft_hidden", "confidence_logits", "target_logits", "committed", "draft_tokens"])
def test_a_deviation_fails_the_command(altered: Path, kind: str) -> None:
    path = altered / "expected.safetensors"
    expected = load_file(path)
    name = next(key for key in expected if key.endswith(f"round1.{kind}"))
    expected[name] = expected[name] + (1 if kind in ("committed", "draft_tokens") else 1e-3)
    save_file(expected, path)
    result = CliRunner().invoke(app, ["conformance", str(altered)])
    assert result.exit_code == 1
    assert "FAILED" in result.output


def test_a_nan_is_out_of_bounds(altered: Path) -> None:
    path = altered / "expected.safetensors"
    expected = load_file(path)
    expected["case0.round0.draft_hidden"][0, 0] = torch.nan
    save_file(expected, path)
    assert not replay(altered).passed


@pytest.mark.parametrize("spoil", ["missing", "unexpected", "last-layer-tap", "other-target"])
def test_a_drafter_that_does_not_fit_is_refused(altered: Path, spoil: str) -> None:
    weights = load_file(altered / "draft" / "model.safetensors")
    config = altered / "draft" / "config.json"
    if spoil == "missing":
        del weights["markov_head.markov_w2.weight"]
    elif spoil == "unexpected":
        weights["surprise"] = torch.zeros(1)
    elif spoil == "last-layer-tap":
        text = config.read_text()
        config.write_text(text.replace("    4\n  ]", "    5\n  ]"))
        assert config.read_text() != text
    else:
        config.write_text(config.read_text().replace('"num_target_layers": 6', '"num_target_layers": 7'))
    save_file(weights, altered / "draft" / "model.safetensors")
    result = CliRunner().invoke(app, ["conformance", str(altered)])
    assert result.exit_code == 1
    assert "dspark-server: " in result.output
