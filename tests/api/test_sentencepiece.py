"""Log-probabilities of a tokenizer in the manner of Llama 2: words carry their space, other characters are byte tokens.

Decoded alone such tokens lose the space or become U+FFFD; the bytes are those of the vocabulary's entries.
"""

from collections.abc import Iterator

import pytest

from dspark_server.api import ServerSettings

from .fake_engine import EOS, FakeEngine, build_sentencepiece
from .support import Running, start
from .test_chat import stream as chat_stream
from .test_completions import stream, text_of

TEXT = "the cats sat  é🙂"
SAYS = " the cats sat  é🙂"  # the prompt's last word stands before it


@pytest.fixture(scope="module")
def llama() -> Iterator[Running]:
    yield from start(ServerSettings(port=0), FakeEngine(tokenizer=build_sentencepiece()))


@pytest.mark.parametrize("streaming", [False, True])
def test_bytes_add_up_to_the_text(llama: Running, streaming: bool) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 40, "return_token_ids": True}
    if streaming:
        choices = [chunk["choices"][0] for chunk in chat_stream(llama, f"say {TEXT}", **fields)]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        entries = [entry for choice in choices for entry in choice["logprobs"]["content"]]
    else:
        choice = llama.chat(f"say {TEXT}", **fields).json()["choices"][0]
        text, entries = choice["message"]["content"], choice["logprobs"]["content"]
        assert choice["token_ids"][-1] == EOS
    assert text == SAYS
    assert b"".join(bytes(entry["bytes"]) for entry in entries[:-1]) == SAYS.encode()
    assert [entry["token"] for entry in entries[:3]] == [" the", " cat", "s"]
    assert [(entry["token"], entry["bytes"]) for entry in entries[-5:-1]] == [("\ufffd", [b]) for b in "🙂".encode()]
    assert (entries[-1]["token"], bytes(entries[-1]["bytes"])) == ("</s>", b"</s>")
    assert entries[0]["top_logprobs"][1]["bytes"] == [0]  # the alternative is token 0, <0x00>


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_offsets_point_into_the_text(llama: Running, streaming: bool, echo: bool) -> None:
    fields = {"logprobs": 1, "echo": echo, "max_tokens": 40}
    if streaming:
        chunks = stream(llama, f"say {TEXT}", **fields)
        text, parts = text_of(chunks), [chunk["choices"][0]["logprobs"] for chunk in chunks]
        tokens, offsets = ([each for part in parts for each in part[name]] for name in ("tokens", "text_offset"))
    else:
        choice = llama.complete(f"say {TEXT}", **fields).json()["choices"][0]
        text, tokens, offsets = choice["text"], choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert text == (f"say {TEXT}{SAYS}" if echo else SAYS)
    assert tokens[0] == ("<s>" if echo else " the")
    for token, offset in zip(tokens, offsets, strict=True):
        if token in ("<s>", "</s>"):
            assert offset in (0, len(text))  # not in the text
        elif "\ufffd" in token:
            assert text[offset] in "é🙂"
        else:
            assert text[offset:].startswith(token)
    assert offsets == sorted(offsets)
    assert "".join(token for token in tokens if token[0] not in "<\ufffd") == text.replace("é🙂", "")


def test_offsets_do_not_depend_on_what_tokens_are_called(llama: Running) -> None:
    fields = {"logprobs": 0, "echo": True}
    plain = llama.complete(f"say {TEXT}", **fields).json()["choices"][0]["logprobs"]
    named = llama.complete(f"say {TEXT}", return_tokens_as_token_ids=True, **fields).json()["choices"][0]["logprobs"]
    assert named["tokens"][0].startswith("token_id:")
    assert named["text_offset"] == plain["text_offset"]


def test_shown_special_tokens_are_in_the_text(llama: Running) -> None:
    choice = llama.chat("say the", ignore_eos=True, skip_special_tokens=False, logprobs=True).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert choice["message"]["content"] == " the</s>"
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == b" the</s>"


def test_a_stop_string_in_byte_tokens(llama: Running) -> None:
    choice = llama.complete(f"say {TEXT} and more", stop="🙂").json()["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == (SAYS[:-1], "🙂")


def test_a_stop_string_does_not_begin_in_an_echoed_prompt(llama: Running) -> None:
    choice = llama.complete("say the", stop=["say the the"], echo=True).json()["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == ("say the the", None)
