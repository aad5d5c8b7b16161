"""Forms tried on texts, with a tokenizer that has one token for each byte."""

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dspark_server.engine.grammar import CompiledForm, GrammarCompiler


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, then the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({text: number for number, text in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


TOKENIZER = byte_tokenizer()


def admits(form: CompiledForm, text: str) -> bool:
    """Whether the masks let the whole of a text through, and then an end."""
    matcher = form.start(frozenset({TOKENIZER.eos_token_id}))
    for token in [*TOKENIZER.encode(text), TOKENIZER.eos_token_id]:
        if not matcher.mask(())[token]:
            return False
        matcher.commit([token])
    return True


def admits_value(compiler: GrammarCompiler, schema: Any, value: Any, *, closed: bool = True) -> bool:
    """Whether a schema lets a value through, written without white space."""
    form = compiler.json_schema(json.dumps(schema), closed=closed)
    return admits(form, json.dumps(value, separators=(",", ":"), ensure_ascii=False))
