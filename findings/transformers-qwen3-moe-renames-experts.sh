#!/usr/bin/env bash
# transformers 5.23.0, Qwen3MoeConfig: it reads `num_experts`, the name in released Qwen3-MoE checkpoints, and writes
# `num_local_experts` in its place. Qwen2MoeConfig, of the same generation of models, reads and writes `num_experts`.
#
# So a Qwen3-MoE model that was loaded and saved again has a config.json without the field that its own release has: a
# loader that reads config.json by itself, and knows one name, takes the number for missing. It has to know both.
#
# Seen: {"num_experts": 16} in; out of to_dict() Qwen3 has num_local_experts 16 and no num_experts, Qwen2 num_experts 16
# and no num_local_experts; read back, both have .num_experts == 16.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-compile transformers==5.23.0
"$folder/venv/bin/python" - "$folder" <<'PY'
import json
import sys
from pathlib import Path

from transformers import Qwen2MoeConfig, Qwen3MoeConfig

found = {}
for cls in (Qwen3MoeConfig, Qwen2MoeConfig):
    where = Path(sys.argv[1]) / cls.__name__
    where.mkdir()
    config = cls.from_dict({"num_experts": 16, "num_hidden_layers": 2})
    config.save_pretrained(where)
    written = json.loads((where / "config.json").read_text())
    names = {name: written[name] for name in ("num_experts", "num_local_experts") if name in written}
    found[cls.__name__] = (names, cls.from_pretrained(where).num_experts)
print(found)
assert found["Qwen3MoeConfig"] == ({"num_local_experts": 16}, 16), found
assert found["Qwen2MoeConfig"] == ({"num_experts": 16}, 16), found
PY
echo "unchanged"
