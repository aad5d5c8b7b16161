#!/usr/bin/env bash
# tokenizers 0.23.3, decoder ByteFallback (Llama 2, Mistral 7B, Gemma): one byte token that is no UTF-8 turns the whole
# run of byte tokens around it into U+FFFD, valid characters included. A UTF-8 decoder replaces the bad byte alone.
#
# So text that is decoded token by token, or in windows, cannot be compared with one call of decode() where a model
# emits byte tokens: one more token can take back characters that were valid before it came.
#
# Seen: 'aé' (two byte tokens for é) decodes to 'aé'; with a third byte token <0xFF> behind them to 'a\ufffd\ufffd\ufffd'.
# Python's own decoder gives 'aé\ufffd' for the same bytes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PY'
from tokenizers import Tokenizer, decoders, models

vocabulary = {"<unk>": 0, "a": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
byte = lambda value: 2 + value
whole = tokenizer.decode([1, byte(0xC3), byte(0xA9)])
broken = tokenizer.decode([1, byte(0xC3), byte(0xA9), byte(0xFF)])
plain = bytes([0x61, 0xC3, 0xA9, 0xFF]).decode("utf-8", "replace")
print(f"valid: {whole!r}; one bad byte behind it: {broken!r}; bytes.decode: {plain!r}")
assert whole == "a\u00e9", whole
assert broken == "a\ufffd\ufffd\ufffd", broken
assert plain == "a\u00e9\ufffd", plain
PY
echo "unchanged"
