"""DeepSpec's Eagle3 for Gemma4 through the engine against its formulas in float64, over transformers' hidden states.

The weights are random; sizes are those of a full layer of the target: keys that are values, too, with a norm each.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Gemma4UnifiedForCausalLM

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.speculation.families import family_of

from ..models.test_gemma4 import save_gemma
from .support import SMOLLM2_COSTS, greedy, prompts, seeded, still, traced_blocks

HIDDEN, HEADS, SIZE, FEATURES, VOCABULARY, LAYERS, DEPTH, EPS, CAP = 64, 4, 32, 96, 384, 6, 4, 1e-6, 30.0
TAPS = [0, 1, 2, 3, 4]
ROPE = {"full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}  # fmt: skip
TARGET: dict[str, Any] = {
    "vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "rope_parameters": ROPE, "max_position_embeddings": 1024,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "architectures": ["Gemma4Eagle3Model"], "model_type": "gemma4_unified_text", "dtype": "float32",
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": FEATURES, "num_hidden_layers": 1,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "num_global_key_value_heads": 1, "head_dim": 16,
    "global_head_dim": SIZE, "layer_types": ["full_attention"], "sliding_window": 12, "rms_norm_eps": EPS,
    "max_position_embeddings": 1024, "final_logit_softcapping": CAP, "attention_k_eq_v": True,
    "hidden_activation": "gelu_pytorch_tanh", "rope_parameters": ROPE, "tie_word_embeddings": False,
    "num_target_layers": LAYERS, "draft_num_hidden_layers": 1, "target_layer_ids": TAPS, "ttt_length": DEPTH,
    "step_loss_decay": 0.8, "target_model_name_or_path": "target",
}  # fmt: skip


def weights(embedding: Tensor) -> dict[str, Tensor]:
    """`embedding` [V, D] is the target's, and its head."""
    noise = torch.Generator().manual_seed(5)

    def some(*shape: int, scale: float = 0.2, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=noise) * scale + mean

    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
             "post_feedforward_layernorm")  # fmt: skip
    layer = {f"{name}.weight": some(HIDDEN, mean=1.0) for name in norms} | {
        "self_attn.q_proj.weight": some(HEADS * SIZE, 2 * HIDDEN),
        "self_attn.k_proj.weight": some(SIZE, 2 * HIDDEN),
        "self_attn.o_proj.weight": some(HIDDEN, HEADS * SIZE),
        "self_attn.q_norm.weight": some(SIZE, mean=0.4),  # scores are not scaled
        "self_attn.k_norm.weight": some(SIZE, mean=0.4),
        "mlp.gate_proj.weight": some(FEATURES, HIDDEN),
        "mlp.up_proj.weight": some(FEATURES, HIDDEN),
        "mlp.down_proj.weight": some(HIDDEN, FEATURES),
        "layer_scalar": torch.tensor([0.8]),
    }
    return {f"layers.0.{name}": tensor for name, tensor in layer.items()} | {
        "embed_tokens.weight": embedding.clone(),
        "lm_head.weight": embedding.clone(),
        "fc.weight": some(HIDDEN, len(TAPS) * HIDDEN, scale=0.05),
        "norm.weight": some(HIDDEN, mean=1.0),
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pair")
    target = save_gemma(made / "target", **TARGET)
    (made / "draft").mkdir()
    (made / "draft" / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(target.get_input_embeddings().weight.data), made / "draft" / "model.safetensors")
    return made


def load(pair: Path, selection: str = "fixed", drafter: bool = True) -> EngineCore:
    draft = SpeculativeConfig(model=str(pair / "draft"), selection=selection, copying=False)
    speculative = draft if drafter else SpeculativeConfig("none")
    config = EngineConfig(str(pair / "target"), dtype="float32", num_blocks=400, speculative=speculative)
    return EngineCore.load(config, SMOLLM2_COSTS, clock=still)


def rms(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """x [n, heads, d]: a quarter of the channels turn, by frequencies of the whole head."""
    turning = int(0.25 * SIZE) // 2
    frequency = torch.zeros(SIZE // 2, dtype=x.dtype)
    frequency[:turning] = 1e6 ** (-torch.arange(0, 2 * turning, 2).double() / SIZE)
    angles = places[:, None, None] * frequency
    low, high = x.chunk(2, -1)
    return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], -1)


def layer(w: dict[str, Tensor], features: Tensor, embedded: Tensor) -> Tensor:
    """Outputs [n, D] of pairs 0 .. n - 1 of features [n, D] and embeddings [n, D] (MODELS: DeepSpec's Eagle3)."""
    own = {name.removeprefix("layers.0."): tensor for name, tensor in w.items()}
    n, places = len(features), torch.arange(len(features))
    wide = torch.cat([rms(embedded, own["input_layernorm.weight"]), rms(features, own["hidden_norm.weight"])], -1)
    heads = (wide @ own["self_attn.q_proj.weight"].T).view(n, HEADS, SIZE)
    one = (wide @ own["self_attn.k_proj.weight"].T).view(n, 1, SIZE)
    q = rotated(rms(heads, own["self_attn.q_norm.weight"]), places)
    k, v = rotated(rms(one, own["self_attn.k_norm.weight"]), places), rms(one)
    scores = torch.einsum("ihd,jd->hij", q, k[:, 0]) + torch.full((n, n), -torch.inf, dtype=q.dtype).triu(1)
    mixed = torch.einsum("hij,jd->ihd", scores.softmax(-1), v[:, 0]).flatten(1) @ own["self_attn.o_proj.weight"].T
    x = features + rms(mixed, own["post_attention_layernorm.weight"])
    inner = rms(x, own["pre_feedforward_layernorm.weight"])
    gate = torch.nn.functional.gelu(inner @ own["mlp.gate_proj.weight"].T, approximate="tanh")
    out = (gate * (inner @ own["mlp.up_proj.weight"].T)) @ own["mlp.down_proj.weight"].T
    return (x + rms(out, own["post_feedforward_layernorm.weight"])) * own["layer_scalar"]


def test_blocks_are_those_of_the_formulas(pair: Path) -> None:
    core = load(pair)
    assert family_of(pair / "draft") == "eagle3"
    assert (core.drafter, core.loop.executor.gamma) == ("eagle3", DEPTH)
    text, seen = traced_blocks(core, [token % VOCABULARY for token in prompts(1, shortest=40, longest=40)[0]])
    target = Gemma4UnifiedForCausalLM.from_pretrained(pair / "target", dtype=torch.float64)
    embed, head = target.get_input_embeddings(), target.get_input_embeddings().weight.detach()
    w = {name: tensor.double() for name, tensor in weights(head.float()).items()}
    assert len(seen) > 8
    for trace in seen[:8]:
        assert trace.block is not None
        place, slots = trace.block.requests[0].position, trace.block.limits[0]
        drafted = trace.block.tokens[0, :slots].tolist()
        with torch.no_grad():
            states = target(torch.tensor([text[:place]]), output_hidden_states=True).hidden_states
            features = torch.cat([states[tap + 1][0] for tap in TAPS], -1) @ w["fc.weight"].T
            tokens = torch.tensor([*text[1 : place + 1], *drafted])  # pair i ends with token i + 1
            for slot in range(slots):
                output = layer(w, features, embed(tokens[: place + slot]))[-1:]
                features = torch.cat([features, output])
                expected = CAP * torch.tanh(rms(output, w["norm.weight"]) @ head.T / CAP)[0]
                assert trace.block.base_logits is not None
                mine = trace.block.base_logits[0, slot].double()
                torch.testing.assert_close(mine, expected, atol=5e-4, rtol=5e-4)
                assert drafted[slot] == int(expected.argmax())


def test_tokens_are_the_targets(pair: Path) -> None:
    core, texts = load(pair, "causal"), prompts(6, longest=60)
    texts = [[token % VOCABULARY for token in text] for text in texts]
    params = [greedy(20) if index % 2 else seeded(index, 20) for index in range(6)]
    assert core.generate(texts, params) == load(pair, drafter=False).generate(texts, params)
    assert core.loop.stats.draft_tokens > 0
