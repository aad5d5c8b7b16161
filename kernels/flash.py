"""flash-attn's attention in place of another kernel set's. NVIDIA GPUs only.

The package is imported on use. flash_attn_varlen_func reads keys and values through a block table, as our own kernels
do; only the names differ.

It guarantees less about NaN than the contract asks: it masks scores, but multiplies hidden values by 0. A NaN or
infinity in a value row then reaches the queries whose tile of keys it lies in, though they do not see it: a draft token
whose own row overflows can fail its request, where plain decoding would not have run it. Where that matters, use our
own kernels.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch
from dspark_kernels.interface import Kernels
from torch import Tensor

PAGE = 256  # tokens: flash-attn 2 reads pages of a multiple of this
LARGEST_HEAD = 256


class FlashAttentionError(RuntimeError):
    """flash-attn is not installed, or does not support the request."""


def installed() -> bool:
    """Whether the package flash_attn can be found; nothing is imported."""
    return importlib.util.find_spec("flash_attn") is not None


class FlashKernels:
    """`Kernels` with `paged_attention` by flash-attn and everything else by `kernels`."""

    reads_fp8 = False

    def __init__(self, kernels: Kernels, dtype: torch.dtype, block_size: int) -> None:
        """Raises FlashAttentionError, with the remedy, if the package is missing or does not support the sizes."""
        if block_size % PAGE:
            raise FlashAttentionError(
                f"flash-attn reads pages of multiples of {PAGE} tokens, not of {block_size}: set --block-size {PAGE}."
            )
        if dtype not in (torch.float16, torch.bfloat16):
            raise FlashAttentionError(f"flash-attn computes in float16 and bfloat16, not in {dtype}: set --dtype.")
        try:
            import flash_attn
        except ImportError as error:
            raise FlashAttentionError(f"flash-attn does not load ({error}): pip install dspark-server[gpu].") from None
        self._kernels = kernels
        self._attend: Callable[..., Tensor] = flash_attn.flash_attn_varlen_func
        version = getattr(flash_attn, "__version__", "?")
        self.name = f"{kernels.name} with flash-attn {version}"
        self.build = f"{kernels.build}, flash-attn {version}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def paged_attention(
        self,
        qkv: Tensor,
        num_q_heads: int,
        keys: Tensor,
        values: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        block_tables: Tensor,
        scale: float,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        first_key: int = 0,
    ) -> Tensor:
        """See `Kernels.paged_attention`. flash-attn's causal mask is aligned to the last key, as ours is.

        The longest lengths are upper bounds from shapes: they only size flash-attn's grid, and the true ones are not
        known on the host.
        """
        if first_key:  # flash-attn has no such bound for paged keys
            return self._kernels.paged_attention(
                qkv, num_q_heads, keys, values, query_start, context_len, block_tables, scale, causal, window, softcap,
                first_key,
            )  # fmt: skip
        rows, width = qkv.shape[0], block_tables.shape[1]
        _, block_size, _, head_dim = keys.shape
        lengths = context_len + query_start.diff()
        # Our window counts the keys a query sees, itself included; flash-attn's counts those to its left.
        left = -1 if window is None else window - 1
        out = self._attend(
            qkv[:, : num_q_heads * head_dim].unflatten(1, (num_q_heads, head_dim)),
            keys,
            values,
            cu_seqlens_q=query_start,
            cu_seqlens_k=torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            max_seqlen_q=rows,
            max_seqlen_k=width * block_size,
            softmax_scale=scale,
            causal=causal,
            window_size=(left, 0 if causal and window is not None else -1),
            softcap=softcap or 0.0,
            block_table=block_tables,
        )
        return out.flatten(1)


def over(kernels: Kernels, dtype: torch.dtype, block_size: int) -> Kernels:
    """`FlashKernels` typed as `Kernels`: it passes on everything that it does not define itself."""
    return cast(Kernels, FlashKernels(kernels, dtype, block_size))
