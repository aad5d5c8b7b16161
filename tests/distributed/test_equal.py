"""Two ranks over gloo give exactly the tokens of one, in float32: greedy and seeded, with a drafter."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_server.config import SpeculativeConfig
from dspark_server.engine.ranks import decode_runs, encode_runs
from dspark_server.engine.request import SamplingParams
from dspark_server.errors import ConfigError
from dspark_server.models.registry import load_config
from dspark_server.runtime.batch import Run
from dspark_server.runtime.paging import BlockTable
from dspark_server.speculation.noise import CounterStreams

from ..engine.support import FIXTURES, greedy, prompts, still
from ..engine.test_lossless import mixed
from ..models.support import save_tiny
from ..models.test_moe import save_moe
from ..models.v4 import DSPARK, save_v4
from .support import Together, one_rank, tiny_config


@pytest.fixture(scope="module")
def two() -> Iterator[Together]:
    with Together.start(2) as ranks:
        yield ranks


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_blocks": 22, "max_num_batched_tokens": 30, "max_num_seqs": 6}],
    ids=["roomy", "chunked-preempted"],
)
def test_with_a_drafter(two: Together, settings: dict[str, int]) -> None:
    made, own = prompts(6), mixed(6)
    expected = one_rank(tiny_config(drafter=False)).generate(made, own)
    with two.core(tiny_config(**settings)) as core:
        assert core.generate(made, own) == expected
        assert core.loop.stats.accepted_tokens > 0
        assert core.batcher.pool.usage == 0.0
        assert (core.loop.stats.preemptions > 0) == bool(settings)
        assert core.backend.endswith(", 2 ranks")


def test_prefix_hits_carry_the_rows_of_every_rank(two: Together) -> None:
    """And the drafter's: what is accepted after a hit is what was without."""
    prompt = prompts(1, shortest=24, longest=24)
    with two.core(tiny_config()) as core:
        first = core.generate(prompt, greedy(16))
        accepted = core.loop.stats.accepted_tokens
        assert core.generate(prompt, greedy(16)) == first
        assert core.loop.stats.prefix_hits > 0
        assert core.loop.stats.accepted_tokens == 2 * accepted
    assert one_rank(tiny_config()).generate(prompt, greedy(16)) == first


