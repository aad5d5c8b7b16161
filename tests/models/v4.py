"""Tiny DeepSeek-V4 checkpoints in the released names, dtypes and shapes; every tensor matters."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SHAPE: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "torch_dtype": "bfloat16",
    "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
    "num_key_value_heads": 1, "n_shared_experts": 1, "norm_topk_prob": True, "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc", "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-6, "hc_eps": 1e-6,
    "hc_sinkhorn_iters": 20, "rope_theta": 10000, "compress_rope_theta": 160000, "vocab_size": 256, "hidden_size": 64,
    "moe_intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 32, "q_lora_rank": 48,
    "qk_rope_head_dim": 8, "o_groups": 2, "o_lora_rank": 24, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.5, "swiglu_limit": 1.0, "num_hash_layers": 2, "sliding_window": 16, "hc_mult": 4,
    "index_n_heads": 16, "index_head_dim": 16, "index_topk": 8, "max_position_embeddings": 512,
    "rope_scaling": {
        "type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 128,
    },
    "compress_ratios": [0, 4, 128, 4],
}  # fmt: skip


DSPARK: dict[str, Any] = {
    "dspark_block_size": 5, "dspark_noise_token_id": 255, "dspark_target_layer_ids": [1, 2, 3],
    "dspark_markov_rank": 16,
}  # fmt: skip


def save_v4(directory: Path, seed: int = 3, stages: int = 0, **changes: Any) -> dict[str, Any]:
    """Write config.json and model.safetensors of a random target; gives its config.

    `stages` are those of its drafter: DSpark's with `changes` that have DSPARK, else one MTP layer.
    """
    config = SHAPE | changes
    config["compress_ratios"] = [*config["compress_ratios"], *[0] * stages]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(target_tensors(config, seed), directory / "model.safetensors")
    return config


def target_tensors(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Random tensors of a target, and of its drafter's stages."""
    noise = torch.Generator().manual_seed(seed)

    def some(*shape: int, scale: float | None = None, mean: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(shape, generator=noise) * (scale or 1.5 * shape[-1] ** -0.5) + mean).to(dtype)

    def floats(*shape: int, scale: float, mean: float = 0.0) -> Tensor:
        return some(*shape, scale=scale, mean=mean, dtype=torch.float32)

    width, heads, size, vocabulary = (
        config[name] for name in ("hidden_size", "num_attention_heads", "head_dim", "vocab_size")
    )
    rank, groups, inner = config["q_lora_rank"], config["o_groups"], config["o_lora_rank"]
    streams, experts, features = config["hc_mult"], config["n_routed_experts"], config["moe_intermediate_size"]

    def norm(channels: int) -> Tensor:
        return some(channels, scale=0.2, mean=1.0)

    def mix(prefix: str, rows: int, scales: int) -> dict[str, Tensor]:
        return {
            f"{prefix}fn": floats(rows, streams * width, scale=(streams * width) ** -0.5),
            f"{prefix}base": floats(rows, scale=0.5),
            f"{prefix}scale": floats(scales, scale=0.2, mean=1.0),
        }

    def compressor(prefix: str, ratio: int, columns: int, channels: int) -> dict[str, Tensor]:
        return {
            f"{prefix}wkv.weight": some(columns, width),
            f"{prefix}wgate.weight": some(columns, width),
            f"{prefix}ape": floats(ratio, columns, scale=0.5),
            f"{prefix}norm.weight": norm(channels),
        }

    def block(prefix: str, ratio: int, hashed: bool) -> dict[str, Tensor]:
        at, ff = f"{prefix}attn.", f"{prefix}ffn."
        own = {
            **mix(f"{prefix}hc_attn_", (2 + streams) * streams, 3),
            **mix(f"{prefix}hc_ffn_", (2 + streams) * streams, 3),
            f"{prefix}attn_norm.weight": norm(width),
            f"{prefix}ffn_norm.weight": norm(width),
            f"{at}wq_a.weight": some(rank, width),
            f"{at}q_norm.weight": norm(rank),
            f"{at}wq_b.weight": some(heads * size, rank),
            f"{at}wkv.weight": some(size, width),
            f"{at}kv_norm.weight": norm(size),
            f"{at}wo_a.weight": some(groups * inner, heads * size // groups),
            f"{at}wo_b.weight": some(width, groups * inner),
            f"{at}attn_sink": floats(heads, scale=1.0),
            f"{ff}gate.weight": some(experts, width, scale=0.5),
        }
        if ratio:
            own |= compressor(f"{at}compressor.", ratio, size * (2 if ratio == 4 else 1), size)
        if ratio == 4:
            index_heads, index_size = config["index_n_heads"], config["index_head_dim"]
            own[f"{at}indexer.wq_b.weight"] = some(index_heads * index_size, rank)
            own[f"{at}indexer.weights_proj.weight"] = some(index_heads, width)
            own |= compressor(f"{at}indexer.compressor.", 4, 2 * index_size, index_size)
        if hashed:
            order = torch.rand(vocabulary, experts, generator=noise).argsort(1)
            own[f"{ff}gate.tid2eid"] = order[:, : config["num_experts_per_tok"]].contiguous()
        else:
            own[f"{ff}gate.bias"] = floats(experts, scale=0.3)
        for name in (*(f"experts.{each}" for each in range(experts)), "shared_experts"):
            own[f"{ff}{name}.w1.weight"] = some(features, width)
            own[f"{ff}{name}.w3.weight"] = some(features, width)
            own[f"{ff}{name}.w2.weight"] = some(width, features)
        return own

    made = {"embed.weight": some(vocabulary, width, scale=1.0), "head.weight": some(vocabulary, width)}
    made["norm.weight"] = norm(width)
    made |= mix("hc_head_", streams, 1)
    layers, ratios = config["num_hidden_layers"], config["compress_ratios"]
    for index in range(layers):
        made |= block(f"layers.{index}.", ratios[index], index < config["num_hash_layers"])
    stages = len(ratios) - layers
    for index in range(stages):
        made |= block(f"mtp.{index}.", 0, hashed=False)
    last = f"mtp.{stages - 1}."
    if stages:
        made |= mix(f"{last}hc_head_", streams, 1) | {f"{last}norm.weight": norm(width)}
    if "dspark_block_size" in config:
        taps, markov = len(config["dspark_target_layer_ids"]), config["dspark_markov_rank"]
        made |= {
            "mtp.0.main_proj.weight": some(width, taps * width),
            "mtp.0.main_norm.weight": norm(width),
            f"{last}markov_head.markov_w1.weight": some(vocabulary, markov),
            f"{last}markov_head.markov_w2.weight": some(vocabulary, markov),
            f"{last}confidence_head.proj.weight": some(1, width + markov),
        }
    elif stages:
        made |= {f"mtp.0.{name}.weight": some(width, width) for name in ("e_proj", "h_proj")}
        made |= {f"mtp.0.{name}.weight": norm(width) for name in ("enorm", "hnorm")}
    return made
