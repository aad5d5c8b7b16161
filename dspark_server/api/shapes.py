"""The JSON of each API's answers. The rest of a response (responses.py) is the same for completions and chat."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The names of an API's objects, and the JSON around a choice's text.

    In a chunk the text stands between `first` (in the first chunk of its choice) or `later`, and `after`; a choice that
    ends with no text left has `nothing` instead of `later` and the text.
    """

    name: str  # of a whole answer
    chunk_name: str
    whole: Callable[[str], dict[str, Any]]  # the text in a whole answer
    first: bytes
    later: bytes
    after: bytes
    nothing: bytes
    one_prompt: bool  # fields about the prompt stand beside the choices, not in each


COMPLETION = Shape(
    name="text_completion",
    chunk_name="text_completion",
    whole=lambda text: {"text": text},
    first=b'"text":',
    later=b'"text":',
    after=b"",
    nothing=b'"text":""',
    one_prompt=False,
)

CHAT = Shape(
    name="chat.completion",
    chunk_name="chat.completion.chunk",
    whole=lambda text: {"message": {"role": "assistant", "content": text}},
    first=b'"delta":{"role":"assistant","content":',
    later=b'"delta":{"content":',
    after=b"}",
    nothing=b'"delta":{',
    one_prompt=True,
)
