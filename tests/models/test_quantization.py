"""Checkpoints of 8 bits in others' formats: logits are those of what the weights stand for; the rest is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dspark_kernels import load
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.errors import CheckpointError
from dspark_server.evaluation.memory import need
from dspark_server.models.decoder import Decoder
from dspark_server.models.loading import WeightReader, open_checkpoint, weight_bytes
from dspark_server.models.quantization import check_quantization
from dspark_server.models.qwen3 import QWEN3

from .support import tiny_model
from .test_decoder import assert_matches

BLOCK = 128
SIZES = {"hidden_size": 160, "intermediate_size": 300, "head_dim": 40}  # the last blocks are not whole


def compressed(kind: str, strategy: str, format_name: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False} | more
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "dynamic": True}}
    return {"quant_method": "compressed-tensors", "format": format_name, "config_groups": {"group_0": group},
            "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed"}  # fmt: skip


FINE: dict[str, Any] = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
}  # fmt: skip
FORMATS: dict[str, dict[str, Any]] = {
    "fp8 blocks": FINE,
    "int8 channels": compressed("int", "channel", "int-quantized"),
    "int8 tensors": compressed("int", "tensor", "int-quantized"),
    "fp8 channels": compressed("float", "channel", "float-quantized"),
    "fp8 tensors": compressed("float", "tensor", "naive-quantized"),
    "compressed fp8 blocks": compressed("float", "block", "float-quantized", block_structure=[BLOCK, BLOCK]),
}


def stored(weight: Tensor, config: dict[str, Any]) -> tuple[Tensor, Tensor, str]:
    """Codes, scales and the name of the scales' tensor."""
    group = config.get("config_groups", {}).get("group_0")
    kind, strategy = (group["weights"]["type"], group["weights"]["strategy"]) if group else ("float", "block")
    most = 127.0 if kind == "int" else 448.0
    if strategy == "block":
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK, 0, -weight.shape[0] % BLOCK))
        tiles = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
        scales = tiles.abs().amax((1, 3)) / most
        each = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: weight.shape[0], : weight.shape[1]]
    else:
        each = scales = (
            weight.abs().amax(1, keepdim=True) if strategy == "channel" else weight.abs().max()[None]
        ) / most
    codes = weight / each
    codes = codes.round().to(torch.int8) if kind == "int" else codes.to(torch.float8_e4m3fn)
    return codes, scales, "weight_scale_inv" if group is None else "weight_scale"


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_weights_that_are_meant(name: str, tmp_path: Path) -> None:
    """Embedding, head and norms stay floats; transformers gets the weights expanded by the test."""
    model, config = tiny_model("qwen3", **SIZES), FORMATS[name]
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    parameters = dict(model.named_parameters())
    for key, weight in list(tensors.items()):
        if "proj.weight" not in key:
            continue
        codes, scales, suffix = stored(weight, config)
        tensors |= {key: codes, key.removesuffix("weight") + suffix: scales}
        by_element = scales
        if (scales.numel() > 1 and scales.shape[1] > 1) or suffix == "weight_scale_inv" or "block" in name:
            by_element = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            by_element = by_element[: weight.shape[0], : weight.shape[1]]
        parameters[key].data = codes.float() * by_element
    save_file(tensors, tmp_path / "model.safetensors")
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
    assert_matches(model, Decoder.load(tmp_path, torch.float32, load("reference"), max_model_len=256), relative=True)
    whole = sum(parameter.numel() for parameter in parameters.values())
    counted = weight_bytes(open_checkpoint(tmp_path), 2, 1, "embed_tokens.weight", ())
    assert counted == 2 * whole


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes', which is not read"),
        (FINE | {"activation_scheme": "static"}, "activation_scheme 'static' is not supported"),
        (FINE | {"weight_block_size": [64, 64]}, "weight_block_size"),
        (compressed("int", "group", "marlin-24", num_bits=4), "format 'marlin-24'"),
        (compressed("int", "group", "pack-quantized", num_bits=4, symmetric=False), "symmetric False"),
        ({"quant_method": "gptq", "bits": 3}, "bits 3 is not supported"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        (compressed("int", "channel", "int-quantized", symmetric=False), "symmetric False"),
        (compressed("int", "channel", "int-quantized", num_bits=4), "num_bits 4"),
        (compressed("float", "block", "float-quantized", block_structure=[64, 64]), r"blocks of \[64, 64\]"),
        (FORMATS["int8 channels"] | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        (FORMATS["int8 channels"] | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (FORMATS["int8 channels"] | {"config_groups": 3}, "config_groups should be objects"),
        ([1], "should be an object"),
    ],
)
def test_what_is_not_read_is_refused(config: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_quantization({"quantization_config": config})


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    tiny_model("qwen3", **SIZES).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    codes, _, _ = stored(tensors[key], FINE)
    tensors |= {key: codes, "model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.weight: its scales have shape \[2, 2\]"):
        Decoder.load(tmp_path, torch.float32, load("reference"), max_model_len=64)


PACKED: dict[str, dict[str, Any]] = {
    "pack-quantized": compressed("int", "group", "pack-quantized", num_bits=4, group_size=32),
    "pack-quantized 8 bits": compressed("int", "channel", "pack-quantized"),
    "pack-quantized act-order": compressed("int", "group", "pack-quantized", num_bits=4, group_size=32),
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "gptq act-order": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False},
    "gptq v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
    "gptq 8 bits": {"quant_method": "gptq", "bits": 8, "group_size": -1},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
}
GROUPED = {"hidden_size": 160, "intermediate_size": 320, "head_dim": 32, "num_attention_heads": 4}


def word(integers: list[int], bits: int) -> int:
    """One signed 32-bit word, the first integer in its lowest bits."""
    value = sum(each << (bits * place) for place, each in enumerate(integers))
    return value - (1 << 32) if value >= 1 << 31 else value


def packed(rows: list[list[int]], bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 [n, m / p] of integers [n, m], packed along rows; within a word in this `order`."""
    size = 32 // bits
    words = [
        [word([row[at + place] for place in order or range(size)], bits) for at in range(0, len(row), size)]
        for row in rows
    ]
    return torch.tensor(words, dtype=torch.int32)


def pack(weight: Tensor, name: str, noise: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a weight [O, I] by the ends of their names, and the weight that they stand for."""
    height, width = weight.shape
    config = PACKED[name]
    bits = 8 if "8 bits" in name else 4
    group = width if "8 bits" in name else 32
    group_of = torch.arange(width) // group
    if "act-order" in name:
        group_of = group_of[torch.randperm(width, generator=noise)]
    groups, most = width // group, 1 << bits
    zeros = torch.full((height, groups), most // 2)
    if name in ("awq", "gptq act-order", "gptq v2"):
        zeros = torch.randint(1, most, (height, groups), generator=noise)
    scales = (weight.abs().max() / most * 2 * (0.5 + torch.rand(height, groups, generator=noise))).half()
    codes = (weight / scales.float()[:, group_of] + zeros[:, group_of]).round().clamp(0, most - 1).int()
    meant = (codes - zeros[:, group_of]) * scales.float()[:, group_of]
    if config["quant_method"] == "compressed-tensors":
        tensors = {"weight_packed": packed(codes.tolist(), bits), "weight_scale": scales,
                   "weight_shape": torch.tensor([height, width])}  # fmt: skip
        return tensors | ({"weight_g_idx": group_of.int()} if "act-order" in name else {}), meant
    if name == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {"qweight": packed(codes.t().tolist(), 4, order), "qzeros": packed(zeros.t().tolist(), 4, order),
                "scales": scales.t()}, meant  # fmt: skip
    stored_zeros = zeros if name == "gptq v2" else zeros - 1
    return {"qweight": packed(codes.tolist(), bits).t(), "qzeros": packed(stored_zeros.t().tolist(), bits),
            "scales": scales.t(), "g_idx": group_of.int()}, meant  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
def test_packed_weights_are_those_that_are_meant(name: str, tmp_path: Path) -> None:
    """Also the part of a rank, whose rows and columns no word divides."""
    model, noise = tiny_model("qwen3", **GROUPED), torch.Generator().manual_seed(2)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    parameters = dict(model.named_parameters())
    for key in [key for key in tensors if "proj.weight" in key]:
        own, meant = pack(tensors.pop(key), name, noise)
        tensors |= {key.removesuffix("weight") + end: tensor.contiguous() for end, tensor in own.items()}
        parameters[key].data = meant
    save_file(tensors, tmp_path / "model.safetensors")
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": PACKED[name]}))
    check_quantization({"quantization_config": PACKED[name]})
    assert_matches(model, Decoder.load(tmp_path, torch.float32, load("reference"), max_model_len=256), relative=True)
    checkpoint, whole = open_checkpoint(tmp_path), 2 * sum(parameter.numel() for parameter in parameters.values())
    assert weight_bytes(checkpoint, 2, 1, "embed_tokens.weight", ()) == whole
    fields = json.loads((tmp_path / "config.json").read_text())
    weights = need(
        checkpoint, fields, QWEN3, EngineConfig(str(tmp_path), speculative=SpeculativeConfig("none"))
    ).weights
    assert weights.served.total() - weights.served["rotary tables"] == whole * 2  # the checkpoint says float32
    assert weights.packed.total() - weights.packed["rotary tables"] == sum(each.nbytes for each in tensors.values())
    key = "model.layers.1.mlp.down_proj.weight"
    reader = WeightReader(open_checkpoint(tmp_path), torch.float32)
    part = reader.take(key, parameters[key].shape, slice(3, 77), slice(5, 130))
    assert torch.equal(part, parameters[key].data[3:77, 5:130])


def words(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


GPTQ = {"qweight": words(8, 8), "qzeros": words(2, 1), "scales": torch.ones(2, 8)}  # of [8, 64]


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("pack-quantized", {"weight_packed": words(8, 3)}, r"words of shape \[8, 3\] .* hold no \[8, 64\] integers"),
        ("pack-quantized", {"weight_packed": torch.zeros(8, 8)}, r"type torch.float32 hold no \[8, 64\] integers"),
        ("pack-quantized", {"weight_packed": words(8, 8)}, "weight_scale is missing"),
        ("pack-quantized", {"weight_packed": words(8, 8), "weight_scale": torch.ones(7, 2)}, "do not belong to 8 rows"),
        ("pack-quantized", {"weight_packed": words(8, 8), "weight_scale": torch.ones(8, 3)}, "make no 3 groups"),
        ("gptq", {"qweight": words(8, 8)}, "scales is missing"),
        ("gptq", GPTQ | {"qzeros": words(2, 2)}, r"qzeros of shape \[2, 2\] have other integers"),
        ("gptq", GPTQ | {"qzeros": words(3, 1)}, r"words of shape \[3, 1\]"),
        ("gptq", GPTQ | {"g_idx": words(63)}, r"g_idx of shape \[63\]"),
        ("gptq", GPTQ | {"g_idx": words(64)}, "g_idx does not name 32 columns of each of 2 groups"),
        ("awq", GPTQ, r"words of shape \[8, 8\] .* hold no \[64, 8\] integers"),
    ],
)
def test_words_of_another_matrix_are_refused(name: str, own: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file({f"x.{end}": tensor for end, tensor in own.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": PACKED[name]}))
    reader = WeightReader(open_checkpoint(tmp_path), torch.float32)
    with pytest.raises(CheckpointError, match=rf"x.weight: .*{message}"):
        reader.take("x.weight", (8, 64))
