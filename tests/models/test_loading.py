"""Every way a checkpoint can be wrong is a CheckpointError that names the tensor or the file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dspark_kernels import load
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.models.decoder import Decoder
from dspark_server.models.loading import WeightReader, open_checkpoint

from .support import save_tiny

NORM = "model.layers.1.input_layernorm.weight"


def load_decoder(directory: Path) -> Decoder:
    return Decoder.load(directory, torch.float32, load("reference"))


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite model.safetensors with its tensors changed."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def shard(directory: Path) -> dict[str, str]:
    """Split model.safetensors in two with an index; returns its weight_map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for i in range(2):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::2]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_tensor(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop(NORM))
    with pytest.raises(CheckpointError, match=f"{NORM} is missing"):
        load_decoder(tmp_path)


def test_an_unexpected_tensor(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.extra": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: unexpected tensor model\.extra"):
        load_decoder(tmp_path)


def head_of(decoder: Decoder) -> Tensor:
    """The head's weight, transposed: what it makes of unit rows."""
    return decoder.head(torch.eye(decoder.config.hidden_size))


def test_a_copy_of_the_embedding_beside_a_tied_head_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny(tmp_path, tie_word_embeddings=True)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    decoder = load_decoder(tmp_path)
    assert decoder.config.tie_word_embeddings
    assert torch.equal(head_of(decoder), decoder.embed.weight.T)
    assert caplog.messages == []


def test_another_head_in_the_file_is_the_head_whatever_the_config_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny(tmp_path, tie_word_embeddings=True)
    head = torch.randn(199, 64)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    decoder = load_decoder(tmp_path)
    assert not decoder.config.tie_word_embeddings
    assert torch.equal(head_of(decoder), head.T)
    assert "lm_head.weight differs from the embedding" in caplog.text
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(2, 2)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[2, 2\]"):
        load_decoder(tmp_path)


def test_rotary_frequencies_in_the_file_are_those_of_the_config(tmp_path: Path) -> None:
    save_tiny(tmp_path, rope="linear")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    plain = 10_000.0 ** -(torch.arange(0, 32, 2) / 32)
    for stored in (plain, plain.bfloat16(), plain / 3.0):
        edit(tmp_path, lambda tensors, stored=stored: tensors.update({name: stored}))  # type: ignore[misc]
        load_decoder(tmp_path)
    for stored in (plain / 2.0, plain[:4], 500_000.0 ** -(torch.arange(0, 32, 2) / 32)):
        edit(tmp_path, lambda tensors, stored=stored: tensors.update({name: stored}))  # type: ignore[misc]
        with pytest.raises(CheckpointError, match="inv_freq holds other rotary frequencies"):
            load_decoder(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.up_proj.bias", "model.layers.0.attn.masked_bias"],
)
def test_what_the_model_would_not_read_is_refused_by_name(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({name: torch.ones(32)}))
    with pytest.raises(CheckpointError, match=f"unexpected tensor {name}"):
        load_decoder(tmp_path)


def test_a_tensor_of_the_wrong_shape(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({NORM: torch.ones(63)}))
    with pytest.raises(CheckpointError, match=rf"{NORM} has shape \[63\], but config.json asks for \[64\]"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite(value: float, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    edit(tmp_path, lambda tensors: tensors[NORM].__setitem__(17, value))
    with pytest.raises(CheckpointError, match=f"{NORM} holds NaN or infinity"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_an_unsupported_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({NORM: torch.ones(64).to(dtype)}))
    with pytest.raises(CheckpointError, match=f"{NORM} has dtype"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file(kept: int, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("header", [b"\xff" * 64, (8).to_bytes(8, "little") + b"not json", b"PK\x03\x04" + b"\0" * 60])
def test_a_garbage_header(header: bytes, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(header)
    with pytest.raises(CheckpointError, match="download it again"):
        load_decoder(tmp_path)


def test_shards_load_like_one_file(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    whole = load_decoder(tmp_path)
    shard(tmp_path)
    tokens = torch.arange(9)
    assert torch.equal(load_decoder(tmp_path).embed(tokens), whole.embed(tokens))


def test_an_absent_shard(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    shard(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors .*absent"):
        load_decoder(tmp_path)


def test_an_index_that_disagrees_with_its_shards(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    weight_map = shard(tmp_path)
    write_index(tmp_path, {**weight_map, "model.ghost": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor model\.ghost is not in"):
        load_decoder(tmp_path)


def test_a_tensor_in_a_shard_but_not_in_the_index_is_unexpected(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    shard(tmp_path)
    file = tmp_path / "model-00001-of-00002.safetensors"
    save_file({**load_file(file), "model.ghost": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.ghost"):
        load_decoder(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    shard(tmp_path)
    first, second = (load_file(tmp_path / f"model-0000{i}-of-00002.safetensors") for i in (1, 2))
    name = next(iter(first))
    save_file({**second, name: first[name]}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="both in"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, {"x": 3}, {"x": "../model.safetensors"}])
def test_an_index_that_makes_no_sense(weight_map: object, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    shard(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load_decoder(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled weights \(pytorch_model\.bin\)"):
        load_decoder(tmp_path)


def test_a_directory_without_weights_and_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        open_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_tensors_come_in_the_dtype_asked_for(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(3, 5).to(stored)
    save_file({"fc.weight": values}, tmp_path / "model.safetensors")
    reader = WeightReader(open_checkpoint(tmp_path), wanted)
    assert "fc.weight" in reader
    assert torch.equal(reader.take("fc.weight", (3, 5)), values.to(wanted))
    reader.finish()
