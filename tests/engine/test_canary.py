"""A canary for every family: 200 random identifiers in a text, repeated. Exact text shows wrong rows first.

Other engines lost characters of identifiers once windows, compressed rows or drafts were in play. The embedded model
really repeats them. Random weights do not, so there the answers to texts that repeat identifiers are compared with the
target's own, alone: in a busy batch, in chunks, after prefix hits, with copies drafted from the text.
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
from ..models.v4 import save_v4
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


@pytest.mark.parametrize("name", SAVED)
def test_identifiers_are_read_as_they_stand(name: str, tmp_path: Path) -> None:
    SAVED[name](tmp_path)
    asked, params = texts(), greedy(24)
    solo = load(tmp_path, "none", enable_prefix_caching=False)
    wanted = [solo.generate([text], params)[0] for text in asked]
    rows = solo.batcher.pool.groups[0].block_size
    tight = 2 * -(-(LENGTH // rows) // 2) + 8  # for little more than one of them, where 160 is not more
    core = load(tmp_path, "ngram", max_num_batched_tokens=96, max_num_seqs=4, num_blocks=max(tight, 160))
    for _ in range(2):
        assert core.generate(asked, params) == wanted
    stats = core.loop.stats
    assert stats.drafting["copied"] > 0
    assert stats.prefix_hits > 0


def test_the_embedded_model_repeats_them() -> None:
    """200 numbered lines of random letters and digits; the list begins again, and the answer is its continuation.

    So small a model repeats half of them rightly, with drafts exactly those that it does without.
    """
    source = random.Random(3)
    made = ("".join(source.choices("abcdefghjkmnpqrstuvwxyz23456789", k=6)) for _ in range(COUNT))
    listed = [f"{number}: {each}" for number, each in enumerate(made, 100)]
    text = "List of keys:\n" + "\n".join(listed) + "\n\nThe same list of keys again:\n"
    begun = [3, 60, 120, 180]
    core = EngineCore.load(
        EngineConfig("SmolLM2-135M-Instruct", max_num_batched_tokens=256), SMOLLM2_COSTS, clock=still
    )
    assert core.tokenizer is not None
    asked = [core.tokenizer.encode(text + "\n".join(listed[:count]) + "\n") for count in begun]
    params = SamplingParams(max_tokens=56, temperature=0.0, ignore_eos=True)
    answers = core.generate(asked, params)
    assert core.loop.stats.accepted_tokens > 100
    right = 0
    for count, answer in zip(begun, answers, strict=True):
        lines = core.tokenizer.decode(answer).split("\n")[:4]
        right += sum(line == wanted for line, wanted in zip(lines, listed[count:], strict=False))
    assert right >= 5, "of 16 identifiers"
    core.select("none")
    assert core.generate(asked, params) == answers
