"""Incremental text against the offline decode: random tokens, random chunks, every kind of tokenizer."""

import codecs
import pathlib
import time
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from dspark_server.engine.output import Detokenizer, StopMatcher

SMOLLM2 = pathlib.Path("~/.cache/dspark-server/models/SmolLM2-135M-Instruct").expanduser()
CORPUS = ["the cat sat on the mat", "naïve café 🙂🙂 👩‍👩‍👧 日本語", "  indent\n\tcode(x)", "stop sto st s"]
property_test = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class Fast:
    """What Detokenizer needs of a transformers tokenizer."""

    backend_tokenizer: Tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|é start|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool call>", special=False), AddedToken("日本", special=False)])
    return tokenizer


def byte_fallback(decoder: decoders.Decoder) -> Tokenizer:
    words = ["▁", "▁the", "▁cat", "s", "at", "▁s", "to", "p", "é", "日", "▁▁", ".", "\ufffd"]
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + words
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


LLAMA_2 = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
METASPACE = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
BACKENDS = {
    "byte_level": byte_level(),
    "llama_2": byte_fallback(LLAMA_2),
    "metaspace": byte_fallback(METASPACE),
}
if (SMOLLM2 / "tokenizer.json").exists():
    BACKENDS["smollm2"] = Tokenizer.from_file(str(SMOLLM2 / "tokenizer.json"))
DETOKENIZERS = {name: Detokenizer(Fast(backend)) for name, backend in BACKENDS.items()}
every_tokenizer = pytest.mark.parametrize("name", BACKENDS)


def chunks(tokens: list[int], sizes: list[int]) -> list[list[int]]:
    """Cut a list in pieces of the given sizes (0 is an empty chunk), the rest one by one."""
    result, position = [], 0
    for size in sizes:
        result.append(tokens[position : position + size])
        position += size
    return result + [[token] for token in tokens[position:]]


def streamed(stream, pieces: list[list[int]]) -> str:
    return "".join([*(stream.push(piece) for piece in pieces), stream.finish()])


def token_lists(name: str, limit: int = 40) -> st.SearchStrategy[list[int]]:
    """Tokens of the whole vocabulary, with a preference for those that hold part of a character, and padding ids."""
    backend = BACKENDS[name]
    size = backend.get_vocab_size()
    partial = [token for token in range(size) if "\ufffd" in backend.decode([token], skip_special_tokens=False)]
    special = [token for token in range(size) if not backend.decode([token])][:20]
    one = st.one_of(st.integers(0, size + 3), st.sampled_from(partial), st.sampled_from(partial + special + [size]))
    return st.lists(one, max_size=limit)


def context_of(name: str, prompt: list[int]) -> list[int]:
    """The last token of the prompt that is neither special nor a byte."""
    backend = BACKENDS[name]
    for token in reversed(prompt[-16:]):
        piece = backend.id_to_token(token)
        text = backend.decode([token, token]) if piece is not None else ""
        if piece and not piece.startswith("<0x") and text.strip() and "\ufffd" not in text:
            return [token]
    return []


def offline(name: str, prompt: list[int], tokens: list[int], *, skip: bool) -> str:
    backend = BACKENDS[name]
    if DETOKENIZERS[name].is_byte_level:
        return backend.decode(tokens, skip_special_tokens=skip)
    context = context_of(name, prompt)
    before = backend.decode(context, skip_special_tokens=skip)
    return backend.decode(context + tokens, skip_special_tokens=skip)[len(before) :]


@every_tokenizer
def test_stream_equals_whole_decode(name: str) -> None:
    @property_test
    @given(token_lists(name), token_lists(name, 6), st.lists(st.integers(0, 5), max_size=12), st.booleans())
    def check(tokens: list[int], prompt: list[int], sizes: list[int], skip: bool) -> None:
        stream = DETOKENIZERS[name].stream(prompt, skip_special_tokens=skip)
        assert streamed(stream, chunks(tokens, sizes)) == offline(name, prompt, tokens, skip=skip)
        assert stream.consumed == len(tokens)

    check()


@property_test
@given(st.text(max_size=30), st.lists(st.integers(0, 4), max_size=10))
@example("👩‍👩‍👧🙂日本語é", [])
def test_any_text_comes_back_character_by_character(text: str, sizes: list[int]) -> None:
    """Valid text streams back as itself, and no piece is ever half a character."""
    for name in ("byte_level", "smollm2"):
        if name not in BACKENDS:
            continue
        tokens = BACKENDS[name].encode(text, add_special_tokens=False).ids
        known = BACKENDS[name].decode(tokens, skip_special_tokens=True)  # SmolLM2 lacks some bytes, e.g. F1
        assert known == text or name == "smollm2"
        stream = DETOKENIZERS[name].stream([])
        shown = ""
        for piece in chunks(tokens, sizes):
            shown += stream.push(piece)
            assert known.startswith(shown)
        assert shown == known
        assert stream.finish() == ""


