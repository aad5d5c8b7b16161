#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0, AutoTokenizer.from_pretrained of a directory with a Llama config.json: to read a
# tokenizer it imports torch's compiler (torch._dynamo), sympy and torch.distributed.tensor, some hundreds of modules and
# seconds of processor time, by way of the model's configuration class. tokenizer_config.json names the tokenizer's class,
# so that the configuration's class decides nothing.
#
# With `config=PreTrainedConfig.from_dict(...)`, the same fields under the base class, the same tokenizer comes back and
# none of the three is imported.
#
# Seen: plain call: torch._dynamo, sympy, torch.distributed.tensor imported; with the base class: none; same class, same
# token ids.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-compile torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-compile transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

directory, way = Path(sys.argv[1]), sys.argv[2]
if way == "write":
    vocabulary = {"<unk>": 0, "a": 1, "b": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)
    fields = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(fields | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 3}))
    sys.exit()
config = None
if way == "base":
    config = PreTrainedConfig.from_dict(json.loads((directory / "config.json").read_text()))
tokenizer = AutoTokenizer.from_pretrained(directory, config=config)
heavy = [name for name in ("torch._dynamo", "sympy", "torch.distributed.tensor") if name in sys.modules]
print(json.dumps([type(tokenizer).__name__, tokenizer("a b c").input_ids, heavy]))
PY
mkdir "$folder/model"
cd "$folder"
"$folder/venv/bin/python" look.py model write
plain=$("$folder/venv/bin/python" look.py model plain)
base=$("$folder/venv/bin/python" look.py model base)
echo "AutoTokenizer alone: $plain"
echo "with the base configuration class: $base"
"$folder/venv/bin/python" - "$plain" "$base" <<'PY'
import json
import sys

plain, base = map(json.loads, sys.argv[1:])
assert plain[:2] == base[:2], (plain, base)
assert plain[2] == ["torch._dynamo", "sympy", "torch.distributed.tensor"], plain
assert base[2] == [], base
PY
echo "unchanged"
