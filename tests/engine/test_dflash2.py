"""DFlash2 through the engine against its formulas in float64: convolutions along a block, candidates of each slot.

z-lab's public code (dflash/model.py, August 2026) is the source of the formulas; the weights are random.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.request import SamplingParams
from dspark_server.errors import CheckpointError, ConfigError

from .support import FIXTURES, greedy, prompts, seeded, traced_blocks

TARGET = FIXTURES / "dspark_qwen3_vanilla" / "target"
HIDDEN, HEADS, KV, SIZE, FEATURES, VOCABULARY, LAYERS = 64, 4, 2, 32, 96, 512, 2
WIDTH, TAPS, GROUP, RANK, TOP, MASK, CAP, SCALE = 6, 3, 16, 8, 12, 511, 20.0, 0.7
IDS, WINDOW, THETA, EPS = (0, 2, 3), 16, 1e4, 1e-5
CONFIG: dict[str, Any] = {
    "architectures": ["DFlash2DraftModel"], "model_type": "qwen3", "is_causal": False, "hidden_size": HIDDEN,
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": SIZE, "intermediate_size": FEATURES,
    "num_hidden_layers": LAYERS, "num_target_layers": 6, "vocab_size": VOCABULARY, "rms_norm_eps": EPS,
    "max_position_embeddings": 1024, "max_window_layers": 2, "sliding_window": WINDOW, "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"rope_theta": THETA, "rope_type": "default"},
    "attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": False,
    "dflash_config": {
        "block_size": WIDTH, "conv_group_size": GROUP, "conv_kernel_size": TAPS, "selector_rank": RANK,
        "selector_top_k": TOP, "mask_token_id": MASK, "target_layer_ids": list(IDS),
        "final_logit_softcapping": CAP, "output_multiplier": SCALE,
    },
}  # fmt: skip


def weights() -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(5)

    def some(*shape: int, scale: float = 0.2, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=noise) * scale + mean

    made = {
        "fc.weight": some(HIDDEN, len(IDS) * HIDDEN),
        "hidden_norm.weight": some(HIDDEN, mean=1.0),
        "norm.weight": some(HIDDEN, mean=1.0),
        "candidate_selector.hidden_projection.weight": some(RANK, HIDDEN),
        "candidate_selector.predecessor_codebook": some(VOCABULARY, RANK, scale=1.0),
        "candidate_selector.successor_codebook": some(VOCABULARY, RANK, scale=1.0),
    }
    for i in range(LAYERS):
        layer = {
            "input_layernorm.weight": some(HIDDEN, mean=1.0),
            "post_attention_layernorm.weight": some(HIDDEN, mean=1.0),
            "self_attn.q_proj.weight": some(HEADS * SIZE, HIDDEN),
            "self_attn.k_proj.weight": some(KV * SIZE, HIDDEN),
            "self_attn.v_proj.weight": some(KV * SIZE, HIDDEN),
            "self_attn.o_proj.weight": some(HIDDEN, HEADS * SIZE),
            "self_attn.q_norm.weight": some(SIZE, mean=1.0),
            "self_attn.k_norm.weight": some(SIZE, mean=1.0),
            "mlp.gate_proj.weight": some(FEATURES, HIDDEN),
            "mlp.up_proj.weight": some(FEATURES, HIDDEN),
            "mlp.down_proj.weight": some(HIDDEN, FEATURES),
        }
        for conv in ("attention_conv", "mlp_conv"):
            layer[f"{conv}.base_kernel"] = some(2, TAPS, HIDDEN, scale=0.5)
            layer[f"{conv}.kernel_projection.weight"] = some(2 * TAPS * HIDDEN // GROUP, HIDDEN, scale=0.1)
        made |= {f"layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return made


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dflash2")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), directory / "model.safetensors")
    return directory


def load(drafter: Path, **settings: Any) -> EngineCore:
    speculative = SpeculativeConfig(model=str(drafter), **{"selection": "fixed", "copying": False} | settings)
    return EngineCore.load(
        EngineConfig(str(TARGET), dtype="float32", num_blocks=300, block_size=4, speculative=speculative)
    )


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """x [n, heads, d]."""
    angles = positions[:, None, None] * THETA ** (-torch.arange(0, SIZE, 2).double() / SIZE)
    low, high = x.chunk(2, -1)
    return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], -1)


def convolved(x: Tensor, base: Tensor, dynamic: Tensor) -> Tensor:
    """x [W, D], base [T, D], dynamic [W, T, G]: one sum after the other."""
    out = torch.zeros_like(x)
    for i in range(len(x)):
        for tap in range(min(TAPS, i + 1)):
            out[i] += (base[tap] + dynamic[i, tap].repeat_interleave(GROUP)) * x[i - tap]
    return out


def block(taps: Tensor, embedded: Tensor, place: int) -> Tensor:
    """States [W, D] after the final norm, of a block at `place` after context with taps [place, m D]."""
    w = {name: tensor.double() for name, tensor in weights().items()}
    context, x = rms(taps @ w["fc.weight"].T, w["hidden_norm.weight"]), embedded
    everywhere, here = torch.arange(place + WIDTH), torch.arange(place, place + WIDTH)
    for i in range(LAYERS):

        def of(name: str, i: int = i) -> Tensor:
            return w[f"layers.{i}.{name}"]

        def heads(rows: Tensor, name: str, of: Any = of) -> Tensor:
            return (rows @ of(f"self_attn.{name}_proj.weight").T).view(len(rows), -1, SIZE)

        a = rms(x, of("input_layernorm.weight"))
        dynamic = (a @ of("attention_conv.kernel_projection.weight").T).view(WIDTH, 2, TAPS, -1)
        a = convolved(a, of("attention_conv.base_kernel")[0], dynamic[:, 0])
        rows = torch.cat([context, a])
        q = rotated(rms(heads(a, "q"), of("self_attn.q_norm.weight")), here)
        k = rotated(rms(heads(rows, "k"), of("self_attn.k_norm.weight")), everywhere)
        k, v = (each.repeat_interleave(HEADS // KV, 1) for each in (k, heads(rows, "v")))
        scores = torch.einsum("qhd,khd->hqk", q, k) / SIZE**0.5
        if i == 0:
            scores = scores.masked_fill(here[:, None] - everywhere >= WINDOW, -torch.inf)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ of("self_attn.o_proj.weight").T
        x = x + convolved(attended, of("attention_conv.base_kernel")[1], dynamic[:, 1])
        m = rms(x, of("post_attention_layernorm.weight"))
        dynamic = (m @ of("mlp_conv.kernel_projection.weight").T).view(WIDTH, 2, TAPS, -1)
        m = convolved(m, of("mlp_conv.base_kernel")[0], dynamic[:, 0])
        gate = torch.nn.functional.silu(m @ of("mlp.gate_proj.weight").T)
        m = (gate * (m @ of("mlp.up_proj.weight").T)) @ of("mlp.down_proj.weight").T
        x = x + convolved(m, of("mlp_conv.base_kernel")[1], dynamic[:, 1])
    return rms(x, w["norm.weight"])


def path(states: Tensor, head: Tensor, anchor: int) -> list[int]:
    """The tokens of the slots after the anchor, each the best of its candidates after the one before."""
    w = {name: tensor.double() for name, tensor in weights().items()}
    logits = CAP * torch.tanh(states[1:] @ head.T * SCALE / CAP)
    found = [anchor]
    for state, row in zip(states[1:], logits, strict=True):
        unary, candidates = row.topk(TOP)
        before = w["candidate_selector.predecessor_codebook"][found[-1]]
        along = before * (w["candidate_selector.hidden_projection.weight"] @ state)
        scores = unary + w["candidate_selector.successor_codebook"][candidates] @ along
        found.append(int(candidates[scores.argmax()]))
    return found[1:]


def test_blocks_are_those_of_the_formulas(drafter: Path) -> None:
    text, seen = traced_blocks(load(drafter), prompts(1, shortest=40, longest=40)[0], 20)
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float64)
    assert len(seen) > 10
    for trace in seen[:10]:
        assert trace.block is not None
        place = trace.block.requests[0].position
        with torch.no_grad():
            states = target(torch.tensor([text[:place]]), output_hidden_states=True).hidden_states
            taps = torch.cat([states[i + 1][0] for i in IDS], -1)
            tokens = torch.tensor([text[place], *[MASK] * (WIDTH - 1)])
            expected = block(taps, target.get_input_embeddings()(tokens), place)
            drafted = path(expected, target.lm_head.weight, text[place])
        assert trace.block.hidden is not None
        torch.testing.assert_close(trace.block.hidden[0].double(), expected[1:], atol=2e-4, rtol=2e-4)
        usable = trace.block.limits[0]
        assert trace.block.tokens[0, :usable].tolist() == drafted[:usable]


def test_tokens_are_the_targets(drafter: Path) -> None:
    core = load(drafter, method="dflash2", copying=True)
    bare = EngineCore.load(
        EngineConfig(str(TARGET), dtype="float32", num_blocks=300, speculative=SpeculativeConfig("none"))
    )
    texts = prompts(6, longest=60)
    params = [greedy(20) if index % 2 else seeded(index, 20) for index in range(6)]
    assert core.generate(texts, params) == bare.generate(texts, params)
    sampled = SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True)
    assert all(len(answer) == 20 for answer in core.generate(texts, sampled))
    assert core.loop.stats.draft_tokens > 0


def test_what_does_not_fit_is_refused(drafter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method dflash expects a drafter without a sequential head"):
        load(drafter, method="dflash")
    with pytest.raises(ConfigError, match="method dflash2 expects a drafter with a candidate selector"):
        load(FIXTURES / "dspark_qwen3_vanilla" / "draft", method="dflash2")
    own = {**CONFIG["dflash_config"], "conv_group_size": 48}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "dflash_config": own}))
    save_file(weights(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="conv_group_size 48 does not divide hidden_size 64"):
        load(tmp_path)
