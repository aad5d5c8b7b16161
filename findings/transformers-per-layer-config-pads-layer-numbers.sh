#!/usr/bin/env bash
# transformers 5.23.0, per_layer_config (Gemma4 and other models whose layers differ): the keys of config.json are layer
# numbers padded with zeros to the width of the largest key. The same layer 5 is "5" in a model of 8 layers and "05" in
# one of 12.
#
# So a reader that looks for str(5) finds the overrides of a small model, and none of those below layer 10 in a large one:
# no key is missing, the layer silently gets the model's own head size, and the weights then have the wrong shape. Keys
# have to be compared as numbers.
#
# Seen (full layers at every sixth place): 8 layers {"5", "7"}, 12 layers {"05", "11"}; read back, both have head_dim 32
# in layer 5.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-compile transformers==5.23.0
"$folder/venv/bin/python" - "$folder" <<'PY'
import json
import sys
from pathlib import Path

from transformers import Gemma4UnifiedTextConfig

found = {}
for layers in (8, 12):
    full = {5, layers - 1}
    types = ["full_attention" if index in full else "sliding_attention" for index in range(layers)]
    config = Gemma4UnifiedTextConfig(num_hidden_layers=layers, layer_types=types, head_dim=16, global_head_dim=32)
    where = Path(sys.argv[1]) / str(layers)
    config.save_pretrained(where)
    keys = sorted(json.loads((where / "config.json").read_text())["per_layer_config"])
    found[layers] = keys, Gemma4UnifiedTextConfig.from_pretrained(where).per_layer_config[5].head_dim
print(found)
assert found == {8: (["5", "7"], 32), 12: (["05", "11"], 32)}, found
PY
echo "unchanged"
