"""Log-probabilities as the APIs show them: OpenAI's two forms, and vLLM's `prompt_logprobs`."""

from typing import Any

from dspark_server.api.chat_schema import ChatRequest
from dspark_server.api.generation import Choice
from dspark_server.api.schema import CompletionRequest, GenerationRequest
from dspark_server.engine.logprobs import TokenLogprob
from dspark_server.engine.output import Detokenizer, TokenDecoder

LOWEST = -9999.0  # JSON has no -inf


class Logprobs:
    """Renders the requested log-probabilities. `count`: alternatives per token of the answer, None if not requested."""

    def __init__(self, detokenizer: Detokenizer, body: GenerationRequest, count: int | None) -> None:
        self._detokenizer = detokenizer
        self._count = count
        self._prompt_count = body.prompt_logprobs
        self._as_ids = body.return_tokens_as_token_ids
        self._skip_special_tokens = body.skip_special_tokens
        self._scores: list[TokenLogprob | None] | None = None  # of the prompt rendered last; choices share them
        self._rendered: list[dict[str, Any] | None] = []

    def take(self, choice: Choice) -> dict[str, Any] | None:
        """Return the log-probabilities of the new tokens."""
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

    def take(self, choice: Choice) -> dict[str, Any] | None:
        """Return lists for the new tokens; an echoed prompt's tokens come with the first. None if not requested.

        `text_offset`: number of characters of the text before the one that the token begins or continues.
        """
        if self._count is None:
            return None
        rows: list[tuple[int, TokenLogprob | None]] = []
        if self._echo and choice.first and choice.prompt_logprobs is not None:
            rows = list(zip(choice.prompt, choice.prompt_logprobs, strict=True))
        rows += [(each.token, each) for each in choice.pending_logprobs]
        choice.pending_logprobs = []
        decoder = self._decoder(choice, echo=self._echo)
        tokens, values, tops, offsets = [], [], [], []
        for token, each in rows:
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

    def take(self, choice: Choice) -> dict[str, Any] | None:
        """Return entries of the new tokens. None if not requested."""
        if self._count is None:
            return None
        decoder, count = self._decoder(choice), self._count
        new, choice.pending_logprobs = choice.pending_logprobs, []
        content = []
        for each in new:
            top = [self._described(token, value, decoder) for token, value in each.top[:count]]
            content.append({**self._described(each.token, each.logprob, decoder), "top_logprobs": top})
            decoder.push((each.token,))
        return {"content": content}

    def _described(self, token: int, value: float, decoder: TokenDecoder) -> dict[str, Any]:
        """Return one entry. `bytes` are exact even for part of a character: those of all tokens are the text's."""
        piece = decoder.piece(token)
        return {"token": self._text(token, piece), "logprob": max(value, LOWEST), "bytes": list(piece)}
