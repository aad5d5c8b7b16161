"""flash-attn's place: what we hand to a module with its documented signature, and what we refuse.

The stand-in computes what flash-attn documents in plain torch, so that it is our mapping of arguments that is tested.
"""

import sys
import types
from typing import Any

import pytest
import torch
from dspark_kernels import Kernels, ReferenceKernels, flash
from torch import Tensor

from dspark_server.errors import ConfigError
from dspark_server.runtime.kv import cache_dtype

PAGE = 256


def documented(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """flash_attn 2's varlen function: a bottom-right causal mask, a window [i + shift - left, i + shift + right]."""
    assert block_table is not None
    assert softmax_scale is not None
    assert (dropout_p, alibi_slopes, return_attn_probs) == (0.0, None, False)
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == block_table.dtype == torch.int32
    assert k.shape[1] % PAGE == 0
    assert k.dim() == 4
    assert len(cu_seqlens_q) == len(cu_seqlens_k) == len(block_table) + 1
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    assert int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    left, right = window_size
    if causal:
        right = 0
    out = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    for run, table in enumerate(block_table.long()):
        first, last = int(cu_seqlens_q[run]), int(cu_seqlens_q[run + 1])
        length = int(cu_seqlens_k[run + 1] - cu_seqlens_k[run])
        keys, values = (x[table].flatten(0, 1)[:length].float() for x in (k, v))
        group = q.shape[1] // k.shape[2]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[first:last].float(), keys) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(last - first).unsqueeze(1) + length - (last - first)
        key = torch.arange(length)
        hidden = torch.zeros(last - first, length, dtype=torch.bool)
        if right >= 0:
            hidden |= key > at + right
        if left >= 0:
            hidden |= key < at - left
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module: Any = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func, module.__version__ = documented, "2.8.3"
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("causal", "window", "softcap"),
    [(True, None, None), (True, 3, None), (True, 300, 2.0), (False, None, 0.5), (False, 5, None)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_the_references(
    flash_attn: types.ModuleType, causal: bool, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    lengths, context = [3, 1, 0, 8], [0, 517, 0, 250]  # an empty run among them, and two rows of no run
    rows, q_heads, kv_heads, head_dim = sum(lengths) + 2, 4, 2, 16
    qkv = torch.randn(rows, (q_heads + 2 * kv_heads) * head_dim).to(dtype)
    keys, values = torch.randn(6, 2, PAGE, kv_heads, head_dim).to(dtype).unbind(1)
    tables = torch.tensor([[5, 0, 0], [0, 3, 1], [0, 0, 0], [2, 4, 0]], dtype=torch.int32)
    start = torch.tensor([0, 3, 4, 4, 12], dtype=torch.int32)
    about = (keys, values, start, torch.tensor(context, dtype=torch.int32), tables, 0.3, causal, window, softcap)
    reference = ReferenceKernels()
    wanted = reference.paged_attention(qkv, q_heads, *about)
    kernels = flash.over(reference, dtype, PAGE)
    assert kernels.name == "reference with flash-attn 2.8.3"
    torch.testing.assert_close(kernels.paged_attention(qkv, q_heads, *about)[:12], wanted[:12])
    later = (*about, 1)  # which flash-attn cannot: our own kernels do it
    wanted = reference.paged_attention(qkv, q_heads, *later)
    torch.testing.assert_close(kernels.paged_attention(qkv, q_heads, *later)[3:12], wanted[3:12])
    torch.testing.assert_close(kernels.rms_norm(qkv, qkv[0], 1e-6), reference.rms_norm(qkv, qkv[0], 1e-6))


def test_what_flash_attn_does_not_take(flash_attn: types.ModuleType) -> None:
    reference = ReferenceKernels()
    with pytest.raises(flash.FlashAttentionError, match=r"multiples of 256 tokens, not of 16: set --block-size 256"):
        flash.over(reference, torch.bfloat16, 16)
    with pytest.raises(flash.FlashAttentionError, match="float32"):
        flash.over(reference, torch.float32, 256)
    with pytest.raises(ConfigError, match=r"with flash-attn 2\.8\.3 cannot read it"):
        cache_dtype("fp8", torch.bfloat16, flash.over(reference, torch.bfloat16, 512), None)


def test_flash_attn_that_is_not_there() -> None:
    assert not flash.installed()
    with pytest.raises(flash.FlashAttentionError, match=r"pip install dspark-server\[gpu\]"):
        flash.over(ReferenceKernels(), torch.bfloat16, 256)


def test_it_is_a_whole_kernel_set(flash_attn: types.ModuleType) -> None:
    kernels = flash.over(ReferenceKernels(), torch.bfloat16, PAGE)
    missing = [name for name in vars(Kernels) if not name.startswith("_") and not hasattr(kernels, name)]
    assert missing == []
    assert kernels.reads_fp8 is False, "the reference reads it, flash-attn 2 does not"
