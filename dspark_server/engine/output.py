"""From tokens to text: incremental detokenization and stop strings.

`Detokenizer` is built once per tokenizer, `TextStream` once per choice. The law both keep: the concatenated pieces of a
stream equal the decode of all its tokens at once, whatever the chunking, and no piece ends inside a character.

ByteLevel tokenizers (SmolLM2, Llama 3, Qwen ...) have one fixed byte string per token, so a table and a UTF-8 decoder
are exact. All others decode a short window of tokens twice, as vLLM does, and print what the newest tokens added.
"""

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Any

REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LONGEST_WINDOW = 64  # tokens a window may hold back before it is printed as it stands


class TextStream:
    """Text of one choice, as its tokens arrive.

    stop: strings that end the choice. A text that may be the beginning of one is held back until that is settled. The
    match that completes first wins; of those completed by the same character, the longest.
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
        """Take the next tokens; the text that can be shown now. Tokens after the end are ignored."""
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
        """The output is complete: what was held back. An unfinished character becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        text = self._decoder.finish()
        if self._matcher is None:
            return text
        shown = self._match(text, self._matcher) if text else ""
        held, self._held = self._held, ""
        return shown + held

    def _match(self, text: str, matcher: "StopMatcher") -> str:
        """Feed decoded text to the matcher; the part of (held + text) that is settled."""
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

    A state is the longest suffix of the text that begins some stop string, which is just what must be held back.
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
        """Failure links breadth first, so that a state's own link is ready before its children's."""
        queue = list(self._next[0].values())
        for state in queue:
            for character, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], character)
                self.matches[child] = self.matches[child] or self.matches[self._fail[child]]
                queue.append(child)


class TokenDecoder:
    """Interface of the two decoders below: tokens in, whole characters out."""

    def push(self, tokens: Sequence[int]) -> str:
        """Text that the tokens complete."""
        raise NotImplementedError

    def finish(self) -> str:
        """Text of what is incomplete at the end."""
        raise NotImplementedError


class ByteTokenDecoder(TokenDecoder):
    """One byte string per token id, and UTF-8. Output bytes alone are decoded, so nothing of a prompt can leak in."""

    __slots__ = ("_decode", "_table")

    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        # Both this codec and Rust's from_utf8_lossy write one U+FFFD per maximal invalid subpart.
        self._decode: Callable[..., str] = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, tokens: Sequence[int]) -> str:
        """Text that the tokens complete."""
        table = self._table
        try:
            return self._decode(b"".join([table[token] for token in tokens]))
        except IndexError:  # a row of the padded embedding that no token uses
            return self._decode(b"".join([table[token] for token in tokens if token < len(table)]))

    def finish(self) -> str:
        """Text of what is incomplete at the end."""
        return self._decode(b"", True)


class WindowTokenDecoder(TokenDecoder):
    """Decodes the tokens shown last, and these with the new ones behind them; what the second has more is new.

    decode: Rust decoder, special tokens shown.   size: ids from here on do not exist.
    byte_tokens: ids spelled <0xXX>.   ignored: special ids, when they are to be skipped.   context: see below.

    The window opens with one ordinary token of the prompt, so that a SentencePiece space at the beginning of the output
    is kept; as it is neither special nor a byte, it cannot leak into the output. A run of byte tokens is held back
    until a token of another kind ends it, because its last byte decides how the decoder prints all of it.
    """

    __slots__ = ("_byte_tokens", "_decode", "_ignored", "_shown", "_size", "_window")

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        size: int,
        byte_tokens: frozenset[int],
        ignored: frozenset[int],
        context: list[int],
    ) -> None:
        self._decode = decode
        self._size = size
        self._byte_tokens = byte_tokens
        self._ignored = ignored
        self._window = context
        self._shown = len(context)

    def push(self, tokens: Sequence[int]) -> str:
        """Text that the tokens complete."""
        return "".join([self._push(token) for token in tokens])

    def _push(self, token: int) -> str:
        if token in self._ignored or token >= self._size:
            return ""  # the decoder does not see it either: a run of bytes goes on behind it
        self._window.append(token)
        if token in self._byte_tokens:
            return ""
        return self._advance(at_end=False)

    def finish(self) -> str:
        """Text of what is incomplete at the end."""
        return self._advance(at_end=True)

    def _advance(self, *, at_end: bool) -> str:
        window, shown = self._window, self._shown
        before = self._decode(window[:shown])
        after = self._decode(window)
        if not at_end:
            if len(after) <= len(before):  # no text of its own, e.g. a mark that joins the next token
                return ""
            if after.endswith(REPLACEMENT) and len(window) - shown < _LONGEST_WINDOW:
                return ""
        del window[:shown]
        self._shown = len(window)
        return after[len(before) :]


