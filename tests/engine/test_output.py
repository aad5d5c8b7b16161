"""Incremental text against the offline decode: random tokens, random chunks, every kind of tokenizer."""

import codecs
import pathlib
import time
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

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


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁the", "▁cat", "s", "at", "▁s", "to", "p", "é", "日", "▁▁", ".", "\ufffd", "▁\ufffd", "c", "t", "▁c"]
MERGES = [("a", "t"), ("c", "at"), ("▁", "cat"), ("▁", "s"), ("t", "o"), ("▁", "▁")]


def byte_fallback(decoder: decoders.Decoder) -> Tokenizer:
    """As SentencePiece's BPE in Llama 2 and Mistral."""
    words = [*WORDS, "a", "o", "cat"]
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", "<s>", "</s>", *BYTES, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool call>", special=False)])
    return tokenizer


def unigram() -> Tokenizer:
    """As SentencePiece's Unigram, with bytes for what it does not know."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((byte, -9.0) for byte in BYTES)]
    pieces += [(word, -2.0 - index / 9) for index, word in enumerate(WORDS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = METASPACE
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


LLAMA_2 = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
GEMMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
METASPACE = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
BACKENDS = {
    "byte_level": byte_level(),
    "llama_2": byte_fallback(LLAMA_2),
    "gemma": byte_fallback(GEMMA),
    "metaspace": byte_fallback(METASPACE),
    "unigram": unigram(),
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


def is_byte_level(name: str) -> bool:
    return type(BACKENDS[name].decoder).__name__ == "ByteLevel"


def offline(name: str, prompt: list[int], tokens: list[int], *, skip: bool) -> str:
    """Text of `tokens` behind a prompt, all at once. Invalid bytes of SentencePiece show as they do in ByteLevel."""
    backend = BACKENDS[name]
    if is_byte_level(name):
        return backend.decode(tokens, skip_special_tokens=skip)
    before = backend.decode(prompt, skip_special_tokens=skip)
    whole = backend.decode(prompt + tokens, skip_special_tokens=skip)
    if "\ufffd" not in before + whole:
        return whole.removeprefix(before)
    special = {token for token, content in backend.get_added_tokens_decoder().items() if content.special}
    shown = [token for token in tokens if backend.id_to_token(token) and not (skip and token in special)]
    entries = [backend.id_to_token(token) for token in shown]
    spelled = [bytes.fromhex(e[3:5]) if e in BYTES else e.replace("▁", " ").encode() for e in entries]
    seen = [token for token in prompt if backend.id_to_token(token) and not (skip and token in special)]
    if entries and not seen and entries[0] not in BYTES[128:]:
        spelled[0] = backend.decode(shown[:1], skip_special_tokens=False).encode()
    return b"".join(spelled).decode(errors="replace")


@every_tokenizer
def test_stream_equals_whole_decode(name: str) -> None:
    @property_test
    @given(token_lists(name), token_lists(name, 6), st.lists(st.integers(0, 5), max_size=12), st.booleans())
    @example([279], [], [], False)  # "▁<tool▁call>", added to those of SentencePiece
    @example([279, 131], [], [], False)
    def check(tokens: list[int], prompt: list[int], sizes: list[int], skip: bool) -> None:
        stream = DETOKENIZERS[name].stream(prompt, skip_special_tokens=skip)
        assert streamed(stream, chunks(tokens, sizes)) == offline(name, prompt, tokens, skip=skip)
        assert stream.consumed == len(tokens)

    check()


TEXTS = st.one_of(st.text(max_size=30), st.text(" acehost.é日🙂\ufffd", max_size=30))


@property_test
@given(TEXTS, st.lists(st.integers(0, 4), max_size=10))
@example("👩‍👩‍👧🙂日本語é", [])
@example("  the cats", [])
def test_any_text_comes_back_character_by_character(text: str, sizes: list[int]) -> None:
    """Valid text streams back as itself, and no piece is ever half a character."""
    for name, backend in BACKENDS.items():
        tokens = backend.encode(text, add_special_tokens=False).ids
        known = backend.decode(tokens, skip_special_tokens=True)  # SmolLM2 lacks some bytes, e.g. F1
        assert known == text or name not in ("byte_level", "llama_2")
        stream = DETOKENIZERS[name].stream([])
        shown = ""
        for piece in chunks(tokens, sizes):
            shown += stream.push(piece)
            assert known.startswith(shown)
        assert shown == known
        assert stream.finish() == ""


@property_test
@given(TEXTS, TEXTS)
@example("say", " the 🙂 cat")
@example("", " the 🙂 cat")
def test_the_bytes_of_tokens_add_up_to_the_text(prompt: str, text: str) -> None:
    """Of the tokens of an answer, and of a prompt's from its beginning: log-probabilities show both."""
    for name, backend in BACKENDS.items():
        before = backend.encode(prompt, add_special_tokens=False).ids
        tokens = backend.encode(text, add_special_tokens=False).ids
        for start, following in ((before, tokens), ([], before + tokens)):
            decoder = DETOKENIZERS[name].decoder(start)
            spelled, shown = b"", ""
            for token in following:
                spelled += decoder.piece(token)
                shown += decoder.push([token])
            assert spelled.decode(errors="replace") == shown + decoder.finish()
            assert shown == backend.decode(start + following).removeprefix(backend.decode(start))


@pytest.mark.parametrize("name", ["llama_2", "gemma", "metaspace", "unigram"])
def test_bytes_are_the_vocabularys(name: str) -> None:
    """Decoded alone, these tokens lose their space or become U+FFFD."""
    for entry, spelled in {"▁the": b" the", "<0xE2>": b"\xe2", "▁▁": b"  ", "▁\ufffd": " \ufffd".encode()}.items():
        assert DETOKENIZERS[name].bytes_of(BACKENDS[name].token_to_id(entry)) == spelled
    assert DETOKENIZERS[name].text_of(BACKENDS[name].token_to_id("<0xE2>")) == "\ufffd"
    assert DETOKENIZERS[name].bytes_of(BACKENDS[name].token_to_id("</s>")) == b"</s>"


@pytest.mark.parametrize("name", ["llama_2", "gemma", "metaspace", "unigram"])
def test_a_character_is_shown_with_its_last_byte(name: str) -> None:
    backend = BACKENDS[name]
    tokens = backend.encode("🙂🙂", add_special_tokens=False).ids[-8:]
    stream = DETOKENIZERS[name].stream(tokens, StopMatcher(["🙂🙂"]))
    assert [stream.push([token]) for token in tokens[4:]] == ["", "", "", ""]  # held back: a stop may begin
    stream = DETOKENIZERS[name].stream(tokens)
    assert [stream.push([token]) for token in tokens[4:]] == ["", "", "", "🙂"]


def stable_length(name: str, tokens: list[int]) -> int:
    """Characters that are settled after these tokens (ByteLevel only)."""
    hidden = DETOKENIZERS[name]._special
    spelled = b"".join(DETOKENIZERS[name].bytes_of(token) for token in tokens if token not in hidden)
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
    if is_byte_level(name):
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
    letter, bos = backend.token_to_id("<0x41>"), backend.token_to_id("<s>")
    assert streamed(DETOKENIZERS[name].stream([bos, the]), [[cat]]) == " cat"
    assert streamed(DETOKENIZERS[name].stream([letter]), [[cat]]) == " cat"
    assert streamed(DETOKENIZERS[name].stream([bos]), [[cat]]) == "cat"
    assert streamed(DETOKENIZERS[name].stream([bos], skip_special_tokens=False), [[cat]]) == " cat"  # behind "<s>"


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