def stable_length(name: str, tokens: list[int]) -> int:
    """Characters that are settled after these tokens (ByteLevel only)."""
    table = DETOKENIZERS[name]._table_without_special
    spelled = b"".join(table[token] for token in tokens if token < len(table))
    return len(codecs.utf_8_decode(spelled, "replace", False)[0])


def stop_oracle(
    name: str, tokens: list[int], stops: list[str], *, min_tokens: int, include: bool
) -> tuple[str, int, str | None]:
    """Shown text, tokens consumed and the stop string, by brute force over the whole text."""
    text = BACKENDS[name].decode(tokens)
    for end in range(1, len(text) + 1):
        found = max((stop for stop in stops if text[:end].endswith(stop)), key=len, default=None)
        if found is None:
            continue
        consumed = next((k for k in range(len(tokens)) if stable_length(name, tokens[:k]) >= end), len(tokens))
        if consumed > min_tokens:
            return text[: end if include else end - len(found)], consumed, found
    return text, len(tokens), None


@pytest.mark.parametrize("name", [name for name in ("byte_level", "smollm2") if name in BACKENDS])
def test_stop_strings_equal_brute_force(name: str) -> None:
    backend = BACKENDS[name]
    pieces = [
        backend.encode(text, add_special_tokens=False).ids for text in ["a", "b", "ab", "aba", "🙂", "é", "sto", "p"]
    ]
    half = pieces[4][:1]
    words = st.lists(st.sampled_from([*pieces, half]), max_size=14).map(lambda lists: [t for ids in lists for t in ids])
    stop = st.one_of(st.text("ab", min_size=1, max_size=5), st.sampled_from(["🙂", "é🙂", "stop", "bstop", "🙂🙂a"]))

    @property_test
    @given(
        words,
        st.lists(st.integers(0, 4), max_size=8),
        st.lists(stop, min_size=1, max_size=4),
        st.integers(0, 8),
        st.booleans(),
    )
    def check(tokens: list[int], sizes: list[int], stops: list[str], min_tokens: int, include: bool) -> None:
        stream = DETOKENIZERS[name].stream([], StopMatcher(stops), min_tokens=min_tokens, include_stop=include)
        text = streamed(stream, chunks(tokens, sizes))
        expected = stop_oracle(name, tokens, stops, min_tokens=min_tokens, include=include)
        assert (text, stream.consumed, stream.stopped) == expected

    check()


def test_text_before_a_stop_string_is_shown_as_soon_as_it_is_settled() -> None:
    backend = BACKENDS["byte_level"]
    stream = DETOKENIZERS["byte_level"].stream([], StopMatcher(["stop", "tall"]))
    letters = {letter: backend.encode(letter).ids for letter in "xstopal "}
    shown = [stream.push(letters[letter]) for letter in "xsstax"]
    assert shown == ["x", "", "s", "", "s", "tax"]  # "sta" frees the s: "ta" may still become "tall"
    assert [stream.push(letters[letter]) for letter in "stopx"] == ["", "", "", "", ""]
    assert stream.stopped == "stop"
    assert stream.consumed == 10
    assert stream.finish() == ""


@every_tokenizer
def test_a_prompt_that_ends_inside_a_character_does_not_leak(name: str) -> None:
    backend = BACKENDS[name]
    if name == "byte_level" or name == "smollm2":
        character = backend.encode("𓀀", add_special_tokens=False).ids
    else:
        character = [backend.token_to_id(f"<0x{byte:02X}>") for byte in "A𓀀".encode()]
    prompt, output = character[:-1], character[-1:]
    for length in range(len(prompt)):
        text = streamed(DETOKENIZERS[name].stream(prompt[: length + 1]), [output])
        assert text == backend.decode(output) == "\ufffd"


@pytest.mark.parametrize("name", ["llama_2", "metaspace"])
def test_the_prompt_keeps_the_space_of_the_first_word(name: str) -> None:
    backend = BACKENDS[name]
    the, cat = backend.token_to_id("▁the"), backend.token_to_id("▁cat")
    bos = backend.token_to_id("<s>")
    assert streamed(DETOKENIZERS[name].stream([bos, the]), [[cat]]) == " cat"
    assert streamed(DETOKENIZERS[name].stream([bos]), [[cat]]) == "cat"


@pytest.mark.parametrize("name", ["byte_level", "smollm2", "llama_2"])
def test_it_is_cheap(name: str) -> None:
    """A token of one of 32 streams has about 10 µs; generous bound for a busy machine."""
    if name not in BACKENDS:
        pytest.skip("needs the SmolLM2 tokenizer")
    the = BACKENDS[name].encode("▁the" if name == "llama_2" else "the cat").ids
    stream = DETOKENIZERS[name].stream([], StopMatcher(["\n\nUser:", "</s>"]))
    count = 2000
    best = min(_seconds(stream, the, count) for _ in range(3))
    assert best / (count * len(the)) < 40e-6


def _seconds(stream, tokens: list[int], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        stream.push(tokens)
    return time.perf_counter() - start
