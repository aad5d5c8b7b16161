"""Log-probabilities as the APIs show them: OpenAI's two forms, and vLLM's `prompt_logprobs`."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from dspark_server.api.chat_schema import ChatRequest
from dspark_server.api.generation import Choice
from dspark_server.api.schema import CompletionRequest, GenerationRequest
from dspark_server.engine.logprobs import TokenLogprob
from dspark_server.engine.output import Detokenizer, TokenDecoder

LOWEST = -9999.0  # JSON has no -inf


@dataclass(frozen=True)
class Taken:
    """New tokens of a choice and their scores, not rendered yet; `size`: number of scores."""

    choice: Choice
    size: int
    rows: Iterable[tuple[int, TokenLogprob | None]]


class Logprobs:
    """Renders the requested log-probabilities. `count`: alternatives per token of the answer, None if not requested.

    `take` runs on the event loop; the others may run on another thread, one call after the other.
    """

    def __init__(self, detokenizer: Detokenizer, body: GenerationRequest, count: int | None) -> None:
        self._detokenizer = detokenizer
        self._count = count
        self._prompt_count = body.prompt_logprobs
        self.width = 1 + max(count or 0, body.prompt_logprobs or 0)  # maximum number of scores for a token
        self._as_ids = body.return_tokens_as_token_ids
        self._skip_special_tokens = body.skip_special_tokens
        self._scores: list[TokenLogprob | None] | None = None  # of the prompt rendered last; choices share them
        self._rendered: list[dict[str, Any] | None] = []

    def take(self, choice: Choice) -> Taken | None:
        """Take the choice's new tokens. None if their log-probabilities were not requested."""
        if self._count is None:
            return None
        new, choice.pending_logprobs = choice.pending_logprobs, []
        return Taken(choice, self.width * len(new), ((each.token, each) for each in new))

    def render(self, taken: Taken) -> dict[str, Any]:
        """Return the log-probabilities of the taken tokens."""
        raise NotImplementedError

    def of_prompt(self, choice: Choice) -> list[dict[str, Any] | None] | None:
        """Return vLLM's list for the prompt: for every token its own entry and the likeliest ones, by token id."""
        if self._prompt_count is None or choice.prompt_logprobs is None:
            return None
        if self._scores is not choice.prompt_logprobs:
            self._scores, count = choice.prompt_logprobs, self._prompt_count
            self._rendered = [None if each is None else self._entries(each, count) for each in self._scores]
        return self._rendered

    def _entries(self, each: TokenLogprob, count: int) -> dict[str, Any]:
        ranked = [(each.token, each.logprob, each.rank)]
        ranked += [(token, value, rank) for rank, (token, value) in enumerate(each.top[:count], start=1)]
        return {
            str(token): {
                "logprob": max(value, LOWEST),
                "rank": rank,
                "decoded_token": self._detokenizer.text_of(token),
            }
            for token, value, rank in ranked
        }

    def _decoder(self, choice: Choice, *, echo: bool = False) -> TokenDecoder:
        """Return the decoder of the choice's tokens (and of an echoed prompt's), after those already taken."""
        if choice.decoder is None:
            before = [] if echo else choice.prompt
            choice.decoder = self._detokenizer.decoder(before, skip_special_tokens=self._skip_special_tokens)
        return choice.decoder

    def _text(self, token: int, piece: bytes) -> str:
        """Name of a token with these bytes: its text, with U+FFFD for part of a character."""
        return f"token_id:{token}" if self._as_ids else piece.decode(errors="replace")


class CompletionLogprobs(Logprobs):
    """Parallel lists, the form of completions."""

    def __init__(self, detokenizer: Detokenizer, body: CompletionRequest) -> None:
        super().__init__(detokenizer, body, body.logprobs)
        self._echo = body.echo

    def take(self, choice: Choice) -> Taken | None:
        """See `Logprobs.take`; an echoed prompt's tokens come with the first."""
        taken = super().take(choice)
        if taken is None or not self._echo or not choice.first or choice.prompt_logprobs is None:
            return taken
        prompt = zip(choice.prompt, choice.prompt_logprobs, strict=True)
        return Taken(choice, taken.size + self.width * len(choice.prompt), chain(prompt, taken.rows))

    def render(self, taken: Taken) -> dict[str, Any]:
        """Return parallel lists for the tokens.

        `text_offset`: number of characters of the text before the one that the token begins or continues.
        """
        assert self._count is not None, "only what was requested is taken"
        choice = taken.choice
        decoder = self._decoder(choice, echo=self._echo)
        tokens, values, tops, offsets = [], [], [], []
        for token, each in taken.rows:
            tokens.append(self._text(token, decoder.piece(token)))
            values.append(None if each is None else max(each.logprob, LOWEST))
            tops.append(None if each is None else self._top(each, self._count, decoder))
            offsets.append(choice.text_offset)
            choice.text_offset += len(decoder.push((token,)))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, each: TokenLogprob, count: int, decoder: TokenDecoder) -> dict[str, float]:
        """Return the token and the likeliest ones by text; of two with the same text, the likelier."""
        best: dict[str, float] = {}
        for token, value in [(each.token, each.logprob), *each.top[:count]]:
            text = self._text(token, decoder.piece(token))
            best[text] = max(value, best.get(text, LOWEST))
        return best


class ChatLogprobs(Logprobs):
    """One entry per token, the form of chat completions."""

    def __init__(self, detokenizer: Detokenizer, body: ChatRequest) -> None:
        super().__init__(detokenizer, body, body.wanted_logprobs)

    def render(self, taken: Taken) -> dict[str, Any]:
        """Return an entry for each of the tokens."""
        decoder, content = self._decoder(taken.choice), []
        for token, each in taken.rows:
            assert each is not None, "a chat echoes no prompt"
            top = [self._described(other, value, decoder) for other, value in each.top[: self._count]]
            content.append({**self._described(token, each.logprob, decoder), "top_logprobs": top})
            decoder.push((token,))
        return {"content": content}

    def _described(self, token: int, value: float, decoder: TokenDecoder) -> dict[str, Any]:
        """Return one entry. `bytes` are exact even for part of a character: those of all tokens are the text's."""
        piece = decoder.piece(token)
        return {"token": self._text(token, piece), "logprob": max(value, LOWEST), "bytes": list(piece)}
