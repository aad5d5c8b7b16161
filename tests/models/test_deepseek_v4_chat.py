"""DeepSeek-V4's chat template writes what the public encoding writes, for every conversation of a table."""

import json
from pathlib import Path
from typing import Any

import pytest

from dspark_server.api.chat_schema import Conversation
from dspark_server.api.chat_template import ChatTemplate
from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.models.deepseek_v4 import DEEPSEEK_V4

from ..api.conftest import build_tokenizer
from ..engine.support import FIXTURES
from .v4 import save_v4

CASES: list[dict[str, Any]] = json.loads((FIXTURES / "deepseek_v4_prompts.json").read_text())["cases"]
assert DEEPSEEK_V4.chat_template is not None
OWN = DEEPSEEK_V4.chat_template.read_text()


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['name']}-{case['thinking']}-{case['reasoning_effort']}"
)
def test_prompts_are_those_of_the_public_encoding(case: dict[str, Any]) -> None:
    variables = {name: case[name] for name in ("thinking", "reasoning_effort") if case[name] is not None}
    asked = Conversation(messages=case["messages"], tools=case["tools"], chat_template_kwargs=variables)
    assert ChatTemplate(OWN).render_now(asked) == case["prompt"]


@pytest.mark.parametrize("own", [None, "{{ messages[0].content }}"])
def test_it_stands_in_where_a_checkpoint_has_none(own: str | None, tmp_path: Path) -> None:
    save_v4(tmp_path, vocab_size=512)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = own
    tokenizer.save_pretrained(tmp_path)
    config = EngineConfig(str(tmp_path), dtype="float32", num_blocks=8, speculative=SpeculativeConfig("none"))
    loaded = EngineCore.load(config).tokenizer
    assert loaded is not None
    assert loaded.chat_template == (own or OWN)
