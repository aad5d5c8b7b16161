"""DeepSeek-V4 on four ranks over gloo, experts in parts and whole: the tokens of one rank, in float32, with drafts."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dspark_server.config import SpeculativeConfig

from ..engine.support import prompts
from ..engine.test_lossless import mixed
from ..models.v4 import DSPARK, save_v4
from .support import Together, one_rank, tiny_config


@pytest.fixture(scope="module")
def four() -> Iterator[Together]:
    with Together.start(4) as ranks:
        yield ranks


@pytest.mark.parametrize("whole", [False, True], ids=["parts", "whole"])
@pytest.mark.parametrize("drafter", [{"stages": 3, **DSPARK}, {"stages": 1}], ids=["dspark", "mtp"])
def test_tokens_are_those_of_one_rank(four: Together, drafter: dict[str, Any], whole: bool, tmp_path: Path) -> None:
    """Rank 0 drafts alone; experts are chosen by token in some layers, by score in others."""
    save_v4(tmp_path, o_groups=4, **drafter)
    target = {"model": str(tmp_path), "num_blocks": 300, "block_size": 16, "enable_expert_parallel": whole}
    made, own = [[2 + token % 250 for token in prompt] for prompt in prompts(4, shortest=20, longest=140)], mixed(4)
    expected = one_rank(tiny_config(drafter=False, **target)).generate(made, own)
    config = replace(tiny_config(**target), speculative=SpeculativeConfig(selection="fixed", copying=False))
    alone = one_rank(config)
    assert alone.generate(made, own) == expected
    with four.core(config) as core:
        assert core.generate(made, own) == expected
        assert core.loop.stats.accepted_tokens == alone.loop.stats.accepted_tokens > 0
