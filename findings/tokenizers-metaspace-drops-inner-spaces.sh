#!/usr/bin/env bash
# tokenizers 0.23.3, decoders.Metaspace: of the first token of a text it drops every space mark, those within the token,
# too, not only the leading one. Behind another token the same token keeps them.
#
# A token "▁New▁York" (a word of Unigram trained without splitting, or a token that was added and that the normalizer of
# a SentencePiece model has spelled) reads "NewYork" at the start of a text and " New York" elsewhere. Whoever
# concatenates the texts of tokens, as streaming servers do, gets another text than decode() of the whole.
#
# Seen: decode(["▁New▁York"]) is "NewYork", decode(["▁to", "▁New▁York"]) "to New York"; with prepend_scheme "never" both
# keep all spaces.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PY'
from tokenizers import decoders

whole = {}
for scheme in ("always", "first", "never"):
    decoder = decoders.Metaspace(prepend_scheme=scheme)
    whole[scheme] = decoder.decode(["▁New▁York"]), decoder.decode(["▁to", "▁New▁York"])
    print(f"{scheme}: alone {whole[scheme][0]!r}, behind another {whole[scheme][1]!r}")
assert whole["always"] == whole["first"] == ("NewYork", "to New York")
assert whole["never"] == (" New York", " to New York")
PY
echo "unchanged"
