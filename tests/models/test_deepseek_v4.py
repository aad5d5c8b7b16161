"""DeepSeek-V4 against transformers in float32: all kinds of layers, in chunks, token by token, after rejected runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dspark_kernels import Kernels
from torch import Tensor
from transformers import AutoModelForCausalLM

from dspark_server.errors import CheckpointError
from dspark_server.models.decoder import Decoder
from dspark_server.models.deepseek_v4 import parse

from .support import PagedRunner
from .v4 import SHAPE, save_v4

VARIANTS: dict[str, dict[str, Any]] = {
    "all kinds": {},
    "windows only": {"compress_ratios": [0, 0], "num_hidden_layers": 2},
    "as Pro begins": {"compress_ratios": [128, 128, 4], "num_hidden_layers": 3, "num_hash_layers": 0},
    "two streams": {"hc_mult": 2, "compress_ratios": [4, 128], "num_hidden_layers": 2, "num_hash_layers": 1},
    "all entries": {"index_topk": 512, "compress_ratios": [4, 4], "num_hidden_layers": 2},
    "unstretched": {"rope_scaling": None, "sliding_window": 5, "o_groups": 4},
}
SCHEDULES = {
    "whole": [[300, 41]],
    "in chunks": [[70, 0], [61, 13], [1, 20], [100, 8], [68, 0]],
    "in runs of six": [[126, 3], *[[6, 6]] * 5, *[[6, 0]] * 20],
    "token by token": [[250, 7], *[[1, 1]] * 30],
}


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    noise = torch.Generator().manual_seed(8)
    return [torch.randint(2, 256, (length,), generator=noise).tolist() for length in (300, 41)]


def reference(directory: Path, texts: list[list[int]]) -> list[Tensor]:
    """transformers' logits [T, V] of each text."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return [model(torch.tensor([text]), use_cache=False).logits[0] for text in texts]


@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_transformers(variant: str, kernels: Kernels, texts: list[list[int]], tmp_path: Path) -> None:
    save_v4(tmp_path, **VARIANTS[variant])
    expected = reference(tmp_path, texts)
    decoder = Decoder.load(tmp_path, torch.float32, kernels, max_model_len=400)
    for schedule in SCHEDULES.values():
        runner = PagedRunner(decoder, texts, 8, torch.float32)
        for counts in schedule:
            before = list(runner.done)
            logits, _ = runner.step(counts)
            theirs = torch.cat(
                [each[start : start + count] for each, start, count in zip(expected, before, counts, strict=True)]
            )
            torch.testing.assert_close(logits, theirs, atol=2e-4, rtol=0)


def test_a_rejected_run_leaves_nothing(kernels: Kernels, texts: list[list[int]], tmp_path: Path) -> None:
    """Windows of 4 and of 128 are closed within runs that are then rejected, and closed again by other tokens."""
    save_v4(tmp_path)
    expected = reference(tmp_path, texts)
    decoder = Decoder.load(tmp_path, torch.float32, kernels, max_model_len=400)
    runner = PagedRunner(decoder, [list(text) for text in texts], 8, torch.float32)
    runner.step([122, 1])
    noise = torch.Generator().manual_seed(2)
    while runner.done[0] < 290:
        kept = list(runner.done)
        true = [list(text) for text in texts]
        for text, start in zip(runner.sequences, kept, strict=True):
            text[start + 1 : start + 6] = torch.randint(2, 256, (5,), generator=noise).tolist()
        runner.step([6, 6 if kept[1] < 34 else 0])
        runner.sequences = true
        runner.done = [start + 1 if now > start else now for start, now in zip(kept, runner.done, strict=True)]
        logits, _ = runner.step([1, 0])
        torch.testing.assert_close(logits[0], expected[0][runner.done[0] - 1], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress_ratios": [0, 2, 128, 4]}, r"compress_ratios \[2\] are not supported; 0, 4 and 128 are"),
        ({"compress_ratios": [0, 4]}, "an entry for each of 4 layers"),
        ({"compress_ratios": [0, 4, 128, 4, 4]}, "one of 0 for each stage"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim 7"),
        ({"o_groups": 3}, "o_groups 3 does not divide"),
    ],
)
def test_what_is_not_supported_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(SHAPE | changes, {})
