"""Sequential temperature scaling: the identity where nothing is stored, a file checked, temperatures interpolated."""

import json
from pathlib import Path

import pytest
import torch

from dspark_server.errors import CheckpointError
from dspark_server.speculation.calibration import Calibration


def test_nothing_stored_is_the_identity(tmp_path: Path) -> None:
    logits = torch.tensor([[0.3, -1.0]])
    survival = Calibration.load(tmp_path, 2).survival(logits, torch.tensor([1.0]))
    torch.testing.assert_close(survival, torch.sigmoid(logits).cumprod(1))


def test_what_is_saved_is_what_divides_the_logits(tmp_path: Path) -> None:
    Calibration((2.0, 1.0), (0.5, 4.0)).save(tmp_path, {"blocks": 7})
    stored = Calibration.load(tmp_path, 2)
    logits = torch.tensor([[1.0, 2.0]]).expand(4, 2)
    got = stored.survival(logits, torch.tensor([0.0, 1.0, 0.5, 3.0]))
    # Half way in temperature is half way in the scale's logarithm; hotter than 1 is treated as 1.
    scale = torch.tensor([[2.0, 1.0], [0.5, 4.0], [1.0, 2.0], [0.5, 4.0]])
    torch.testing.assert_close(got, torch.sigmoid(logits / scale).cumprod(1))


def test_offsets_are_added_to_scaled_logits(tmp_path: Path) -> None:
    Calibration((2.0, 1.0), (0.5, 4.0), greedy_offset=(1.0, 0.0), sampled_offset=(-1.0, 2.0)).save(tmp_path, {})
    logits = torch.tensor([[1.0, 2.0]]).expand(3, 2)
    got = Calibration.load(tmp_path, 2).survival(logits, torch.tensor([0.0, 1.0, 0.5]))
    wanted = torch.tensor([[1.5, 2.0], [1.0, 2.5], [1.0, 2.0]])
    torch.testing.assert_close(got, torch.sigmoid(wanted).cumprod(1))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperatures": {"0": [1.0, 1.0]}},
        {"temperatures": {"0": [1.0], "1": [1.0]}},
        {"temperatures": {"0": [1.0, 0.0], "1": [1.0, 1.0]}},
        {"temperatures": {"0": [1.0, "x"], "1": [1.0, 1.0]}},
        {"temperatures": {"0": [1.0, 1.0], "1": [1.0, 1.0]}, "offsets": {"0": [0.0], "1": [0.0, 0.0]}},
        {"temperatures": {"0": [1.0, 1.0], "1": [1.0, 1.0]}, "offsets": {"0": [0.0, 1e999], "1": [0.0, 0.0]}},
        {"temperatures": {"0": [1.0, 1.0], "1": [1.0, 1.0]}, "offsets": {"0": [0.0, 0.0]}},
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    (tmp_path / "calibration.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"calibration\.json"):
        Calibration.load(tmp_path, 2)
