"""An MTP layer through the engine against its formulas in float64, with transformers' Qwen3 layer in their middle.

The formulas are those of speculators 0.9.0 (`speculators.models.mtp`); the weights are random.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.errors import CheckpointError
from dspark_server.models.registry import load_config
from dspark_server.speculation.mtp import MtpConfig

from .support import FIXTURES, SMOLLM2_COSTS, greedy, prompts, seeded, still, traced_blocks

TARGET = FIXTURES / "dspark_qwen3_vanilla" / "target"
HIDDEN, EPS, DEPTH = 64, 1e-5, 4
LAYER: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": HIDDEN, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 96, "num_hidden_layers": 6, "vocab_size": 512, "rms_norm_eps": EPS,
    "max_position_embeddings": 1024, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "architectures": ["MTPDraftModel"],
    "speculators_model_type": "mtp",
    "speculators_version": "0.9.0",
    "num_nextn_predict_layers": 1,
    "speculators_config": {
        "algorithm": "mtp",
        "default_proposal_method": "greedy",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": DEPTH}],
        "verifier": {"architectures": ["Qwen3ForCausalLM"], "name_or_path": "target"},
    },
    "transformer_layer_config": LAYER,
    "dtype": "float32",
}


class Plain(nn.Module):
    """The layer as speculators writes it down."""

    def __init__(self) -> None:
        super().__init__()
        config = Qwen3Config(**LAYER, attn_implementation="eager")
        self.inner = Qwen3DecoderLayer(config, 0)
        self.inner.hidden_layernorm, self.inner.token_layernorm, self.inner.final_layernorm = (
            Qwen3RMSNorm(HIDDEN, EPS) for _ in range(3)
        )
        self.inner.input_proj = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        self.rotary = Qwen3RotaryEmbedding(config)
        noise = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in self.inner.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.2 + ("norm" in name))

    def forward(self, embedded: Tensor, features: Tensor) -> Tensor:
        """Outputs [N, D] of pairs 0 .. N - 1 of embeddings and features [N, D]."""
        inner = self.inner
        x = inner.input_proj(torch.cat([inner.token_layernorm(embedded), inner.hidden_layernorm(features)], -1))[None]
        mask = torch.full((len(features),) * 2, -torch.inf, dtype=x.dtype).triu(1)[None, None]
        places = torch.arange(len(features))[None]
        out = inner(x, attention_mask=mask, position_ids=places, position_embeddings=self.rotary(x, places))
        return inner.final_layernorm(out[0])


def weights() -> dict[str, Tensor]:
    return {f"mtp_layers.0.{name}": tensor for name, tensor in Plain().inner.state_dict().items()}


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mtp")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), directory / "model.safetensors")
    return directory


def load(draft: SpeculativeConfig) -> EngineCore:
    config = EngineConfig(str(TARGET), dtype="float32", num_blocks=300, block_size=4, speculative=draft)
    return EngineCore.load(config, SMOLLM2_COSTS, clock=still)


def test_blocks_are_those_of_the_formulas(drafter: Path) -> None:
    """The rows before a block are those of the target's own states, its slots' features the layer's own output."""
    core = load(SpeculativeConfig(model=str(drafter), selection="fixed", copying=False))
    assert (core.drafter, core.loop.executor.gamma) == ("mtp", DEPTH)
    text, seen = traced_blocks(core, prompts(1, shortest=40, longest=40)[0])
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float64)
    plain, embed = Plain().double(), target.get_input_embeddings()
    assert len(seen) > 8
    for trace in seen[:8]:
        assert trace.block is not None
        place, slots = trace.block.requests[0].position, trace.block.limits[0]
        drafted = trace.block.tokens[0, :slots].tolist()
        with torch.no_grad():
            states = target.model(torch.tensor([text[:place]])).last_hidden_state[0]
            tokens = torch.tensor([*text[1 : place + 1], *drafted])  # pair i ends with token i + 1
            for slot in range(slots):
                output = plain(embed(tokens[: place + slot]), states)[-1:]
                states = torch.cat([states, output])
                expected = target.lm_head(output)[0]
                assert trace.block.base_logits is not None
                mine = trace.block.base_logits[0, slot].double()
                torch.testing.assert_close(mine, expected, atol=5e-4, rtol=5e-4)
                assert drafted[slot] == int(expected.argmax())


@pytest.mark.parametrize("depth", [1, None])
def test_tokens_are_the_targets(drafter: Path, depth: int | None) -> None:
    """One draft token, or several by repetition, in a busy batch."""
    core = load(SpeculativeConfig("mtp", str(drafter), num_speculative_tokens=depth))
    texts = prompts(6, longest=60)
    params = [greedy(20) if index % 2 else seeded(index, 20) for index in range(6)]
    assert core.generate(texts, params) == load(SpeculativeConfig("none")).generate(texts, params)
    assert core.loop.stats.draft_tokens > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_nextn_predict_layers": 2}, "several layers are not supported"),
        ({"transformer_layer_config": LAYER | {"model_type": "qwen3_next"}}, "model_type 'qwen3_next'"),
        ({"transformer_layer_config": LAYER | {"hidden_size": 128}}, "hidden_size is 128, the target's 64"),
        (
            {
                "transformer_layer_config": LAYER
                | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
            },
            "must see the whole context",
        ),
        ({"norm_eps_of_heads": 1e-6}, "norm_eps_of_heads, which this server does not know"),
    ],
)
def test_what_is_not_understood_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        MtpConfig.parse(CONFIG | changes, load_config(TARGET))
