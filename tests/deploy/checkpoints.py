"""The config.json of each served pair, as far as the server reads it.

Qwen3: the models' published configurations. Drafters: what DeepSpec writes (the target's decoder fields, five layers,
and config/dspark/dspark_qwen3_*.py for the rest). Written down, not downloaded: configs/serve/README.md.

DeepSeek-V4: config.json, names, shapes and dtypes of the tensors, as our design notes have them of the releases with
DSpark; the headers are made from them.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from dspark_server.models.block_scaled import scale_shape, stored_shape
from dspark_server.models.loading import Checkpoint, TensorInfo

Fields = dict[str, Any]


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool) -> Fields:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": 40960,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


TARGETS: dict[str, Fields] = {
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40, tied=False),
}


def _drafter(target: Fields, taps: list[int]) -> Fields:
    return target | {
        "architectures": ["Qwen3DSparkModel"],
        "block_size": 7,
        "confidence_head_with_markov": True,
        "enable_confidence_head": True,
        "markov_head_type": "vanilla",
        "markov_rank": 256,
        "mask_token_id": 151669,
        "num_anchors": 512,
        "num_hidden_layers": 5,
        "num_target_layers": target["num_hidden_layers"],
        "target_layer_ids": taps,
        "tie_word_embeddings": False,
    }


DRAFTERS: dict[str, Fields] = {
    "deepseek-ai/dspark_qwen3_4b_block7": _drafter(TARGETS["Qwen/Qwen3-4B"], [1, 9, 17, 25, 33]),
    "deepseek-ai/dspark_qwen3_8b_block7": _drafter(TARGETS["Qwen/Qwen3-8B"], [1, 9, 17, 25, 33]),
    "deepseek-ai/dspark_qwen3_14b_block7": _drafter(TARGETS["Qwen/Qwen3-14B"], [1, 10, 19, 28, 37]),
}


def _deepseek(layers: int, ratios: list[int], taps: list[int], **own: Any) -> Fields:
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "vocab_size": 129280,
        "num_hidden_layers": layers,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "o_lora_rank": 1024,
        "compress_ratios": [*ratios, *([4, 128] * layers)[: layers - 2], 0, 0, 0],
        "sliding_window": 128,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 65536,
        },
        "num_experts_per_tok": 6,
        "n_shared_experts": 1,
        "num_hash_layers": 3,
        "scoring_func": "sqrtsoftplus",
        "swiglu_limit": 10.0,
        "rms_norm_eps": 1e-6,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "dspark_block_size": 5,
        "dspark_noise_token_id": 128799,
        "dspark_target_layer_ids": taps,
        "max_position_embeddings": 1048576,
        "tie_word_embeddings": False,
        "expert_dtype": "fp4",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        **own,
    }


DEEPSEEK: dict[str, Fields] = {
    "deepseek-ai/DeepSeek-V4-Flash-0731": _deepseek(
        43,
        [0, 0],
        [40, 41, 42],
        hidden_size=4096,
        num_attention_heads=64,
        q_lora_rank=1024,
        o_groups=8,
        index_topk=512,
        n_routed_experts=256,
        moe_intermediate_size=2048,
        routed_scaling_factor=1.5,
        dspark_markov_rank=256,
    ),
    "deepseek-ai/DeepSeek-V4-Pro-0813": _deepseek(
        61,
        [128, 128],
        [58, 59, 60],
        hidden_size=7168,
        num_attention_heads=128,
        q_lora_rank=1536,
        o_groups=16,
        index_topk=1024,
        n_routed_experts=384,
        moe_intermediate_size=3072,
        routed_scaling_factor=2.5,
        dspark_markov_rank=512,
    ),
}


@cache
def headers(model: str) -> Checkpoint:
    """The headers of a DeepSeek-V4 release, without files."""
    found: dict[str, TensorInfo] = {}
    for name, dtype, *shape in _deepseek_tensors(DEEPSEEK[model]):
        if dtype in ("F8_E4M3", "I8"):
            scale = scale_shape(dtype, (shape[0], shape[1]))
            found[name.removesuffix("weight") + "scale"] = TensorInfo(Path(), "F8_E8M0", scale)
        found[name] = TensorInfo(Path(), dtype, stored_shape(dtype, tuple(shape)))
    return Checkpoint(Path(), {}, found)


def _deepseek_tensors(fields: Fields) -> Iterator[tuple[Any, ...]]:
    """Name, dtype and shape (as it is once expanded) of every tensor but scales."""
    width, vocabulary, streams = fields["hidden_size"], fields["vocab_size"], fields["hc_mult"]
    layers, ratios = fields["num_hidden_layers"], fields["compress_ratios"]
    rank, last = fields["dspark_markov_rank"], f"mtp.{len(ratios) - layers - 1}."
    yield "embed.weight", "BF16", vocabulary, width
    yield "head.weight", "BF16", vocabulary, width
    yield "mtp.0.main_proj.weight", "F8_E4M3", width, len(fields["dspark_target_layer_ids"]) * width
    yield "mtp.0.main_norm.weight", "BF16", width
    yield f"{last}markov_head.markov_w1.weight", "BF16", vocabulary, rank
    yield f"{last}markov_head.markov_w2.weight", "BF16", vocabulary, rank
    yield f"{last}confidence_head.proj.weight", "BF16", 1, width + rank
    for prefix in ("", last):
        yield f"{prefix}norm.weight", "BF16", width
        yield f"{prefix}hc_head_fn", "F32", streams, streams * width
        yield f"{prefix}hc_head_base", "F32", streams
        yield f"{prefix}hc_head_scale", "F32", 1
    for number, ratio in enumerate(ratios):
        prefix = f"layers.{number}." if number < layers else f"mtp.{number - layers}."
        yield from _deepseek_layer(fields, prefix, ratio, hashed=number < fields["num_hash_layers"])


def _deepseek_layer(fields: Fields, prefix: str, ratio: int, *, hashed: bool) -> Iterator[tuple[Any, ...]]:
    width, heads, size, streams = (fields[n] for n in ("hidden_size", "num_attention_heads", "head_dim", "hc_mult"))
    queries, groups, outputs = (fields[name] for name in ("q_lora_rank", "o_groups", "o_lora_rank"))
    index_heads, index_size = fields["index_n_heads"], fields["index_head_dim"]
    experts, features = fields["n_routed_experts"], fields["moe_intermediate_size"]
    attn, ffn = f"{prefix}attn.", f"{prefix}ffn."
    yield f"{attn}wq_a.weight", "F8_E4M3", queries, width
    yield f"{attn}q_norm.weight", "BF16", queries
    yield f"{attn}wq_b.weight", "F8_E4M3", heads * size, queries
    yield f"{attn}wkv.weight", "F8_E4M3", size, width
    yield f"{attn}kv_norm.weight", "BF16", size
    yield f"{attn}wo_a.weight", "F8_E4M3", groups * outputs, heads * size // groups
    yield f"{attn}wo_b.weight", "F8_E4M3", width, groups * outputs
    yield f"{attn}attn_sink", "F32", heads
    compressors = [(f"{attn}compressor.", size)] if ratio else []
    if ratio == 4:
        compressors.append((f"{attn}indexer.compressor.", index_size))
        yield f"{attn}indexer.wq_b.weight", "F8_E4M3", index_heads * index_size, queries
        yield f"{attn}indexer.weights_proj.weight", "BF16", index_heads, width
    for name, own in compressors:
        columns = own * (2 if ratio == 4 else 1)
        yield f"{name}wkv.weight", "BF16", columns, width
        yield f"{name}wgate.weight", "BF16", columns, width
        yield f"{name}ape", "F32", ratio, columns
        yield f"{name}norm.weight", "BF16", own
    yield f"{ffn}gate.weight", "BF16", experts, width
    if hashed:
        yield f"{ffn}gate.tid2eid", "I64", fields["vocab_size"], fields["num_experts_per_tok"]
    else:
        yield f"{ffn}gate.bias", "F32", experts
    for name in (f"{ffn}shared_experts", *(f"{ffn}experts.{expert}" for expert in range(experts))):
        dtype = "F8_E4M3" if name.endswith("shared_experts") else "I8"
        yield f"{name}.w1.weight", dtype, features, width
        yield f"{name}.w3.weight", dtype, features, width
        yield f"{name}.w2.weight", dtype, width, features
    for half in ("attn", "ffn"):
        yield f"{prefix}{half}_norm.weight", "BF16", width
        yield f"{prefix}hc_{half}_fn", "F32", (2 + streams) * streams, streams * width
        yield f"{prefix}hc_{half}_base", "F32", (2 + streams) * streams
        yield f"{prefix}hc_{half}_scale", "F32", 3
