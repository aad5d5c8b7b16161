"""The config.json of each served pair, as far as the server reads it.

Qwen3: the models' published configurations. Drafters: what DeepSpec writes (the target's decoder fields, five layers,
and config/dspark/dspark_qwen3_*.py for the rest). Written down, not downloaded: configs/serve/README.md.
"""

from typing import Any

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
