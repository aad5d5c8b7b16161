"""The tokens that end an answer: those of the tokenizer, config.json and generation_config.json together, as in vLLM.

A fine-tune often changes one of the three and forgets the others; an answer without any of them runs to max_tokens.
"""

import logging
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_ANSWER = "ANSWER-GOES-HERE"
_TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": "Hello"},
]


def end_tokens(tokenizer: Any, configured: Collection[int]) -> frozenset[int]:
    """Return the tokenizer's end token and those `configured` by the checkpoint. `tokenizer` None: there is none."""
    own = None if tokenizer is None else tokenizer.eos_token_id
    return frozenset(configured) | (frozenset() if own is None else {own})


def turn_end(tokenizer: Any, template_file: str | None = None) -> tuple[str, int] | None:
    """Return the special token that the chat template writes after an assistant's turn, and its id.

    The template in `template_file` replaces the tokenizer's own. None if there is no template, it cannot be rendered,
    or no special token stands there.
    """
    template = None
    if template_file is not None:
        with suppress(OSError, UnicodeDecodeError):  # the server reports it when it loads the template
            template = Path(template_file).read_text(encoding="utf-8")
    if template is None and tokenizer.chat_template is None:
        return None
    text = None
    for turns in (_TURNS, _TURNS[:2]):  # a template may refuse a conversation whose last turn is not the one it wants
        try:
            text = str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False))
            break
        except Exception:  # a template may raise anything
            continue
    _, found, behind = (text or "").partition(_ANSWER)
    behind = behind.lstrip()
    special = [token for token in tokenizer.get_added_vocab() if token and found and behind.startswith(token)]
    if not special:
        return None
    longest = max(special, key=len)
    return longest, tokenizer.get_added_vocab()[longest]


def warn_of_ends(ends: Collection[int], tokenizer: Any, template_file: str | None = None) -> None:
    """Log a warning if no token ends an answer, or if the chat template ends a turn with another token."""
    if not ends:
        logger.warning(
            "no end-of-sequence token is known: eos_token is absent from the tokenizer, eos_token_id from config.json "
            "and generation_config.json. Answers end at max_tokens unless requests give stop or stop_token_ids."
        )
        return
    last = turn_end(tokenizer, template_file)
    if last is not None and last[1] not in ends:
        logger.warning(
            "the chat template ends an assistant's turn with %s (token %d), which ends no answer here: add it to "
            "eos_token_id in generation_config.json, or to stop_token_ids of each request.",
            *last,
        )
