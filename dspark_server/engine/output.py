"""From tokens to text: incremental detokenization and stop strings.

`Detokenizer` is built once per tokenizer, `TextStream` once per choice. Invariant of both: the concatenated pieces of a
stream are all its tokens' bytes decoded as UTF-8, whatever the chunking, and no piece ends inside a character. If these
bytes are valid, that is the tokenizer's own decode of all tokens at once.
"""

import codecs
import re
from collections.abc import Callable, Container, Sequence
from operator import itemgetter
from typing import Any

REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextStream:
    """Text of one choice, as its tokens arrive.

    matcher: the strings that end the choice. Text that may be the beginning of one is held back until this is decided.
    The match that completes first wins; of those completed by the same character, the longest.
    min_tokens: a stop string counts only if a later token than this one completes it.
    """

    __slots__ = ("_decoder", "_held", "_include_stop", "_matcher", "_min_tokens", "_state", "consumed", "stopped")

    def __init__(
        self,
        decoder: "TokenDecoder",
        matcher: "StopMatcher | None" = None,
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        self._decoder = decoder
        self._matcher = matcher
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._state = 0
        self._held = ""  # decoded, and possibly the beginning of a stop string
        self.consumed = 0  # tokens taken, up to and including the one that completed the stop string
        self.stopped: str | None = None  # the stop string that ended the choice

    def push(self, tokens: Sequence[int]) -> str:
        """Take the next tokens; gives the text that can be shown now. Tokens after the end are ignored."""
        if self._matcher is None:
            self.consumed += len(tokens)
            return self._decoder.push(tokens)
        pieces = []
        for token in tokens:
            if self.stopped is not None:
                break
            self.consumed += 1
            text = self._decoder.push((token,))
            if text:
                pieces.append(self._match(text, self._matcher))
        return "".join(pieces)

    def finish(self) -> str:
        """End the output; gives the text held back. An unfinished character becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        text = self._decoder.finish()
        if self._matcher is None:
            return text
        shown = self._match(text, self._matcher) if text else ""
        held, self._held = self._held, ""
        return shown + held

    def _match(self, text: str, matcher: "StopMatcher") -> str:
        """Feed decoded text to the matcher; gives the part of (held + text) that can be shown."""
        length = len(self._held)
        self._held += text
        state = self._state
        counts = self.consumed > self._min_tokens
        for position, character in enumerate(text, start=length + 1):
            state = matcher.step(state, character)
            if counts and (found := matcher.matches[state]) is not None:
                self.stopped = found
                shown = self._held[: position if self._include_stop else position - len(found)]
                self._held = ""
                return shown
        self._state = state
        settled = len(self._held) - matcher.depths[state]
        shown, self._held = self._held[:settled], self._held[settled:]
        return shown


class StopMatcher:
    """All stop strings in one Aho-Corasick automaton: one dictionary look-up a character, however many strings.

    A state is the longest suffix of the text that begins some stop string: exactly the text to hold back.
    `depths[state]` is its length, `matches[state]` the longest stop string that ends there.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self.depths = [0]
        self.matches: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self._link()

    def step(self, state: int, character: str) -> int:
        """State after one more character."""
        following = self._next
        while (target := following[state].get(character)) is None:
            if state == 0:
                return 0
            state = self._fail[state]
        return target

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self.depths.append(self.depths[state] + 1)
                self.matches.append(None)
            state = self._next[state][character]
        self.matches[state] = stop

    def _link(self) -> None:
        """Set failure links breadth first, so that a state's own link is ready before its children's."""
        queue = list(self._next[0].values())
        for state in queue:
            for character, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], character)
                self.matches[child] = self.matches[child] or self.matches[self._fail[child]]
                queue.append(child)


class TokenDecoder:
    """Text of tokens that arrive one after the other: every token has fixed bytes, the text is the UTF-8 of them all.

    pieces: bytes of each token id. hidden: ids that the text leaves out. opening: bytes of a token that begins the
    text, where SentencePiece drops a space; None if other text precedes it.
    """

    __slots__ = ("_decode", "_hidden", "_opening", "_pieces")

    def __init__(
        self, pieces: list[bytes], *, hidden: frozenset[int], opening: Callable[[int], bytes] | None = None
    ) -> None:
        self._pieces = pieces
        self._hidden = hidden
        self._opening = opening
        # Like Rust's from_utf8_lossy, this codec writes one U+FFFD per maximal invalid subpart.
        self._decode: Callable[..., str] = codecs.getincrementaldecoder("utf-8")("replace").decode

    def piece(self, token: int) -> bytes:
        """Bytes of `token` if it comes next, also of a hidden one."""
        if self._opening is not None:
            return self._opening(token)
        return self._pieces[token] if token < len(self._pieces) else b""

    def push(self, tokens: Sequence[int]) -> str:
        """Characters that the tokens complete."""
        if self._opening is None:
            pieces, hidden = self._pieces, self._hidden
            try:
                return self._decode(b"".join([pieces[token] for token in tokens if token not in hidden]))
            except IndexError:  # a row of the padded embedding that no token uses
                pass
        return self._decode(b"".join([self._take(token) for token in tokens]))

    def finish(self) -> str:
        """Rest of the text: U+FFFD if it ends inside a character, else nothing."""
        return self._decode(b"", True)

    def _take(self, token: int) -> bytes:
        if token in self._hidden or token >= len(self._pieces):
            return b""
        piece, self._opening = self.piece(token), None
        return piece


