"""A linear layer whose weight is packed once for the fastest matrix product this machine has."""

import os
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path

import torch
import torch.nn.functional as F
from dspark_kernels import Kernels, PackedLinear
from dspark_kernels.reference import stacked
from torch import Tensor

from dspark_server.errors import ConfigError

BACKENDS = ("native", "onednn", "plain")


class Linear:
    """x weight^T + bias, weight [Nout, K], bias [Nout] or None.

    The layer keeps a packed copy only: when the caller drops `weight`, its memory is free. `backend` names the matrix
    product in use: "native", "onednn" or "plain" (which keeps `weight` itself).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> None:
        self.out_features, self.in_features = weight.shape
        self.backend = choose_backend(weight.dtype, kernels) if weight.device.type == "cpu" else "plain"  # cuBLAS
        self.packed: PackedLinear | None = None  # for kernels that include the product, if the backend is native
        make = {"native": self._native, "onednn": _onednn, "plain": _plain}[self.backend]
        self._multiply = make(weight.detach(), bias, kernels)

    def _native(self, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> "_Multiply":
        packed = self.packed = kernels.pack_linear(weight, bias)
        linear = kernels.linear

        def multiply(x: Tensor, out_float32: bool) -> Tensor:
            return linear(x, packed, torch.float32 if out_float32 else torch.bfloat16)

        return multiply

    def __call__(self, x: Tensor, out_float32: bool = False) -> Tensor:
        """x [M, K] -> [M, Nout] in x's dtype, or in float32 (never rounded to bfloat16 if the backend is native)."""
        return self._multiply(x, out_float32)


class Experts:
    """The gated feed-forwards of a layer's E experts: gate_up [2F, D] of each, the gates first, and down [D, F].

    Gates are cut at `limit`, what they multiply at +-`limit`. As with `Linear` only a packed copy is kept, and experts
    are taken one after the other: no more than one is there twice. `backend` names the products in use: "grouped" of
    the kernels, or "plain", torch's batched ones over the experts touched.
    """

    def __init__(
        self,
        count: int,
        experts: Iterator[tuple[Tensor, Tensor]],
        kernels: Kernels,
        limit: float = inf,
    ) -> None:
        first = next(experts)
        native = kernels.name.startswith("native") and first[0].dtype == torch.bfloat16
        grouped = native or first[0].device.type != "cpu"
        every = _begun(first, experts)
        del first
        self.backend = "grouped" if grouped else "plain"
        self._kernels = kernels
        self._limit = limit
        self._packed = kernels.pack_experts(count, every) if grouped else None
        self._plain = None if grouped else stacked(count, every)

    def __call__(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """See `Kernels.experts`."""
        if self._packed is not None:
            return self._kernels.experts(x, self._packed, chosen, shares, None if self._limit == inf else self._limit)
        assert self._plain is not None
        return _plain_experts(x, *self._plain, chosen, shares, self._kernels, self._limit)


def _begun(first: tuple[Tensor, Tensor], others: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """`first`, and then the others. Unlike `chain` it does not keep the first."""
    yield first
    del first
    yield from others


def _plain_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, shares: Tensor, kernels: Kernels, limit: float = inf
) -> Tensor:
    """`Kernels.experts` by batched products: the rows of each touched expert, padded to the most that one has."""
    (tokens, each), every = chosen.shape, chosen.flatten().long()
    own = (every < len(down)).nonzero().squeeze(1)  # slots of experts that are not another rank's
    outputs = torch.zeros(tokens * each, x.shape[1])
    if len(own):
        outputs[own] = _outputs(x[own // each], gate_up, down, every[own], kernels, limit)
    return (outputs.view(tokens, each, -1) * shares.unsqueeze(2)).sum(1).to(x.dtype)


def _outputs(x: Tensor, gate_up: Tensor, down: Tensor, of_slot: Tensor, kernels: Kernels, limit: float) -> Tensor:
    """The outputs [S, D] float32 of experts [S] for x [S, D]."""
    touched, number, counts = of_slot.unique(return_inverse=True, return_counts=True)
    order = number.argsort(stable=True)
    sorted_number = number[order]
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[sorted_number]
    rows = x.new_zeros(len(touched), int(counts.max()), x.shape[1])
    rows[sorted_number, place] = x[order]
    inner = limited(torch.bmm(rows, gate_up[touched].transpose(1, 2)).flatten(0, 1), limit, kernels)
    outputs = torch.bmm(inner.unflatten(0, rows.shape[:2]), down[touched].transpose(1, 2)).float()
    of_slots = torch.empty(len(order), x.shape[1])
    of_slots[order] = outputs[sorted_number, place]
    return of_slots


def limited(gate_up: Tensor, limit: float, kernels: Kernels) -> Tensor:
    """`Kernels.silu_mul` of gate_up [M, 2F], with gates of at most `limit`, and what they multiply within +-`limit`."""
    if limit != inf:
        gate, up = gate_up.chunk(2, dim=1)
        gate_up = torch.cat([gate.clamp(max=limit), up.clamp(-limit, limit)], dim=1)
    return kernels.silu_mul(gate_up)


def choose_backend(dtype: torch.dtype, kernels: Kernels) -> str:
    """Return the matrix product for weights of `dtype` on this machine; DSPARK_LINEAR overrides it for bfloat16.

    With AMX, oneDNN's tiles are about ten times faster than vector instructions. Without, our own are faster: by
    VDPBF16PS on AMD, by float32 FMA elsewhere on AVX-512; on older processors oneDNN has no bfloat16 product at all.
    Raises ConfigError if the override cannot work.
    """
    wanted = os.environ.get("DSPARK_LINEAR") or "auto"
    if wanted not in ("auto", *BACKENDS):
        raise ConfigError(f"DSPARK_LINEAR must be one of {', '.join(BACKENDS)}, not {wanted!r}")
    if dtype != torch.bfloat16:
        return "plain"
    native = kernels.name.startswith("native")
    if wanted == "native" and not native:
        raise ConfigError(f"DSPARK_LINEAR=native needs the native kernels, but these are {kernels.name!r}")
    if wanted == "onednn" and not onednn_has_bfloat16():
        raise ConfigError("DSPARK_LINEAR=onednn needs a processor that oneDNN multiplies bfloat16 on; this one is not.")
    if wanted != "auto":
        return wanted
    if not onednn_has_bfloat16():
        return "native" if native else "plain"
    return "native" if kernels.name.startswith("native-avx512") and not has_amx() else "onednn"


def onednn_has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor (x86: AVX-512 or newer)."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_amx() -> bool:
    """Whether the processor has AMX tiles for bfloat16."""
    try:
        return " amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def has_bfloat16_pairs() -> bool:
    """Whether the processor multiplies bfloat16 in pairs faster than float32: VDPBF16PS on AMD (cpu/build.py)."""
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "AuthenticAMD" in processor and " avx512_bf16" in processor


_Multiply = Callable[[Tensor, bool], Tensor]


def _onednn(weight: Tensor, bias: Tensor | None, kernels: Kernels) -> _Multiply:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    linear = torch.ops.mkldnn._linear_pointwise.default

    def multiply(x: Tensor, out_float32: bool) -> Tensor:
        y: Tensor = linear(x, packed, bias, "none", [], "")
        return y.float() if out_float32 else y

    return multiply


def _plain(weight: Tensor, bias: Tensor | None, kernels: Kernels) -> _Multiply:
    def multiply(x: Tensor, out_float32: bool) -> Tensor:
        y = F.linear(x, weight, bias)
        return y.float() if out_float32 else y

    return multiply
