"""Our decoder against transformers in float32: logits and the output of every layer, however the tokens are fed."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dspark_kernels import Kernels, load
from torch import Tensor
from transformers import PreTrainedModel

from dspark_server.errors import CheckpointError, ConfigError
from dspark_server.models.decoder import Decoder
from dspark_server.models.layers.attention import AttentionWeights
from dspark_server.models.layers.parts import Parts
from dspark_server.models.layers.prenorm import PreNormLayer
from dspark_server.models.loading import WeightReader, open_checkpoint
from dspark_server.models.registry import load_config
from dspark_server.runtime.batch import Batch, Run

from .support import ARCHITECTURES, ROPES, VOCABULARY, PagedRunner, expected, save_tiny

TOLERANCE = 1e-4
LENGTHS = [70, 33, 5]
SCHEDULES = {
    "one chunk each": [[70, 0, 0], [0, 33, 0], [0, 0, 5]],
    "one batch": [[70, 33, 5]],
    "chunks beside decode steps": [[32, 0, 1], [7, 20, 1], [29, 11, 0], [1, 1, 3], [1, 0, 0], [0, 1, 0]],
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"{family}-{rope}": {"family": family, "rope": rope} for family in ARCHITECTURES for rope in ROPES},
    "llama-tied-mha": {"family": "llama", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama-mqa": {"family": "llama", "num_key_value_heads": 1},
    "llama-biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral-window": {"family": "mistral", "sliding_window": 9},
    "qwen2-tied-window": {
        "family": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 17,
        "max_window_layers": 1,
    },
    "qwen3-biases-tied": {"family": "qwen3", "attention_bias": True, "tie_word_embeddings": True},
    "qwen3-layer-types": {
        "family": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def run_schedule(
    decoder: Decoder, schedule: list[list[int]], dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Per sequence: logits [T, V], and taps -1 .. L-1, each [T, D]."""
    runner = PagedRunner(decoder, sequences(), reserve=0, dtype=dtype)
    taps = tuple(range(-1, decoder.config.num_layers))
    logits: list[list[Tensor]] = [[] for _ in LENGTHS]
    hidden: list[list[list[Tensor]]] = [[[] for _ in taps] for _ in LENGTHS]
    for counts in schedule:
        step_logits, step_taps = runner.step(counts, taps=taps)
        for i, rows in enumerate(torch.split(step_logits, counts)):
            logits[i].append(rows)
        for tap, tensor in enumerate(step_taps):
            for i, rows in enumerate(torch.split(tensor, counts)):
                hidden[i][tap].append(rows)
    return [torch.cat(rows) for rows in logits], [[torch.cat(rows) for rows in taps] for taps in hidden]


def assert_matches(model: PreTrainedModel, decoder: Decoder, *, relative: bool = False) -> None:
    """Logits and taps are transformers' own within TOLERANCE; `relative`: taps within that share of their largest."""
    references = [expected(model, tokens) for tokens in sequences()]
    for schedule in SCHEDULES.values():
        logits, taps = run_schedule(decoder, schedule)
        for ours, our_taps, (reference, reference_taps) in zip(logits, taps, references, strict=True):
            assert (ours - reference).abs().max() <= TOLERANCE
            for tap, reference_tap in zip(our_taps, reference_taps, strict=True):
                largest = max(1.0, float(reference_tap.abs().max())) if relative else 1.0
                assert (tap - reference_tap).abs().max() <= TOLERANCE * largest


@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_transformers(variant: str, kernels: Kernels, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, **VARIANTS[variant])
    assert_matches(model, Decoder.load(tmp_path, torch.float32, kernels, max_model_len=256))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "default" in name or "llama-m" in name or "-b" in name
                                     or "window" in name or "types" in name] + ["llama-wide"])  # fmt: skip
