"""Weights in 8 and 4 bits with scales of blocks: what they stand for, exactly, whole and in parts; damage is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.models.loading import EVERY, WeightReader, open_checkpoint

from ..engine.support import FIXTURES

STORED = FIXTURES / "dspark_deepseek_v4" / "quantized.safetensors"
PLAIN = load_file(FIXTURES / "dspark_deepseek_v4" / "dequantized.safetensors")


def reader(directory: Path, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> WeightReader:
    save_file(tensors, directory / "model.safetensors")
    return WeightReader(open_checkpoint(directory), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_what_they_stand_for(dtype: torch.dtype, tmp_path: Path) -> None:
    """In bfloat16, too: nothing is rounded."""
    own = reader(tmp_path, load_file(STORED), dtype)
    for name in ("dense", "expert"):
        (expected,) = (tensor for key, tensor in PLAIN.items() if key.startswith(name))
        taken = own.take(f"{name}.weight", expected.shape)
        assert taken.dtype == dtype
        assert torch.equal(taken.float(), expected.float())
    own.finish()  # the scales are taken with them


@pytest.mark.parametrize("name", ["dense", "expert"])
def test_a_rank_reads_its_part(name: str, tmp_path: Path) -> None:
    """Of rows, and of columns that begin within a block."""
    own = reader(tmp_path, load_file(STORED))
    (expected,) = (tensor.float() for key, tensor in PLAIN.items() if key.startswith(name))
    rows, columns = slice(3, len(expected) // 2), slice(10, 10 + expected.shape[1] // 2)
    for part in ((rows, EVERY), (EVERY, columns), (rows, columns)):
        assert torch.equal(own.take(f"{name}.weight", expected.shape, *part), expected[part])


def test_every_code_of_four_bits(tmp_path: Path) -> None:
    """The low half of a byte is the even column."""
    codes = torch.arange(256).to(torch.uint8).view(4, 64)
    scales = torch.tensor([[127, 127, 127, 127], [128] * 4, [120] * 4, [127] * 4], dtype=torch.uint8)
    stored = {"x.weight": codes.view(torch.int8), "x.scale": scales.view(torch.float8_e8m0fnu)}
    taken = reader(tmp_path, stored).take("x.weight", (4, 128))
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values += [-value for value in values]
    for row, factor in enumerate([1.0, 2.0, 2.0**-7, 1.0]):
        for column in range(128):
            byte = int(codes[row, column // 2])
            assert taken[row, column] == values[byte >> 4 if column % 2 else byte & 15] * factor


def test_damage_is_named(tmp_path: Path) -> None:
    stored = load_file(STORED)
    shape = PLAIN[next(key for key in PLAIN if key.startswith("dense"))].shape
    broken = stored["dense.scale"].view(torch.uint8).clone()
    broken[1, 2] = 255
    with pytest.raises(CheckpointError, match=r"tensor dense.weight: a scale of a quantized weight is NaN"):
        reader(tmp_path, stored | {"dense.scale": broken.view(torch.float8_e8m0fnu)}).take("dense.weight", shape)
    without = {name: tensor for name, tensor in stored.items() if name != "dense.scale"}
    with pytest.raises(CheckpointError, match=r"tensor dense.scale is missing"):
        reader(tmp_path, without).take("dense.weight", shape)
    with pytest.raises(CheckpointError, match=r"dense.scale should hold e8m0 scales"):
        reader(tmp_path, stored | {"dense.scale": torch.ones(2, 3)}).take("dense.weight", shape)
    short = stored["dense.scale"].view(torch.uint8)[:, :2].contiguous().view(torch.float8_e8m0fnu)
    with pytest.raises(CheckpointError, match=r"tensor dense.scale has shape \[2, 2\]"):
        reader(tmp_path, stored | {"dense.scale": short}).take("dense.weight", shape)