class Detokenizer:
    """Bytes of tokens, decoders and text streams of one tokenizer; safe to share, its table never changes.

    `tokenizer` is a transformers fast tokenizer, ByteLevel (SmolLM2, Llama 3, Qwen ...) or SentencePiece (Llama 2,
    Mistral, Gemma ...). Its `clean_up_tokenization_spaces` is not applied: it rewrites text that has already been sent.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, content in added.items() if content.special)
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.longest_token = max(map(len, vocabulary), default=1)  # maximum number of characters
        self._pieces = _pieces(self._backend, vocabulary, added)

    def stream(
        self,
        prompt: Sequence[int],
        matcher: StopMatcher | None = None,
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> TextStream:
        """A text stream for one choice that continues `prompt` (token ids)."""
        decoder = self.decoder(prompt, skip_special_tokens=skip_special_tokens)
        return TextStream(decoder, matcher, min_tokens=min_tokens, include_stop=include_stop)

    def decoder(self, before: Sequence[int] = (), *, skip_special_tokens: bool = True) -> TokenDecoder:
        """A decoder of the tokens that follow `before` (token ids)."""
        hidden: frozenset[int] = self._special if skip_special_tokens else frozenset()
        opens = all(token in hidden or token >= len(self._pieces) for token in before)
        return TokenDecoder(self._pieces, hidden=hidden, opening=self._opening if opens else None)

    def text_of(self, token: int) -> str:
        """Text of one token inside a text; part of a character shows as U+FFFD."""
        return self.bytes_of(token).decode(errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """Bytes of one token inside a text, also where they are only part of a character."""
        return self._pieces[token] if token < len(self._pieces) else b""

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole token list, e.g. of a prompt given as ids."""
        decoder = self.decoder(skip_special_tokens=skip_special_tokens)
        return decoder.push(tokens) + decoder.finish()

    def _opening(self, token: int) -> bytes:
        """Bytes of a token that begins a text: without spaces, if the decoder drops them.

        Metaspace drops all of the first token's, those within it, too; tokens that were added can have some.
        """
        piece, alone = self.bytes_of(token), self._backend.decode([token], skip_special_tokens=False)
        part_of_character = REPLACEMENT in alone and not piece.endswith(alone.encode())
        return piece if part_of_character else alone.encode()


def _pieces(backend: Any, vocabulary: dict[str, int], added: Container[int]) -> list[bytes]:
    """Bytes of every token id inside a text: the decoder's output for it after an ordinary token.

    If that is not a whole character, the vocabulary's entry gives the bytes: <0xE2>, or in ByteLevel's alphabet.
    """
    before = _ordinary(backend, vocabulary, added)
    prefix = backend.decode(before)
    size = max(vocabulary.values(), default=-1) + 1
    texts = backend.decode_batch([[*before, token] for token in range(size)], skip_special_tokens=False)
    pieces = [text.removeprefix(prefix).encode() for text in texts]
    alphabet = _byte_alphabet()
    for entry, token in vocabulary.items():
        if REPLACEMENT not in texts[token] or REPLACEMENT in entry:
            continue
        if byte := _BYTE_TOKEN.fullmatch(entry):
            pieces[token] = bytes.fromhex(byte[1])
        elif all(letter in alphabet for letter in entry):
            pieces[token] = bytes(alphabet[letter] for letter in entry)
    return pieces


def _ordinary(backend: Any, vocabulary: dict[str, int], added: Container[int]) -> list[int]:
    """The first ordinary token with visible text, as a list; [] if there is none."""
    for entry, token in sorted(vocabulary.items(), key=itemgetter(1)):
        text = "" if token in added or _BYTE_TOKEN.fullmatch(entry) else backend.decode([token])
        if text.strip() and REPLACEMENT not in text:
            return [token]
    return []


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable spelling of the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + offset): byte for offset, byte in enumerate(others)})
    return alphabet