@pytest.mark.parametrize(
    ("lengths", "schedule", "threads"),
    [
        (LENGTHS, SCHEDULES["chunks beside decode steps"], 2),
        ([130, 100, 5], [[130, 100, 5]], 2),
        ([130, 100, 5], [[130, 100, 5]], 1),  # more rows of llama-wide than go through a product at once
    ],
    ids=["chunks", "slices", "whole"],
)
def test_a_layer_in_one_call_is_the_layer(
    variant: str,
    lengths: list[int],
    schedule: list[list[int]],
    threads: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit, causal or not, whether threads share a product's columns or each takes some of the tokens."""
    monkeypatch.setitem(globals(), "LENGTHS", lengths)
    monkeypatch.setattr("dspark_kernels.cpu.native.get_num_threads", lambda: threads)
    monkeypatch.setenv("DSPARK_LINEAR", "native")
    wide = {"family": "llama", "hidden_size": 2048, "num_hidden_layers": 2}
    save_tiny(tmp_path, **{**VARIANTS, "llama-wide": wide}[variant])
    decoder = Decoder.load(tmp_path, torch.bfloat16, load("native"), max_model_len=256)
    fused = [layer._fused for layer in decoder.layers]
    assert None not in fused
    for causal in (True, False):
        for layer in decoder.layers:
            monkeypatch.setattr(layer, "forward", partial(PreNormLayer.forward, layer, causal=causal))
        outcomes = []
        for calls in (fused, [None] * len(fused)):
            for layer, call in zip(decoder.layers, calls, strict=True):
                layer._fused = call
            logits, taps = run_schedule(decoder, schedule, torch.bfloat16)
            outcomes.append([*logits, *(tap for each in taps for tap in each)])
        assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def test_dynamic_rope_at_the_served_length_equals_one_forward_of_that_length(kernels: Kernels, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, rope="dynamic", max_position_embeddings=40)
    decoder = Decoder.load(tmp_path, torch.float32, kernels, max_model_len=70)
    logits, _ = run_schedule(decoder, SCHEDULES["chunks beside decode steps"])
    reference, _ = expected(model, sequences()[0])
    assert (logits[0] - reference).abs().max() <= TOLERANCE


def test_taps_come_in_the_order_asked_for_and_share_no_memory(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    decoder = Decoder.load(tmp_path, torch.float32, load("reference"))
    ordered = PagedRunner(decoder, sequences(), 0, torch.float32).step([70, 33, 5], taps=(-1, 0, 2))[1]
    shuffled = PagedRunner(decoder, sequences(), 0, torch.float32).step([70, 33, 5], taps=(2, -1, 0))[1]
    for ours, theirs in zip(ordered, [shuffled[1], shuffled[2], shuffled[0]], strict=True):
        assert torch.equal(ours, theirs)
    assert len({tensor.data_ptr() for tensor in shuffled}) == 3


def test_only_the_wanted_rows_get_logits(kernels: Kernels, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    decoder = Decoder.load(tmp_path, torch.float32, kernels)
    full, _ = PagedRunner(decoder, sequences(), 0, torch.float32).step([70, 33, 5])
    last, _ = PagedRunner(decoder, sequences(), 0, torch.float32).step([70, 33, 5], all_logits=False)
    assert last.shape == (3, VOCABULARY)
    assert last.dtype == torch.float32
    assert (last - full[[69, 102, 107]]).abs().max() <= 1e-5


def test_a_pass_without_logits_rows_gives_none(kernels: Kernels, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    decoder = Decoder.load(tmp_path, torch.float32, kernels)
    runner = PagedRunner(decoder, sequences(), 0, torch.float32)
    batch = Batch.of([Run(sequences()[0], 0, runner.tables[0], 0)], runner.groups)
    hidden, _ = decoder.forward(batch, runner.layers)
    assert hidden.shape == (0, 64)


def test_key_value_rows_are_the_projections_of_the_checkpoint(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "qwen3", attention_bias=True)
    config = load_config(tmp_path)
    reader = WeightReader(open_checkpoint(tmp_path), torch.float32)
    layer = config.layers[1].attention
    parts = Parts(reader, load("reference"), config.hidden_size, config.rms_norm_eps, 64, 64)
    weights = AttentionWeights.read(parts, layer, "model.layers.1.self_attn.")
    assert weights.qkv_bias is not None
    weight, bias = weights.qkv[layer.queries :], weights.qkv_bias[layer.queries :]
    attention = model.model.layers[1].self_attn
    assert torch.equal(weight, torch.cat((attention.k_proj.weight, attention.v_proj.weight)))
    assert bias is not None
    assert torch.equal(bias, torch.cat((attention.k_proj.bias, attention.v_proj.bias)))
    assert weights.k_norm is not None
    assert torch.equal(weights.k_norm, attention.k_norm.weight)


def test_a_layer_that_is_not_causal_sees_its_whole_run(kernels: Kernels, tmp_path: Path) -> None:
    """What a draft block needs: the output of its first token depends on its last one."""
    save_tiny(tmp_path, "qwen3")
    decoder = Decoder.load(tmp_path, torch.float32, kernels)

    def first_row(last_token: int, causal: bool) -> Tensor:
        runner = PagedRunner(decoder, [[3, 4, 5, last_token]], 0, torch.float32)
        batch = Batch.of([Run([3, 4, 5, last_token], 0, runner.tables[0], 1)], runner.groups)
        residual = decoder.embed(batch.tokens)
        delta = decoder.layers[0].forward(None, residual, batch, runner.layers[:1], causal)
        return (residual + delta)[0]

    assert torch.equal(first_row(7, causal=True), first_row(8, causal=True))
    assert not torch.allclose(first_row(7, causal=False), first_row(8, causal=False), atol=1e-3)


@pytest.mark.parametrize("length", [0, 257])
def test_a_length_beyond_the_model_is_a_config_error(length: int, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with pytest.raises(ConfigError, match="max_model_len"):
        Decoder.load(tmp_path, torch.float32, load("reference"), length)


def test_an_unsupported_dtype_is_a_config_error(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with pytest.raises(ConfigError, match="float16"):
        Decoder.load(tmp_path, torch.float16, load("reference"))


def test_a_checkpoint_of_another_family_does_not_load(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen2")
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(CheckpointError, match=r"unexpected tensor .*bias"):
        Decoder.load(tmp_path, torch.float32, load("reference"))
