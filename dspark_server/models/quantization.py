"""The `quantization_config` of a config.json: formats of weights that are read, and refusal of the others by name.

Weights are expanded as they are read. Inputs of products keep the model's type where a format would round them to 8
bits, too (W8A8): nothing is lost by that.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark_server.errors import CheckpointError
from dspark_server.models.block_scaled import FP8_BLOCK
from dspark_server.models.fields import Fields, read_json, refuse

READ = (
    "fp8 with scales of blocks of 128 x 128 (quant_method fp8); gptq and awq; compressed-tensors' int-quantized, "
    "float-quantized and naive-quantized in 8 bits, symmetric, with scales of tensors, channels or blocks of 128 x "
    "128, and pack-quantized in 4 or 8 bits, symmetric, with scales of channels or groups"
)
_PLAIN_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
_PACKED = "pack-quantized"


def check_quantization(fields: Fields) -> None:
    """Raise CheckpointError if the weights are in a format that `WeightReader` does not read."""
    stored = fields.get("quantization_config")
    if stored is None:
        return
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"config.json: quantization_config should be an object, not {stored!r}")
    method = stored.get("quant_method")
    if method == "fp8":
        refuse(stored, "fmt", ("e4m3",))
        refuse(stored, "weight_block_size", ([FP8_BLOCK, FP8_BLOCK],))
        refuse(stored, "activation_scheme", ("dynamic",))
    elif method == "gptq":
        refuse(stored, "bits", (4, 8))
        refuse(stored, "checkpoint_format", ("gptq", "gptq_v2"))
    elif method == "awq":
        refuse(stored, "bits", (4,))
        refuse(stored, "version", ("gemm", "GEMM"))
        refuse(stored, "zero_point", (True,))
    elif method == "compressed-tensors":
        _check_compressed(stored)
    else:
        raise CheckpointError(
            f"config.json: quantization_config has quant_method {method!r}, which is not read; take the unquantized "
            f"model, or one of: {READ}"
        )


def _check_compressed(stored: Mapping[str, Any]) -> None:
    groups = stored.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise CheckpointError(f"config.json: quantization_config's config_groups should be objects, not {groups!r}")
    if stored.get("sparsity_config"):
        raise CheckpointError("config.json: quantization_config has a sparsity_config: sparse weights are not read")
    if stored.get("kv_cache_scheme"):
        raise CheckpointError("config.json: quantization_config has a kv_cache_scheme, whose scales are not read")
    for name, group in groups.items():
        where = f"config.json: quantization_config's {name}"
        format_name = group.get("format") or stored.get("format")
        if format_name not in (*_PLAIN_FORMATS, _PACKED):
            raise CheckpointError(f"{where} has format {format_name!r}; those that are read: {READ}")
        weights, inputs = group.get("weights"), group.get("input_activations")
        if not isinstance(weights, Mapping):
            raise CheckpointError(f"{where} should say how weights are stored, not {weights!r}")
        bits, symmetric, strategy = (weights.get(each) for each in ("num_bits", "symmetric", "strategy"))
        packed = format_name == _PACKED
        widths, strategies = ([4, 8], ["channel", "group"]) if packed else ([8], ["tensor", "channel", "block"])
        if bits not in widths or symmetric is False or strategy not in strategies:
            raise CheckpointError(
                f"{where} has weights of num_bits {bits}, symmetric {symmetric}, strategy {strategy!r}; those that are "
                f"read: {READ}"
            )
        if strategy == "block" and weights.get("block_structure") != [FP8_BLOCK, FP8_BLOCK]:
            raise CheckpointError(
                f"{where} has blocks of {weights.get('block_structure')}; those of {FP8_BLOCK} x {FP8_BLOCK} are read"
            )
        if isinstance(inputs, Mapping) and inputs.get("dynamic") is False:
            raise CheckpointError(f"{where} has static scales of inputs, which are not read; take dynamic ones")


def packed_version(directory: Path) -> str:
    """Return the version of a checkpoint's packed weights: "gptq", "gptq_v2", "awq", or another's method."""
    fields = read_json(directory / "config.json")
    text = fields.get("text_config")
    stored = fields.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config")) or {}
    method = str(stored.get("quant_method"))
    return str(stored.get("checkpoint_format", method)) if method == "gptq" else method
