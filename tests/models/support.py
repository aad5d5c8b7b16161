"""Tiny random checkpoints of every architecture, and a paged runner that feeds sequences in any chunks."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dspark_server.models.decoder import Decoder
from dspark_server.runtime.batch import Batch, Run
from dspark_server.runtime.kv import KVPool
from dspark_server.runtime.paging import CacheLayout, tables_for

ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", **_LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}

VOCABULARY = 199
BLOCK_SIZE = 16


def tiny_model(family: str, rope: str = "default", **options: Any) -> PreTrainedModel:
    """A random float32 model in which every tensor matters: biases are not zero, norms are not one."""
    config_class, model_class = ARCHITECTURES[family]
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "rope_parameters": {"rope_theta": 10_000.0, **ROPES[rope]},
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(len(family) + 7 * len(rope))
    model = model_class(config_class(**{**fields, **options})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", ".bias")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.set_attn_implementation("eager")
    return model  # type: ignore[no-any-return]


def save_tiny(directory: Path, family: str = "llama", **options: Any) -> PreTrainedModel:
    model = tiny_model(family, **options)
    model.save_pretrained(directory)
    return model


@torch.inference_mode()
def expected(model: PreTrainedModel, tokens: list[int]) -> tuple[Tensor, list[Tensor]]:
    """transformers' logits [T, V], and the embeddings and each layer's raw output [T, D]."""
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0]))
        for layer in model.model.layers
    ]
    ids = torch.tensor([tokens])
    logits = model(ids).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, [model.model.embed_tokens(ids)[0], *outputs]


class PagedRunner:
    """Feeds several sequences to a decoder over block tables that are scattered over the pool.

    Blocks behind a window are given up before each step, and hold other numbers from then on.
    """

    def __init__(self, decoder: Decoder, sequences: list[list[int]], reserve: int, dtype: torch.dtype) -> None:
        self.decoder = decoder
        self.sequences = sequences
        self.done = [0] * len(sequences)
        layout = CacheLayout.of([decoder.caches], BLOCK_SIZE, dtype.itemsize)
        self.groups = layout.groups
        lengths = [len(tokens) + reserve for tokens in sequences]
        count = sum(group.blocks_between(0, length) for group in self.groups for length in lengths)
        order = iter(torch.randperm(count, generator=torch.Generator().manual_seed(5)).tolist())
        self.tables = [tables_for(self.groups, order, 0, length) for length in lengths]
        self.layers = KVPool(count, layout, dtype).layers(0)
        for block in range(count):  # what a slot held before must not matter
            self._spoil(block)

    def _spoil(self, block: int) -> None:
        for keys, values, _ in self.layers:
            keys[block], values[block] = 1e3, -1e3

    def _give_up(self, index: int) -> None:
        for group, table in zip(self.groups, self.tables[index], strict=True):
            first = group.first_needed(self.done[index])
            gone = (first - table.first) // group.block_size
            for block in table.blocks[:gone]:
                self._spoil(block)
            table.first, table.blocks = first, table.blocks[gone:]

    @torch.inference_mode()
    def step(self, counts: list[int], all_logits: bool = True, taps: tuple[int, ...] = ()) -> tuple[Tensor, list[Any]]:
        """Run the next `counts[i]` tokens of each sequence (0: it sits out) -> logits [M, V], taps."""
        runs = []
        for i, count in enumerate(counts):
            if count:
                self._give_up(i)
                tokens = self.sequences[i][self.done[i] : self.done[i] + count]
                runs.append(Run(tokens, self.done[i], self.tables[i], count if all_logits else 1))
                self.done[i] += count
        hidden, tapped = self.decoder.forward(Batch.of(runs, self.groups), self.layers, taps)
        return self.decoder.logits(hidden), tapped