class Detokenizer:
    """Builds text streams for one tokenizer; safe to share, its tables never change.

    `tokenizer` is a transformers fast tokenizer. Its `clean_up_tokenization_spaces` is not applied: it rewrites text
    that has already been sent.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, content in added.items() if content.special)
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self._byte_tokens = frozenset(i for text, i in vocabulary.items() if _BYTE_TOKEN.fullmatch(text))
        self._size = max(vocabulary.values(), default=-1) + 1
        self.longest_token = max(map(len, vocabulary), default=1)  # characters; no token is made of more
        self._table = _byte_table(self._backend, vocabulary, self._size)
        if self._table is not None:
            self._table_without_special = list(self._table)
            for token in self._special:
                self._table_without_special[token] = b""

    @property
    def is_byte_level(self) -> bool:
        """Whether the fast exact path is in use."""
        return self._table is not None

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
        decoder = self._decoder(prompt, skip_special_tokens)
        return TextStream(decoder, matcher, min_tokens=min_tokens, include_stop=include_stop)

    def text_of(self, token: int) -> str:
        """Text of one token by itself; part of a character shows as U+FFFD."""
        if self._table is None:
            return self.decode([token], skip_special_tokens=False)
        return self._table[token].decode(errors="replace") if token < len(self._table) else ""

    def bytes_of(self, token: int) -> bytes:
        """Bytes of one token, also where they are only part of a character."""
        if self._table is None:
            return self.text_of(token).encode()
        return self._table[token] if token < len(self._table) else b""

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole token list, e.g. of a prompt given as ids."""
        return str(self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def _decoder(self, prompt: Sequence[int], skip_special_tokens: bool) -> TokenDecoder:
        if self._table is not None:
            return ByteTokenDecoder(self._table_without_special if skip_special_tokens else self._table)
        decode = self._backend.decode
        return WindowTokenDecoder(
            lambda tokens: decode(tokens, skip_special_tokens=False),
            size=self._size,
            byte_tokens=self._byte_tokens,
            ignored=self._special if skip_special_tokens else frozenset(),
            context=self._context(prompt),
        )

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last ordinary token, if there is one among its last few."""
        for token in reversed(prompt[-16:]):
            text = "" if token in self._byte_tokens else self.decode([token, token])  # special tokens give no text
            if text.strip() and REPLACEMENT not in text:
                return [token]
        return []


def _byte_table(backend: Any, vocabulary: dict[str, int], size: int) -> list[bytes] | None:
    """Bytes of every token id of a ByteLevel tokenizer; None when the tokenizer is of another kind."""
    if type(backend.decoder).__name__ != "ByteLevel":
        return None
    texts = backend.decode_batch([[token] for token in range(size)], skip_special_tokens=False)
    table = [text.encode() for text in texts]
    alphabet = _byte_alphabet()
    for text, token in vocabulary.items():
        if REPLACEMENT in texts[token]:  # part of a character: its bytes are spelled in the ByteLevel alphabet
            if all(character in alphabet for character in text):
                table[token] = bytes(alphabet[character] for character in text)
            else:
                table[token] = text.encode()
    return table


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable spelling of the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + offset): byte for offset, byte in enumerate(others)})
    return alphabet
