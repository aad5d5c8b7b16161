"""Conversion of a Llama-architecture GGUF file with a byte-level BPE tokenizer to a Hugging Face model directory.

It covers the embedded default model only; for other GGUF files see llama.cpp and transformers.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm

from dspark_server.errors import CheckpointError

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # gguf's TokenType.CONTROL


def convert_gguf(file: Path, directory: Path, progress: bool = False) -> None:
    """Write bf16 model.safetensors, config.json, generation_config.json and the tokenizer into `directory`.

    Raises CheckpointError if the file is damaged or of an unsupported kind.
    """
    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        if (fields["general.architecture"], fields["tokenizer.ggml.pre"]) != ("llama", "smollm"):
            raise CheckpointError(f"{file}: only SmolLM models are converted; use a safetensors directory instead")
        weights = _weights(reader, fields, progress)
        config = _config(fields, tied="lm_head.weight" not in weights)
        template = str(fields["tokenizer.chat_template"])
        tokenizer = _tokenizer(fields)
    except (KeyError, ValueError, IndexError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); install its package again") from error

    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # save_file makes it private, the other files are not
    _write_json(directory / "config.json", config)
    ids = {f"{name}_token_id": fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    _write_json(directory / "generation_config.json", {**ids, "pad_token_id": ids["eos_token_id"]})
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(fields))
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _weights(reader: Any, fields: dict[str, Any], progress: bool) -> dict[str, Tensor]:
    """Return all tensors, dequantized, under their Hugging Face names."""
    heads = {
        "self_attn.q_proj": fields["llama.attention.head_count"],
        "self_attn.k_proj": fields["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in tqdm(reader.tensors, desc="Converting SmolLM2-135M-Instruct", unit="tensor", disable=not progress):
        name = _hugging_face_name(tensor.name)
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        for projection, count in heads.items():
            if projection in name:
                weight = _pair_halves(weight, count)
        weights[name] = torch.from_numpy(weight).to(torch.bfloat16)
    return weights


def _hugging_face_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, layer, part, kind = name.split(".")  # blk.3.attn_q.weight
    return f"model.layers.{int(layer)}.{_LAYER_NAMES[part]}.{kind}"


def _pair_halves(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorder a projection's rows [heads * d, D] for rotary pairs (i, i + d/2); GGUF's Llama pairs (2i, 2i + 1)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # Stored as float32: the model was trained with the shortest decimal that gives it.
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": fields["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "bfloat16",
    }


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE. Digits are split first, one by one, as SmolLM was trained (transformers' own GGUF reader
    leaves that out, which changes how spaces before a number are tokenized)."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, kind in kinds if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    def token(name: str) -> str:
        return str(fields["tokenizer.ggml.tokens"][fields[f"tokenizer.ggml.{name}_token_id"]])

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
    }


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
