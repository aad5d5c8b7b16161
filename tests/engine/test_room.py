"""A model that does not fit is refused before anything is loaded, with the figures."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.errors import ConfigError
from dspark_server.models.loading import open_checkpoint, weight_bytes
from dspark_server.runtime import host_memory

from ..models.support import save_tiny
from .support import FIXTURES


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path)
    monkeypatch.setattr("dspark_server.models.loading.Checkpoint.read", None)  # nothing is read
    monkeypatch.setattr(host_memory, "available", lambda: 100 << 10)
    with pytest.raises(
        ConfigError, match=r"the weights need 0\.00 GiB in float32, and 0\.00 GiB are free on this host"
    ):
        EngineCore.load(EngineConfig(str(tmp_path), dtype="float32", speculative=SpeculativeConfig("none")))


def test_the_bytes_of_a_share() -> None:
    """Whole, of one of two ranks, which both have the embedding, and without what is not read."""
    checkpoint = open_checkpoint(FIXTURES / "dspark_deepseek_v4")
    sizes = {
        name: tensor.numel()
        for name, tensor in load_file(FIXTURES / "dspark_deepseek_v4" / "model.safetensors").items()
    }
    own = {name: size for name, size in sizes.items() if not name.startswith("mtp.")}
    embedding = own["embed.weight"]
    assert weight_bytes(checkpoint, 2, 1, "embed.weight", ()) == 2 * sum(sizes.values())
    assert weight_bytes(checkpoint, 2, 1, "embed.weight", ("mtp.",)) == 2 * sum(own.values())
    half = -(-(sum(own.values()) - embedding) // 2)
    assert weight_bytes(checkpoint, 4, 2, "embed.weight", ("mtp.",)) == 4 * (embedding + half)


def test_weights_in_few_bits_are_counted_as_what_they_become(tmp_path: Path) -> None:
    """Two of four bits in a byte; scales become nothing."""
    save_file(load_file(FIXTURES / "dspark_deepseek_v4" / "quantized.safetensors"), tmp_path / "model.safetensors")
    plain = load_file(FIXTURES / "dspark_deepseek_v4" / "dequantized.safetensors")
    assert weight_bytes(open_checkpoint(tmp_path), 2, 1, "none", ()) == 2 * sum(map(torch.Tensor.numel, plain.values()))
