#!/usr/bin/env bash
# torch 2.13.0, torch.ldexp: a mantissa that is broadcast against the exponents gives the right result and warns that
# "an output was resized", as if the caller had passed a wrong `out`. Exponents that are broadcast do not.
#
# ldexp(1, e - 127) is the exact way to turn the e8m0 scales of MX, fp8 and fp4 weights into numbers, with one mantissa
# for all scales: code that treats warnings as errors fails on it. A mantissa of the exponents' own shape does not warn.
#
# Seen: shapes () and (1,) and (2, 1) against exponents (2, 2) warn; (2, 2) against (2, 2) and against () do not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch

exponents = torch.tensor([[-1, 0], [1, 2]], dtype=torch.int32)
expected = torch.tensor([[0.5, 1.0], [2.0, 4.0]])


def warned(mantissa, exponent):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = torch.ldexp(mantissa, exponent)
    return result, any("was resized" in str(each.message) for each in seen)


for shape in ((), (1,), (2, 1), (2, 2)):
    result, complained = warned(torch.ones(shape), exponents)
    print(f"mantissa {shape} against exponents (2, 2): right {torch.equal(result, expected)}, warns {complained}")
    assert torch.equal(result, expected)
    assert complained == (shape != (2, 2))
result, complained = warned(torch.ones(2, 2), torch.tensor(1))
print(f"mantissa (2, 2) against one exponent: warns {complained}")
assert not complained
PY
echo "unchanged"
