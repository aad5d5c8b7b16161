"""A canary for every family: 200 random identifiers in a text, repeated. Exact text shows wrong rows first.

Other engines lost characters of identifiers once windows, compressed rows or drafts were in play. The embedded model
really repeats them. Random weights do not, so there the answers to texts that repeat identifiers are compared with the
target's own, alone: in a busy batch, in chunks, after prefix hits and preemptions, with copies drafted from the text.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.request import SamplingParams
from dspark_server.models.registry import FAMILIES

from ..models.support import tiny_model
from ..models.test_gemma4 import save_gemma
from ..models.test_moe import save_moe
from ..models.v4 import DSPARK, save_v4
from .support import SMOLLM2_COSTS, greedy, still

COUNT, SEPARATOR, LENGTH = 200, 5, 2048
Save = Callable[[Path], Any]


def plain(family: str) -> Save:
    return lambda at: tiny_model(family, max_position_embeddings=LENGTH).save_pretrained(at)


SAVED: dict[str, Save] = {
    "LlamaForCausalLM": plain("llama"),
    "MistralForCausalLM": plain("mistral"),
    "Qwen2ForCausalLM": plain("qwen2"),
    "Qwen3ForCausalLM": plain("qwen3"),
    "Qwen2MoeForCausalLM": lambda at: save_moe(at, "qwen2-shared", max_position_embeddings=LENGTH),
    "Qwen3MoeForCausalLM": lambda at: save_moe(at, "qwen3", max_position_embeddings=LENGTH),
    "Gemma4UnifiedForCausalLM": lambda at: save_gemma(at, max_position_embeddings=LENGTH),
    "DeepseekV4ForCausalLM": lambda at: save_v4(at, max_position_embeddings=LENGTH),
}
# Beside copies, which every family has: the drafters inside a checkpoint.
DRAFTERS: dict[str, Save] = {
    "DeepSeek-V4 with DSpark": lambda at: save_v4(at, stages=3, max_position_embeddings=LENGTH, **DSPARK),
    "DeepSeek-V4 with MTP": lambda at: save_v4(at, stages=1, max_position_embeddings=LENGTH),
}


def test_every_family_is_here() -> None:
    assert {id(FAMILIES[name]) for name in SAVED} == {id(family) for family in FAMILIES.values()}


def texts() -> list[list[int]]:
    """The list, and its beginning once more: nothing, a few, many or nearly all of the identifiers."""
    source = random.Random(7)
    listed = [[source.randrange(10, 190) for _ in range(3)] + [SEPARATOR] for _ in range(COUNT)]
    again = (0, 7, 90, 199)
    return [[token for each in [*listed, *listed[:count]] for token in each] for count in again]


def load(directory: Path, method: str, **settings: Any) -> EngineCore:
    speculative = SpeculativeConfig(method, selection="fixed")
    values: dict[str, Any] = {"num_blocks": 600, "check_invariants": True} | settings
    config = EngineConfig(str(directory), dtype="float32", speculative=speculative, **values)
    return EngineCore.load(config, SMOLLM2_COSTS, clock=still)


def answers(core: EngineCore, asked: list[list[int]]) -> list[list[int]]:
    """Of all at once, while every fifth step one of those that run gives way."""
    requests = [core.new_request(text, greedy(24), nonce=index) for index, text in enumerate(asked)]
    for request in requests:
        core.batcher.add(request)
    while core.loop.has_work:
        core.loop.step()
        if core.loop.stats.steps % 5 == 0 and core.batcher.running:
            core.batcher.preempt(core.batcher.running[-1])
    return [request.output for request in requests]


@pytest.mark.parametrize("name", SAVED | DRAFTERS)
def test_identifiers_are_read_as_they_stand(name: str, tmp_path: Path) -> None:
    (SAVED | DRAFTERS)[name](tmp_path)
    asked = texts()
    solo = load(tmp_path, "none", enable_prefix_caching=False)
    wanted = [solo.generate([text], greedy(24))[0] for text in asked]
    core = load(tmp_path, "auto" if name in DRAFTERS else "ngram", max_num_batched_tokens=96, max_num_seqs=4)
    for _ in range(2):
        assert answers(core, asked) == wanted
    stats = core.loop.stats
    assert stats.draft_tokens > 0
    assert stats.prefix_hits > 0
    assert stats.preemptions > 4


def test_the_embedded_model_repeats_them() -> None:
    """200 numbered lines of random letters and digits; the list begins again, and the answer is its continuation.

    So small a model repeats some of them wrongly, with drafts exactly those that it does without.
    """
    source = random.Random(3)
    made = ("".join(source.choices("abcdefghjkmnpqrstuvwxyz23456789", k=6)) for _ in range(COUNT))
    listed = [f"{number}: {each}" for number, each in enumerate(made, 100)]
    text = "List of keys:\n" + "\n".join(listed) + "\n\nThe same list of keys again:\n"
    core = EngineCore.load(
        EngineConfig("SmolLM2-135M-Instruct", max_num_batched_tokens=256), SMOLLM2_COSTS, clock=still
    )
    assert core.tokenizer is not None
    asked = [core.tokenizer.encode(text + "\n".join(listed[:3]) + "\n")]
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    answered = core.generate(asked, params)
    assert core.loop.stats.accepted_tokens > 30
    lines = core.tokenizer.decode(answered[0]).split("\n")[:6]
    assert sum(line == wanted for line, wanted in zip(lines, listed[3:], strict=False)) >= 3
    core.select("none")
    assert core.generate(asked, params) == answered
