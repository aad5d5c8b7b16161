"""The token that the context suggests for a slot: its log odds, and its biased logit."""

import triton
import triton.language as tl
from dspark_kernels.interface import UNNAMED

_UNNAMED = tl.constexpr(UNNAMED)
_FEW = tl.constexpr(-20.0)  # log odds that count as none


@triton.jit
def favoured_logit(own, total, active, named, bias, on, odds, STORE: tl.constexpr):
    """The logit of the biased token's column: `own`, unless its row is `active`; `total` is the row's log-sum-exp.

    With STORE, writes the slot's `on` and `odds` (interface.DraftedTokens).
    """
    score = tl.where(tl.load(named) != 0, own, total + _UNNAMED)
    if STORE:
        share = tl.minimum(tl.exp(score - total), 1.0 - 1e-6)
        tl.store(on, active.to(tl.int8))
        tl.store(odds, tl.where(active, tl.maximum(score - total - tl.log(1.0 - share), _FEW), 0.0))
    return tl.where(active, score + tl.load(bias), own)
