#!/usr/bin/env bash
# torch 2.13.0, c10d::allreduce_ (what dist.all_reduce calls): it writes its argument in place, but its schema says that
# it is not mutable, and annotates no argument as written.
#
# So a TorchDispatchMode (a recorder of graphs, a tracer, a dead-code remover) that tells operations with effects by
# `schema.is_mutable` takes it for a pure function, and may drop or reorder it. aten's in-place operations are marked.
#
# Seen: aten::add_.Tensor is_mutable True, alias_info.is_write of its first argument True; c10d::allreduce_ is_mutable
# False, no alias_info, although the sum of two ranks lands in the argument.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-compile torch==2.13.0 numpy
cat > "$folder/rank.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
seen = []


class Record(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema = func._schema
        writes = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        seen.append((schema.name, schema.is_mutable, writes))
        return func(*args, **(kwargs or {}))


x = torch.full((2,), float(rank + 1))
with Record():
    dist.all_reduce(x)
    x.add_(1.0)
if rank == 0:
    print(x.tolist(), seen)
assert x.tolist() == [4.0, 4.0], x
found = {name: (mutable, writes) for name, mutable, writes in seen}
assert found["c10d::allreduce_"] == (False, []), found
assert found["aten::add_"] == (True, ["self"]), found
dist.destroy_process_group()
PY
"$folder/venv/bin/python" "$folder/rank.py" 1 "$folder/store" & other=$!
"$folder/venv/bin/python" "$folder/rank.py" 0 "$folder/store"
wait "$other"
echo "unchanged"
