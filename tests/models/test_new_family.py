"""A dense family that the server does not know: one file (here: `toy`, below) and one entry in the registry serve it.

Attention and feed-forward stand side by side behind one norm (as in GPT-J), every other layer has a window of its own
size and head size, and the feed-forward is another. The reference recomputes everything for every token.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.models import registry
from dspark_server.models.config import LayerConfig, ModelConfig
from dspark_server.models.family import Family
from dspark_server.models.fields import Fields, integer
from dspark_server.models.layers.attention import Attention, AttentionConfig
from dspark_server.models.layers.mlp import Mlp, MlpConfig
from dspark_server.models.layers.parts import Parts
from dspark_server.models.layers.rope import RopeConfig
from dspark_server.models.llama import special_tokens
from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import LayerCache
from dspark_server.runtime.linear import Linear

from ..engine.support import FIXTURES, greedy, prompts, seeded

HEADS, KV_HEADS, SIZES, WINDOW, FEATURES, EPS, LAYERS = 4, 2, (16, 24), 7, 80, 1e-6, 6

# -- the file of the family ------------------------------------------------------------------------------------------


class ParallelLayer:
    def __init__(self, parts: Parts, config: LayerConfig, prefix: str) -> None:
        self._norm, self._eps, self._kernels = parts.norm(f"{prefix}ln"), parts.eps, parts.kernels
        self.attention = Attention.load(parts, config.attention, f"{prefix}attn.")
        self.mlp = Mlp(parts, config.mlp, f"{prefix}ffn.")

    @property
    def products(self) -> list[Linear]:
        return [self.attention.qkv, self.attention.output, *self.mlp.products]

    def forward(
        self, delta: Tensor | None, residual: Tensor, batch: Batch, caches: Sequence[LayerCache], causal: bool = True
    ) -> Tensor:
        (cache,) = caches
        if delta is None:
            x = self._kernels.rms_norm(residual, self._norm, self._eps)
        else:
            x = self._kernels.add_rms_norm(delta, residual, self._norm, self._eps)
        return self.attention.forward(x, batch, cache, causal) + self.mlp.forward(x)


def parse(fields: Fields, generation: Fields) -> ModelConfig:
    longest = integer(fields, "max_position_embeddings")

    def layer(index: int) -> LayerConfig:
        size, window = (SIZES[1], WINDOW) if index % 2 else (SIZES[0], None)
        rope = RopeConfig("default", 1e4, longest)
        attention = AttentionConfig(HEADS, KV_HEADS, size, rope, window, qk_norm=True)
        return LayerConfig(attention, MlpConfig(FEATURES, activation="gelu_tanh"))

    return ModelConfig(
        vocab_size=integer(fields, "vocab_size"),
        hidden_size=integer(fields, "hidden_size"),
        layers=tuple(layer(index) for index in range(integer(fields, "num_hidden_layers"))),
        rms_norm_eps=EPS,
        max_length=longest,
        tie_word_embeddings=True,
        **special_tokens(fields, generation),
    )


# -- its checkpoint and its reference --------------------------------------------------------------------------------


def checkpoint(directory: Path, vocabulary: int = 512, hidden: int = 64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(vocabulary, hidden) * 0.5,
        "model.norm.weight": torch.rand(hidden),
    }
    for index in range(LAYERS):
        size = SIZES[index % 2]
        shapes = {
            "ln": (hidden,),
            "attn.q_proj": (HEADS * size, hidden),
            "attn.k_proj": (KV_HEADS * size, hidden),
            "attn.v_proj": (KV_HEADS * size, hidden),
            "attn.o_proj": (hidden, HEADS * size),
            "attn.q_norm": (size,),
            "attn.k_norm": (size,),
            "ffn.gate_proj": (FEATURES, hidden),
            "ffn.up_proj": (FEATURES, hidden),
            "ffn.down_proj": (hidden, FEATURES),
        }
        for name, shape in shapes.items():
            noise = torch.randn(shape) * 0.15 if len(shape) == 2 else 1 + 0.3 * torch.randn(shape)
            tensors[f"model.layers.{index}.{name}.weight"] = noise
    fields = {"architectures": ["ToyForCausalLM"], "vocab_size": vocabulary, "hidden_size": hidden}
    fields |= {"num_hidden_layers": LAYERS, "max_position_embeddings": 256, "eos_token_id": 2, "dtype": "float32"}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    save_file(tensors, directory / "model.safetensors")
    return tensors


def reference(tensors: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """Logits [T, V] float64 of every position."""
    weight = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight[name]

    length = len(tokens)
    x, place = weight["model.embed_tokens.weight"][tokens], torch.arange(length)
    for index in range(LAYERS):
        prefix, size = f"model.layers.{index}.", SIZES[index % 2]
        angles = torch.outer(place.double(), 1e4 ** -(torch.arange(0, size, 2).double() / size))

        def heads(a: Tensor, kind: str, prefix: str = prefix, size: int = size, angles: Tensor = angles) -> Tensor:
            rows = (a @ weight[f"{prefix}attn.{kind}_proj.weight"].T).unflatten(1, (-1, size))
            if kind == "v":
                return rows
            rows = norm(rows, f"{prefix}attn.{kind}_norm.weight")
            low, high = rows.chunk(2, -1)
            cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
            return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

        a = norm(x, f"{prefix}ln.weight")
        q = heads(a, "q")
        k, v = (heads(a, kind).repeat_interleave(HEADS // KV_HEADS, 1) for kind in "kv")
        hidden = place > place.unsqueeze(1)
        if index % 2:
            hidden |= place <= place.unsqueeze(1) - WINDOW
        scores = (torch.einsum("qhd,khd->hqk", q, k) * size**-0.5).masked_fill(hidden, -torch.inf)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        gate, up = (a @ weight[f"{prefix}ffn.{name}_proj.weight"].T for name in ("gate", "up"))
        inner = F.gelu(gate, approximate="tanh") * up
        x = x + attended @ weight[f"{prefix}attn.o_proj.weight"].T + inner @ weight[f"{prefix}ffn.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ weight["model.embed_tokens.weight"].T


def greedily(tensors: dict[str, Tensor], prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        logits = reference(tensors, tokens)[-1]
        best = logits.topk(2).values
        assert best[0] - best[1] > 1e-4, "too close to call"
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("drafter", [False, True])
def test_a_family_is_a_file_and_an_entry(drafter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in a batch, with a prefix hit, with a drafter: always the tokens of the reference."""
    monkeypatch.setitem(registry.FAMILIES, "ToyForCausalLM", Family(parse, ParallelLayer))
    tensors = checkpoint(tmp_path / "toy")
    draft = FIXTURES / "dspark_qwen3_vanilla" / "draft"
    speculative = SpeculativeConfig("dspark", str(draft), selection="fixed") if drafter else SpeculativeConfig("none")
    settings = {
        "num_blocks": 256,
        "block_size": 4,
        "check_invariants": True,
        "max_num_batched_tokens": 24,
        "max_num_seqs": 8,
    }
    core = EngineCore.load(
        EngineConfig(model=str(tmp_path / "toy"), dtype="float32", speculative=speculative, **settings)
    )
    asked = [[token % 500 for token in prompt] for prompt in prompts(5, shortest=9, longest=40)]
    expected = [greedily(tensors, prompt, 12) for prompt in asked]
    assert core.generate(asked, greedy(12)) == expected
    assert core.generate(asked[:1], greedy(12)) == expected[:1]
    assert core.loop.stats.prefix_hits > 0
    if drafter:
        assert core.loop.stats.draft_tokens > 0
        assert core.generate(asked[:2], [seeded(3, 8), seeded(4, 8)]) == core.generate(
            asked[:2], [seeded(3, 8), seeded(4, 8)]
        )
