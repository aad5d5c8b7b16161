"""Triton's norms, rotary embedding, SiLU * mul, argmax and products against the plain ones."""

import importlib
import sys

import dspark_kernels
import pytest
import torch
from dspark_kernels import KernelBuildError, load
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_server.models.layers.moe import numbered
from tests.kernels.support import close, mixture, triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

TRITON, REFERENCE = triton_kernels(), load("reference")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 4), features=st.sampled_from([1, 37, 576, 1025]), dtype=DTYPES)
def test_norms_and_silu(rows: int, features: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows * features)
    x, residual = (torch.randn(rows, features + 8).to(dtype)[:, :features] for _ in range(2))  # strided rows
    weight = torch.randn(features).to(dtype)
    close(TRITON.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    ours, theirs = residual.clone(), residual.clone()
    close(TRITON.add_rms_norm(x, ours, weight, 1e-5), REFERENCE.add_rms_norm(x, theirs, weight, 1e-5))
    close(ours, theirs)
    gate_up = torch.randn(rows, 2 * features + 8).to(dtype)[:, : 2 * features] * 4
    close(TRITON.silu_mul(gate_up), REFERENCE.silu_mul(gate_up))
    close(TRITON.gelu_tanh_mul(gate_up), REFERENCE.gelu_tanh_mul(gate_up))
    for scale in (1.0, 0.37):
        ours, theirs = residual.clone(), residual.clone()
        TRITON.norm_add(x, ours, weight, 1e-5, scale)
        REFERENCE.norm_add(x, theirs, weight, 1e-5, scale)
        close(ours, theirs)


def test_the_residual_is_normalised_as_it_is_stored() -> None:
    """The norm reads the rounded sum, so that layers see the residual they will read."""
    x, residual, weight = torch.full((1, 4), 2.0**-12), torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(4)
    stored = residual.half()
    close(TRITON.add_rms_norm(x.half(), stored, weight.half(), 1e-6), TRITON.rms_norm(stored, weight.half(), 1e-6))
    assert torch.equal(stored, residual.half())


@settings(max_examples=12, deadline=None)
@given(
    heads=st.sampled_from([0, 1, 6]), kv_heads=st.sampled_from([1, 3]), size=st.sampled_from([16, 96]),
    normed=st.booleans(), dtype=DTYPES,
)  # fmt: skip
def test_rotary_and_kv_write(heads: int, kv_heads: int, size: int, normed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(heads)
    rows, width = 5, (heads + 2 * kv_heads) * size
    wide = torch.randn(rows, width + 24).to(dtype)
    positions, slots = torch.randint(0, 50, (rows,), dtype=torch.int32), torch.randperm(20)[:rows].int()
    cos_sin = torch.randn(50, size)
    q_norm, k_norm = (torch.randn(size).to(dtype) if normed else None for _ in range(2))
    results = []
    for kernels in (TRITON, REFERENCE):
        qkv = wide.clone()[:, :width]  # strided rows
        keys, values = torch.zeros(4, 2, 5, kv_heads, size, dtype=dtype).unbind(1)
        kernels.rotary_kv_write(qkv, positions, cos_sin, slots, keys, values, heads, q_norm, k_norm, 1e-6)
        results.append((qkv[:, : heads * size].contiguous(), keys, values))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("size", "heads", "dtype"), [(16, 3, torch.bfloat16), (48, 0, torch.float32)])
def test_values_that_are_normalised_or_are_the_keys(size: int, heads: int, dtype: torch.dtype, shared: bool) -> None:
    kv_heads, rows = 2, 3
    qkv = torch.randn(rows, (heads + (1 if shared else 2) * kv_heads) * size).to(dtype)
    positions, slots = torch.randint(0, 50, (rows,), dtype=torch.int32), torch.randperm(20)[:rows].int()
    cos_sin, norm = torch.randn(50, size), torch.randn(size).to(dtype)
    for value_norm in (False, True):
        results = []
        for kernels in (TRITON, REFERENCE):
            own = qkv.clone()
            keys, values = torch.zeros(4, 2, 5, kv_heads, size, dtype=dtype).unbind(1)
            kernels.rotary_kv_write(own, positions, cos_sin, slots, keys, values, heads, norm, norm, 1e-6, value_norm)
            results.append((own[:, : heads * size].contiguous(), keys, values))
        for ours, theirs in zip(*results, strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "experts", "each", "hidden", "features"), [(1, 8, 2, 64, 96), (7, 4, 3, 80, 40), (40, 3, 2, 37, 33)]
)
def test_experts(tokens: int, experts: int, each: int, hidden: int, features: int, dtype: torch.dtype) -> None:
    case = mixture(tokens, experts, each, hidden, features, dtype)
    together = case.run(TRITON)
    close(together, case.run(REFERENCE))
    close(case.run(TRITON, 0.4), case.run(REFERENCE, 0.4))
    packed = case.packed(TRITON)
    one = slice(tokens // 2, tokens // 2 + 1)
    close(TRITON.experts(case.x[one], packed, case.chosen[one], case.shares[one]), together[one])
    first = experts // 2  # the others are another rank's
    packed, theirs = case.packed(TRITON, first), case.packed(REFERENCE, first)
    own = numbered(case.chosen, range(first, experts))
    close(TRITON.experts(case.x, packed, own, case.shares), REFERENCE.experts(case.x, theirs, own, case.shares))


def test_a_negative_slot_is_not_written() -> None:
    keys, values = torch.zeros(2, 2, 2, 1, 16)
    slots = torch.tensor([-1, 2], dtype=torch.int32)
    TRITON.rotary_kv_write(torch.ones(2, 32), slots * 0, torch.ones(1, 16), slots, keys, values, 0)
    assert [keys.any(3).flatten().tolist(), values.any(3).flatten().tolist()] == [[False, False, True, False]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_takes_the_lowest_of_equals_and_a_nan_wins(dtype: torch.dtype) -> None:
    logits = torch.randint(-9, 0, (7, 8192 + 1003)).to(dtype)
    logits[1, [8000, 9000]] = 3.0
    logits[2], logits[2, 9100] = -torch.inf, -1e30
    logits[3, [500, 9000]] = torch.nan
    logits[4], logits[4, 3] = -torch.inf, torch.nan
    logits[5] = -torch.inf
    logits[6, [77, 200]] = torch.tensor([-0.0, 0.0]).to(dtype)
    assert torch.equal(TRITON.argmax(logits), REFERENCE.argmax(logits))
    assert TRITON.argmax(logits)[1:].tolist() == [8000, 9100, 500, 3, 0, 77]
    assert TRITON.argmax(logits[:0, :5]).tolist() == []


def test_linear() -> None:
    weight, bias, x = torch.randn(37, 51).bfloat16(), torch.randn(37).bfloat16(), torch.randn(5, 51).bfloat16()
    for given_bias in (bias, None):
        packed, plain = TRITON.pack_linear(weight, given_bias), REFERENCE.pack_linear(weight, given_bias)
        for dtype in (torch.float32, torch.bfloat16):
            close(TRITON.linear(x, packed, dtype), REFERENCE.linear(x, plain, dtype))


def test_the_set_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TRITON.name == "triton"
    assert TRITON.build.startswith("triton-3.")
    if not torch.cuda.is_available():
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(KernelBuildError, match="need a CUDA GPU"):
            load("triton")


def test_without_triton_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else needs it: a machine without triton loads its own kernels."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("dspark_kernels", "triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    kernels = importlib.import_module("dspark_kernels")
    assert kernels is not dspark_kernels
    assert kernels.load("reference").name == "reference"
    with pytest.raises(kernels.KernelBuildError, match="pip install triton"):
        kernels.load("triton")
