"""Checkpoints of 8 bits in others' formats: logits are those of what the weights stand for; the rest is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dspark_kernels import load
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.models.decoder import Decoder
from dspark_server.models.loading import open_checkpoint, weight_bytes
from dspark_server.models.quantization import check_quantization

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
        (compressed("int", "group", "pack-quantized"), "format 'pack-quantized'"),
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