VARIANTS: dict[str, dict[str, Any]] = {
    "biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "tied": {"family": "qwen2", "tie_word_embeddings": True},
    "window": {"family": "mistral", "sliding_window": 9},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_architectures(two: Together, variant: str, tmp_path: Path) -> None:
    """A vocabulary of 199: the last rank's share is filled up. Prompt scores are those of one rank, too."""
    save_tiny(tmp_path, **VARIANTS[variant])
    config = tiny_config(drafter=False, model=str(tmp_path))
    texts = [[token % 190 for token in prompt] for prompt in prompts(4)]
    asked = [*mixed(3), SamplingParams(max_tokens=3, temperature=0.0, logprobs=2, prompt_logprobs=1)]
    expected = one_rank(config).generate(texts, asked)
    with two.core(config) as core:
        assert core.generate(texts, asked) == expected


def test_layers_of_two_geometries_and_a_head_that_ranks_share(two: Together) -> None:
    """Gemma4 with its drafter: two block tables, whose sizes are rank 0's; the one key/value head is on both ranks."""
    pair = FIXTURES / "dspark_gemma4"
    target = {"model": str(pair / "target"), "num_blocks": 300}
    made, own = [[token % 380 for token in prompt] for prompt in prompts(6, shortest=40, longest=150)], mixed(6)
    expected = one_rank(tiny_config(drafter=False, **target)).generate(made, own)
    drafter = SpeculativeConfig(method="dspark", model=str(pair / "draft"), selection="fixed")
    with two.core(replace(tiny_config(**target), speculative=drafter)) as core:
        for _ in range(2):
            assert core.generate(made, own) == expected
        assert core.loop.stats.accepted_tokens > 0
        assert core.loop.stats.prefix_hits > 0


@pytest.mark.parametrize("pair", ["eagle3_qwen3", "mtp_gemma4_assistant"])
def test_drafters_of_one_token_a_pass(two: Together, pair: str) -> None:
    """On rank 0 alone, and as good as on one rank: the assistant has the rows of all heads."""
    target = {"model": str(FIXTURES / pair / "target"), "num_blocks": 300}
    made, own = [[token % 380 for token in prompt] for prompt in prompts(6, shortest=20, longest=90)], mixed(6)
    expected = one_rank(tiny_config(drafter=False, **target)).generate(made, own)
    drafter = SpeculativeConfig(model=str(FIXTURES / pair / "draft"), selection="fixed", copying=False)
    config = replace(tiny_config(**target), speculative=drafter)
    alone = one_rank(config)
    assert alone.generate(made, own) == expected
    with two.core(config) as core:
        assert core.generate(made, own) == expected
        assert core.loop.stats.accepted_tokens == alone.loop.stats.accepted_tokens > 0
        assert core.generate(made, own) == expected
        assert core.loop.stats.prefix_hits > 0


@pytest.mark.parametrize("drafter", [{"stages": 3, **DSPARK}, {"stages": 1}], ids=["dspark", "mtp"])
def test_deepseek_v4(two: Together, drafter: dict[str, Any], tmp_path: Path) -> None:
    """Groups of heads and parts of experts are shared, rows and entries are on both ranks."""
    save_v4(tmp_path, **drafter)
    target = {"model": str(tmp_path), "num_blocks": 300, "block_size": 16}
    made, own = [[2 + token % 250 for token in prompt] for prompt in prompts(4, shortest=20, longest=140)], mixed(4)
    expected = one_rank(tiny_config(drafter=False, **target)).generate(made, own)
    config = replace(tiny_config(**target), speculative=SpeculativeConfig(selection="fixed", copying=False))
    alone = one_rank(config)
    assert alone.generate(made, own) == expected
    with two.core(config) as core:
        for _ in range(2):
            assert core.generate(made, own) == expected
        assert core.loop.stats.accepted_tokens == 2 * alone.loop.stats.accepted_tokens > 0
        assert core.loop.stats.prefix_hits > 0


@pytest.mark.parametrize("whole", [False, True], ids=["parts", "whole"])
@pytest.mark.parametrize("variant", ["qwen3-some-plain", "qwen2-shared"])
def test_mixtures_of_experts(two: Together, variant: str, whole: bool, tmp_path: Path) -> None:
    """Each rank has a part of every expert or some of the experts whole, and the whole router."""
    save_moe(tmp_path, variant)
    config = tiny_config(drafter=False, model=str(tmp_path), enable_expert_parallel=whole)
    texts = [[token % 190 for token in prompt] for prompt in prompts(4)]
    expected = one_rank(config).generate(texts, mixed(4))
    with two.core(config) as core:
        assert core.generate(texts, mixed(4)) == expected


def test_experts_that_ranks_cannot_divide(tmp_path: Path) -> None:
    save_moe(tmp_path, "qwen3", num_experts=7)
    model = load_config(tmp_path)
    assert model.shared_by(2) != model
    with pytest.raises(ConfigError, match="7 experts: it can be 1, not 2"):
        load_config(tmp_path, whole_experts=True).shared_by(2)
    save_moe(tmp_path, "qwen3-some-plain", num_experts=6)
    with pytest.raises(ConfigError, match="96 feed-forward units and 6 experts: it can be 1 or 2, not 4"):
        load_config(tmp_path, whole_experts=True).shared_by(4)


def test_runs_travel_as_plain_data() -> None:
    runs = [Run([5, 7], 12, [BlockTable(0, [3, 1]), BlockTable(4, [2])], 2), Run([9], 0, [BlockTable(0, [0])], 0)]
    assert decode_runs(encode_runs(runs)) == runs
    assert encode_runs(runs).startswith(b"[[[5,7]")


@pytest.mark.parametrize("length", [1, 8180, 8181, 50_000])
def test_messages_of_any_length_arrive(two: Together, length: int) -> None:
    """A pass of long block tables is longer than one frame: the other rank would hang or fail to read it."""
    with two.core(tiny_config(drafter=False)) as core:
        runs = [Run([5, 9], 0, [BlockTable(0, [1] * length)], 2)]
        executor = core.loop.executor
        logits, _ = executor.cycle(runs, CounterStreams(), still).verify(None)
        again, _ = executor.cycle([Run([5, 9], 0, [BlockTable(0, [1, 0])], 2)], CounterStreams(), still).verify(None)
        assert torch.equal(logits, again)
