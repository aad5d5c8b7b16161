"""Which tokens end an answer, and what is said of a checkpoint whose files disagree about it."""

import json
import logging
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dspark_server.engine.core import load_tokenizer
from dspark_server.errors import CheckpointError
from dspark_server.models.ends import end_tokens, turn_end, warn_of_ends

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
ANSWERED = "{% if messages[-1]['role'] == 'user' %}{{ raise_exception('answer first') }}{% endif %}" + CHATML
SPECIAL = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "</s>"]


def tokenizer_with(template: str | None, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos)
    wrapped.chat_template = template
    return wrapped


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (GEMMA, "<end_of_turn>"),
        (LLAMA2, "</s>"),
        (ANSWERED, "<|im_end|>"),
        (None, None),
        ("{{ messages[1]['content'] }}\n### ", None),
        ("{{ raise_exception('no') }}", None),
        ("only this", None),
    ],
)
def test_the_special_token_behind_an_answer(template: str | None, end: str | None) -> None:
    tokenizer = tokenizer_with(template)
    expected = None if end is None else (end, tokenizer.convert_tokens_to_ids(end))
    assert turn_end(tokenizer) == expected


def test_the_operators_template_counts(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(GEMMA)
    found = turn_end(tokenizer_with(CHATML), str(file))
    assert found is not None
    assert found[0] == "<end_of_turn>"


def test_the_tokenizers_end_is_one_of_them() -> None:
    tokenizer = tokenizer_with(CHATML, "<|im_end|>")
    assert end_tokens(tokenizer, (2, 5)) == {2, 5, tokenizer.eos_token_id}
    assert end_tokens(tokenizer_with(CHATML, None), ()) == frozenset()


def test_what_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    tokenizer = tokenizer_with(CHATML)
    right = tokenizer.convert_tokens_to_ids("<|im_end|>")
    warn_of_ends({2, right}, tokenizer)
    warn_of_ends({2}, tokenizer_with(None))
    assert caplog.messages == []
    warn_of_ends(set(), tokenizer)
    assert "no end-of-sequence token is known" in caplog.messages[-1]
    warn_of_ends({2}, tokenizer)
    assert f"turn with <|im_end|> (token {right}), which ends no answer" in caplog.messages[-1]


def test_tokenizers_that_cannot_be_read_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer_with(CHATML).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    fields = json.loads(file.read_text()) | {"eos_token": {"content": "</s>", "lstrip": False}}
    file.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="no usable tokenizer: Special token eos_token") as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # whether sentencepiece is installed or not
    with pytest.raises(CheckpointError, match=r"tokenizer\.model \(SentencePiece\) and no tokenizer\.json") as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)
