"""`interface.Kernels` on the native CPU kernels, through ctypes (which releases the GIL during a call).

A step makes hundreds of calls, so a method does nothing but take addresses, allocate its output and call. Contracts:
`interface.Kernels`.
"""

import ctypes
from collections.abc import Callable, Iterable
from ctypes import c_float, c_int, c_long, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from dspark_kernels.cpu.memory import Arena
from dspark_kernels.cpu.rules import packed_rules
from dspark_kernels.interface import (
    DraftedTokens,
    Favour,
    Filters,
    LayerParts,
    PackedExperts,
    PackedLinear,
    Ruled,
)
from torch import Tensor, empty, get_num_threads

FLOAT32, BFLOAT16 = 0, 1  # as in common.h
_CODES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
_BLOCK = 32  # output features are packed in blocks of this many, as in gemm.c

_SIGNATURES = {
    "dspark_rms_norm": [c_void_p] * 4 + [c_long] * 4 + [c_float, c_int, c_int],
    "dspark_rotary_kv_write": [c_void_p, c_long] + [c_void_p] * 5 + [c_long] * 6 + [c_void_p] * 2
    + [c_float] + [c_int] * 4,
    "dspark_paged_attention": [c_void_p, c_long] + [c_void_p] * 6 + [c_long] * 7
    + [c_float, c_float, c_int, c_long, c_long, c_int, c_int],
    "dspark_gate_mul": [c_void_p] * 2 + [c_long] * 3 + [c_int] * 3,
    "dspark_norm_add": [c_void_p] * 3 + [c_long] * 4 + [c_float, c_float, c_int, c_int],
    "dspark_read_streams": [c_void_p] * 8 + [c_long] * 4 + [c_float] * 2 + [c_int] * 2,
    "dspark_write_streams": [c_void_p] * 4 + [c_long] * 3 + [c_int] * 2,
    "dspark_latent_rows": [c_void_p, c_long] + [c_void_p] * 3 + [c_long] + [c_void_p] * 2 + [c_long] * 2 + [c_void_p]
    + [c_long] * 2 + [c_float, c_int, c_int],
    "dspark_compress": [c_void_p] * 2 + [c_long] + [c_void_p] * 3 + [c_long] + [c_void_p] * 2 + [c_long] * 2
    + [c_void_p, c_long] + [c_void_p] * 2 + [c_long] * 2 + [c_void_p, c_long] + [c_void_p] * 2 + [c_long] * 5
    + [c_float, c_int, c_int],
    "dspark_choose_entries": [c_void_p, c_long] * 2 + [c_void_p] * 2 + [c_long, c_void_p] + [c_long] * 2
    + [c_void_p, c_long] * 2 + [c_void_p] * 2 + [c_long] * 6 + [c_float, c_int, c_int],
    "dspark_score_experts": [c_void_p] * 4 + [c_long] * 3 + [c_float, c_int],
    "dspark_latent_attention": [c_void_p, c_long] + [c_void_p] * 2 + [c_long, c_void_p, c_long] + [c_void_p] * 2
    + [c_long] * 2 + [c_void_p, c_long, c_void_p] + [c_long] * 2 + [c_void_p] * 2 + [c_long] * 2 + [c_void_p]
    + [c_long] * 2 + [c_void_p] + [c_long] * 2 + [c_void_p] + [c_long] * 3 + [c_float] * 2 + [c_int] * 2,
    "dspark_argmax": [c_void_p] * 2 + [c_long] * 3 + [c_int, c_int],
    "dspark_linear": [c_void_p] * 4 + [c_long] * 4 + [c_int, c_int],
    "dspark_draft_loss": [c_void_p] * 9 + [c_long] * 2 + [c_int] * 3,
    "dspark_sequential_head": [c_void_p] * 26 + [c_long] * 5 + [c_int],
    "dspark_apply_rules": [c_void_p] * 6 + [c_long] * 3 + [c_int],
    "dspark_accept": [c_void_p] * 13 + [c_long] * 8 + [c_int, c_int],
    "dspark_filter_logits": [c_void_p] * 7 + [c_long] * 2 + [c_int],
    "dspark_log_probabilities": [c_void_p] * 6 + [c_long] * 3 + [c_int],
    "dspark_experts": [c_void_p, c_long] + [c_void_p] * 5 + [c_long] * 5 + [c_float] + [c_void_p] * 3 + [c_int],
    "dspark_pack_linear": [c_void_p] * 2 + [c_long] * 2 + [c_int],
    "dspark_decoder_layer": [c_void_p] * 2 + [c_int] + [c_void_p] * 9 + [c_long] * 5 + [c_int, c_void_p, c_int],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class NativeLinear:
    """weight [Nout / 32, K / 2, 32, 2] bfloat16 (both rounded up), bias [Nout rounded up] float32."""

    weight: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int
    weight_address: int
    bias_address: int


@dataclass(frozen=True, slots=True)
class NativeExperts:
    """One packed matrix after another, as `NativeLinear` holds them; features are rounded up to whole blocks."""

    gate_up: Tensor
    down: Tensor
    count: int
    hidden: int
    features: int


class _Layer(ctypes.Structure):
    """`Layer` of layer.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("input_norm", "post_attention_norm", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("qkv", "output", "gate_up", "down")),
        *((name, c_void_p) for name in ("qkv_bias", "output_bias", "gate_up_bias", "down_bias")),
        *((name, c_long) for name in ("hidden", "features", "q_heads", "kv_heads", "head_dim", "window")),
        *((name, c_float) for name in ("eps", "scale")),
    ]


class NativeLayer:
    """`interface.FusedLayer`; keeps the weights it points to."""

    def __init__(self, kernels: "NativeKernels", call: Callable[..., None], parts: LayerParts) -> None:
        self._kernels = kernels
        self._call = call
        self._parts = parts
        products = {name: getattr(parts, name) for name in ("qkv", "output", "gate_up", "down")}
        assert all(isinstance(product, NativeLinear) for product in products.values())
        hidden, features = parts.down.out_features, parts.down.in_features
        self._scratch_width = max(hidden, parts.output.in_features) + max(parts.qkv.out_features, hidden + features)
        norms = ("input_norm", "post_attention_norm", "q_norm", "k_norm")
        self._layer = _Layer(
            **{name: None if (norm := getattr(parts, name)) is None else norm.data_ptr() for name in norms},
            **{name: product.weight_address for name, product in products.items()},
            **{f"{name}_bias": product.bias_address or None for name, product in products.items()},
            hidden=hidden,
            features=features,
            q_heads=parts.q_heads,
            kv_heads=parts.kv_heads,
            head_dim=parts.head_dim,
            window=parts.window or 0,
            eps=parts.eps,
            scale=parts.scale,
        )
        self._address = ctypes.addressof(self._layer)

    def __call__(
        self,
        delta: Tensor | None,
        residual: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        block_tables: Tensor,
        causal: bool,
    ) -> Tensor:
        tokens = residual.shape[0]
        runs, width = block_tables.shape
        out = empty(residual.shape, dtype=torch.bfloat16) if delta is None else delta
        scratch = empty((tokens, self._scratch_width), dtype=torch.bfloat16)
        self._call(
            self._address, out.data_ptr(), delta is None, residual.data_ptr(), positions.data_ptr(),
            cos_sin.data_ptr(), slots.data_ptr(), keys.data_ptr(), values.data_ptr(), query_start.data_ptr(),
            context_len.data_ptr(), block_tables.data_ptr(), tokens, runs, width, keys.shape[1], keys.stride(0), causal,
            scratch.data_ptr(), self._kernels.count(),
        )  # fmt: skip
        return out


class NativeKernels:
    """`interface.Kernels` over the shared library at `library`."""

    reads_fp8 = False
    ruled = True
    threads: int | None = None

    def __init__(self, library: Path) -> None:
        native = ctypes.CDLL(str(library))
        for function, arguments in _SIGNATURES.items():
            getattr(native, function).argtypes = arguments
            getattr(native, function).restype = None
        self.build = library.parent.name
        self._arena = Arena()
        self.lanes = int(native.dspark_lanes())
        self.name = "native-avx512" if self.lanes == 16 else "native-generic"
        self._rms_norm = native.dspark_rms_norm
        self._rotary_kv_write = native.dspark_rotary_kv_write
        self._paged_attention = native.dspark_paged_attention
        self._gate_mul = native.dspark_gate_mul
        self._norm_add = native.dspark_norm_add
        self._read_streams = native.dspark_read_streams
        self._write_streams = native.dspark_write_streams
        self._latent_rows = native.dspark_latent_rows
        self._compress = native.dspark_compress
        self._choose_entries = native.dspark_choose_entries
        self._score_experts = native.dspark_score_experts
        self._latent_attention = native.dspark_latent_attention
        self._argmax = native.dspark_argmax
        self._linear = native.dspark_linear
        self._pack_linear = native.dspark_pack_linear
        self._experts = native.dspark_experts
        self._draft_loss = native.dspark_draft_loss
        self._decoder_layer = native.dspark_decoder_layer
        self._accept = native.dspark_accept
        self._filter_logits = native.dspark_filter_logits
        self._sequential_head = native.dspark_sequential_head
        self._apply_rules = native.dspark_apply_rules
        self._log_probabilities = native.dspark_log_probabilities

    def count(self) -> int:
        """Number of threads of a call."""
        return self.threads or get_num_threads()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, features = x.shape
        dtype = x.dtype
        out = empty((rows, features), dtype=dtype)
        self._rms_norm(
            x.data_ptr(), None, weight.data_ptr(), out.data_ptr(),
            rows, features, x.stride(0), 0, eps, _CODES[dtype], self.count(),
        )  # fmt: skip
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, features = x.shape
        dtype = x.dtype
        out = empty((rows, features), dtype=dtype)
        self._rms_norm(
            x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(),
            rows, features, x.stride(0), residual.stride(0), eps, _CODES[dtype], self.count(),
        )  # fmt: skip
        return out

    def rotary_kv_write(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
        num_q_heads: int,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
        value_norm: bool = False,
    ) -> None:
        _, block_size, kv_heads, head_dim = keys.shape
        self._rotary_kv_write(
            qkv.data_ptr(), qkv.stride(0), positions.data_ptr(), cos_sin.data_ptr(), slots.data_ptr(),
            keys.data_ptr(), values.data_ptr(), block_size, keys.stride(0), qkv.shape[0], num_q_heads, kv_heads,
            head_dim, None if q_norm is None else q_norm.data_ptr(), None if k_norm is None else k_norm.data_ptr(),
            eps, qkv.shape[1] < (num_q_heads + 2 * kv_heads) * head_dim, value_norm, _CODES[qkv.dtype], self.count(),
        )  # fmt: skip

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
        _, block_size, kv_heads, head_dim = keys.shape
        runs, width = block_tables.shape
        dtype = qkv.dtype
        out = empty((qkv.shape[0], num_q_heads * head_dim), dtype=dtype)
        self._paged_attention(
            qkv.data_ptr(), qkv.stride(0), keys.data_ptr(), values.data_ptr(), out.data_ptr(),
            query_start.data_ptr(), context_len.data_ptr(), block_tables.data_ptr(), runs, width, block_size,
            keys.stride(0), num_q_heads, kv_heads, head_dim, scale, softcap or 0.0, causal, window or 0, first_key,
            _CODES[dtype], self.count(),
        )  # fmt: skip
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self._gate(gate_up, False)

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor:
        return self._gate(gate_up, True)

    def _gate(self, gate_up: Tensor, gelu: bool) -> Tensor:
        rows, columns = gate_up.shape
        dtype = gate_up.dtype
        out = empty((rows, columns // 2), dtype=dtype)
        self._gate_mul(
            gate_up.data_ptr(), out.data_ptr(), rows, columns // 2, gate_up.stride(0), gelu, _CODES[dtype], self.count()
        )
        return out

    def norm_add(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: float = 1.0) -> None:
        rows, features = x.shape
        self._norm_add(
            x.data_ptr(), residual.data_ptr(), weight.data_ptr(), rows, features, x.stride(0), residual.stride(0),
            eps, scale, _CODES[x.dtype], self.count(),
        )  # fmt: skip

    def read_streams(
        self,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        norm: Tensor,
        iterations: int,
        floor: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, features, dtype = streams.shape[0], norm.shape[0], streams.dtype
        count = streams.shape[1] // features
        out = empty((tokens, features), dtype=dtype)
        post, mixing = empty((tokens, count)), empty((tokens, count, count))
        self._read_streams(
            streams.data_ptr(), fn.data_ptr(), base.data_ptr(), scale.data_ptr(), norm.data_ptr(), out.data_ptr(),
            post.data_ptr(), mixing.data_ptr(), tokens, count, features, iterations, floor, eps, _CODES[dtype],
            self.count(),
        )  # fmt: skip
        return out, post, mixing

    def write_streams(self, streams: Tensor, output: Tensor, post: Tensor, mixing: Tensor) -> None:
        tokens, features = output.shape
        self._write_streams(
            streams.data_ptr(), output.data_ptr(), post.data_ptr(), mixing.data_ptr(), tokens, post.shape[1], features,
            _CODES[streams.dtype], self.count(),
        )  # fmt: skip

    def latent_rows(
        self,
        x: Tensor,
        norm: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        eps: float,
        cache: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor | None:
        tokens, channels = x.shape
        out = empty((tokens, channels), dtype=norm.dtype) if cache is None else None
        size, stride = (1, 0) if cache is None else (cache.shape[1], cache.stride(0))
        self._latent_rows(
            x.data_ptr(), x.stride(0), norm.data_ptr(), positions.data_ptr(), cos_sin.data_ptr(), cos_sin.shape[1],
            None if slots is None else slots.data_ptr(), None if cache is None else cache.data_ptr(), size, stride,
            None if out is None else out.data_ptr(), tokens, channels, eps, _CODES[norm.dtype], self.count(),
        )  # fmt: skip
        return out

    def compress(
        self,
        values: Tensor,
        gates: Tensor,
        places: Tensor,
        positions: Tensor,
        query_start: Tensor,
        slots: Tensor,
        raw: Tensor,
        raw_tables: Tensor,
        raw_context: Tensor,
        entries: Tensor,
        entry_tables: Tensor,
        norm: Tensor,
        cos_sin: Tensor,
        eps: float,
    ) -> None:
        (ratio, columns), width = places.shape, norm.shape[0]
        self._compress(
            values.data_ptr(), gates.data_ptr(), values.stride(0), places.data_ptr(), positions.data_ptr(),
            query_start.data_ptr(), query_start.shape[0] - 1, slots.data_ptr(), raw.data_ptr(), raw.shape[1],
            raw.stride(0), raw_tables.data_ptr(), raw_tables.shape[1], raw_context.data_ptr(), entries.data_ptr(),
            entries.shape[1], entries.stride(0), entry_tables.data_ptr(), entry_tables.shape[1], norm.data_ptr(),
            cos_sin.data_ptr(), cos_sin.shape[1], values.shape[0], ratio, columns // width, width, eps,
            _CODES[norm.dtype], self.count(),
        )  # fmt: skip

    def choose_entries(
        self,
        queries: Tensor,
        weights: Tensor,
        positions: Tensor,
        query_start: Tensor,
        keys: Tensor,
        tables: Tensor,
        cos_sin: Tensor,
        ratio: int,
        most: int,
        scale: float,
    ) -> Tensor:
        tokens, heads = weights.shape
        chosen = empty((tokens, most), dtype=torch.int32)
        longest = (int(positions.max()) + 1) // ratio
        scores = empty(tokens * longest if longest > most else 0)
        self._choose_entries(
            queries.data_ptr(), queries.stride(0), weights.data_ptr(), weights.stride(0), positions.data_ptr(),
            query_start.data_ptr(), query_start.shape[0] - 1, keys.data_ptr(), keys.shape[1], keys.stride(0),
            tables.data_ptr(), tables.shape[1], cos_sin.data_ptr(), cos_sin.shape[1], chosen.data_ptr(),
            scores.data_ptr(), tokens, heads, keys.shape[3], ratio, most, longest, scale, _CODES[keys.dtype],
            self.count(),
        )  # fmt: skip
        return chosen

    def score_experts(
        self, logits: Tensor, bias: Tensor | None, chosen: Tensor | None, count: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        tokens, experts = logits.shape
        chosen = empty((tokens, count), dtype=torch.int32) if chosen is None else chosen.int()
        shares = empty((tokens, count))
        self._score_experts(
            logits.data_ptr(), None if bias is None else bias.data_ptr(), chosen.data_ptr(), shares.data_ptr(), tokens,
            experts, count, scale, self.count(),
        )  # fmt: skip
        return chosen, shares

    def latent_attention(
        self,
        queries: Tensor,
        positions: Tensor,
        query_start: Tensor,
        cos_sin: Tensor,
        sinks: Tensor,
        window: Tensor,
        tables: Tensor,
        context_len: Tensor,
        seen: int,
        scale: float,
        eps: float,
        first_key: int = 0,
        own: Tensor | None = None,
        entries: Tensor | None = None,
        entry_tables: Tensor | None = None,
        ratio: int = 1,
        chosen: Tensor | None = None,
    ) -> Tensor:
        tokens, heads, channels, longest = queries.shape[0], sinks.shape[0], window.shape[3], seen
        out = empty((tokens, heads * channels), dtype=window.dtype)
        if own is not None:
            longest += own.shape[0] // context_len.shape[0]
        compressed: tuple[int | None, ...] = (None, 0, 0, None, 0, ratio, None, 0)
        if entries is not None and entry_tables is not None:
            held, listed = entry_tables.shape[1] * entries.shape[1], None if chosen is None else chosen.data_ptr()
            most = held if chosen is None else chosen.shape[1]
            longest += most
            compressed = (
                entries.data_ptr(), entries.shape[1], entries.stride(0), entry_tables.data_ptr(),
                entry_tables.shape[1], ratio, listed, most,
            )  # fmt: skip
        self._latent_attention(
            queries.data_ptr(), queries.stride(0), positions.data_ptr(), query_start.data_ptr(),
            query_start.shape[0] - 1, cos_sin.data_ptr(), cos_sin.shape[1], sinks.data_ptr(), window.data_ptr(),
            window.shape[1], window.stride(0), tables.data_ptr(), tables.shape[1], context_len.data_ptr(), seen,
            first_key, None if own is None else own.data_ptr(), *compressed, longest, out.data_ptr(), tokens, heads,
            channels, scale, eps, _CODES[window.dtype], self.count(),
        )  # fmt: skip
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        rows, vocabulary = logits.shape
        out = empty(rows, dtype=torch.int64)
        self._argmax(
            logits.data_ptr(), out.data_ptr(), rows, vocabulary, logits.stride(0), _CODES[logits.dtype],
            self.count(),
        )  # fmt: skip
        return out

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> NativeLinear:
        assert weight.dtype == torch.bfloat16, "the native matrix product takes bfloat16 weights"
        out_features, in_features = weight.shape
        weight = weight.contiguous()
        blocks = (out_features + _BLOCK - 1) // _BLOCK
        packed = self._arena.empty((blocks, (in_features + 1) // 2, _BLOCK, 2), torch.bfloat16)
        self._pack_linear(weight.data_ptr(), packed.data_ptr(), in_features, out_features, self.count())
        padded_bias = None
        if bias is not None:
            padded_bias = torch.zeros(blocks * _BLOCK)
            padded_bias[:out_features] = bias
        address = 0 if padded_bias is None else padded_bias.data_ptr()
        return NativeLinear(packed, padded_bias, in_features, out_features, packed.data_ptr(), address)

    def linear(self, x: Tensor, packed: PackedLinear, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
        assert isinstance(packed, NativeLinear)
        rows = x.shape[0]
        out_features = packed.out_features
        out = empty((rows, out_features), dtype=out_dtype)
        self._linear(
            x.data_ptr(), packed.weight_address, packed.bias_address, out.data_ptr(), rows, x.stride(0),
            packed.in_features, out_features, _CODES[out_dtype], self.count(),
        )  # fmt: skip
        return out

    def pack_experts(self, count: int, experts: Iterable[tuple[Tensor, Tensor]]) -> NativeExperts:
        packed: NativeExperts | None = None
        for number, (gate_up, down) in enumerate(experts):
            hidden, own = down.shape
            features = -(-own // _BLOCK) * _BLOCK
            if packed is None:
                packed = NativeExperts(
                    self._room(count, 2 * features, hidden),
                    self._room(count, hidden, features),
                    count,
                    hidden,
                    features,
                )
            more = features - own  # units whose gate and weights are 0
            halves = torch.nn.functional.pad(gate_up.unflatten(0, (2, -1)), (0, 0, 0, more)).flatten(0, 1)
            self._pack_into(packed.gate_up[number], halves)
            self._pack_into(packed.down[number], torch.nn.functional.pad(down, (0, more)))
        assert packed is not None, "a mixture has experts"
        return packed

    def _room(self, count: int, out_features: int, in_features: int) -> Tensor:
        """Room for `count` packed matrices, one after another."""
        shape = (count, -(-out_features // _BLOCK), (in_features + 1) // 2, _BLOCK, 2)
        return self._arena.empty(shape, torch.bfloat16)

    def _pack_into(self, room: Tensor, weight: Tensor) -> None:
        """Pack weight [Nout, K] bfloat16."""
        weight, (out_features, in_features) = weight.contiguous(), weight.shape
        self._pack_linear(weight.data_ptr(), room.data_ptr(), in_features, out_features, self.count())

    def experts(
        self, x: Tensor, packed: PackedExperts, chosen: Tensor, shares: Tensor, limit: float | None = None
    ) -> Tensor:
        assert isinstance(packed, NativeExperts)
        (tokens, each), hidden, features = chosen.shape, packed.hidden, packed.features
        out = empty((tokens, hidden), dtype=torch.bfloat16)
        activated = empty((tokens * each, features), dtype=torch.bfloat16)
        rows = empty((tokens * each, hidden), dtype=torch.float32)
        index = empty(2 * tokens * each + packed.count + 1, dtype=torch.int32)
        self._experts(
            x.data_ptr(), x.stride(0), packed.gate_up.data_ptr(), packed.down.data_ptr(), chosen.data_ptr(),
            shares.data_ptr(), out.data_ptr(), tokens, each, packed.count, hidden, features, limit or 0.0,
            activated.data_ptr(), rows.data_ptr(), index.data_ptr(), self.count(),
        )  # fmt: skip
        return out

    def fuse_layer(self, parts: LayerParts) -> NativeLayer | None:
        return None if parts.down.in_features % 32 else NativeLayer(self, self._decoder_layer, parts)

    def draft_tokens(
        self,
        base: Tensor,
        anchors: Tensor,
        names: Tensor | None,
        head: tuple[Tensor, PackedLinear] | None,
        inverse_temperature: Tensor,
        uniforms: Tensor | None,
        favour: Favour | None,
        filters: Filters | None = None,
        ruled: Ruled | None = None,
    ) -> DraftedTokens:
        rows, slots, columns = base.shape
        tokens, usable = empty((rows, slots), dtype=torch.int64), torch.full((rows,), slots)
        law = None if uniforms is None else empty((rows, slots, columns))
        on, odds = torch.zeros((rows, slots), dtype=torch.bool), torch.zeros((rows, slots))
        w1, w2, rank = None, None, 0
        if head is not None:
            assert isinstance(head[1], NativeLinear)
            w1, w2, rank = head[0].data_ptr(), head[1].weight_address, head[1].in_features
        following = torch.zeros(rows, dtype=torch.bool) if favour is None else favour.following.clone()
        x, correction = empty((rows, rank), dtype=torch.bfloat16), empty((rows, columns if rank else 0))
        place, copied, named, bias = (
            (None,) * 4
            if favour is None
            else (t.data_ptr() for t in (favour.place, favour.tokens, favour.named, favour.bias))
        )
        limits = (None,) * 3 if filters is None else _addresses(filters)
        rules, column, drafted, position, earlier = None, None, None, None, 0
        if ruled is not None:
            rules, earlier = packed_rules(ruled.rules), ruled.drafted.shape[1]
            column = None if ruled.column is None else ruled.column.data_ptr()
            drafted, position = ruled.drafted.data_ptr(), ruled.position.data_ptr()
        self._sequential_head(
            base.data_ptr(), w1, w2, anchors.data_ptr(), None if names is None else names.data_ptr(),
            inverse_temperature.data_ptr(), None if uniforms is None else uniforms.data_ptr(),
            *limits, place, copied, named, bias, following.data_ptr(),
            x.data_ptr(), correction.data_ptr(), tokens.data_ptr(), None if law is None else law.data_ptr(),
            on.data_ptr(), odds.data_ptr(), usable.data_ptr(), rules, column, drafted, position,
            rows, slots, columns, rank, earlier, self.count(),
        )  # fmt: skip
        return DraftedTokens(tokens, law, on, odds, usable)

    def apply_rules(self, logits: Tensor, start: Tensor, lengths: Tensor, tokens: Tensor, ruled: Ruled) -> None:
        requests, width = tokens.shape
        assert not ruled.drafted.shape[1], "the first row of a request has no draft tokens before it"
        tokens, rules = tokens.contiguous(), packed_rules(ruled.rules)
        self._apply_rules(
            logits.data_ptr(), start.data_ptr(), lengths.data_ptr(), tokens.data_ptr(), rules,
            ruled.position.data_ptr(), requests, logits.shape[1], width, self.count(),
        )  # fmt: skip

    def accept_drafts(
        self,
        logits: Tensor,
        start: Tensor,
        lengths: Tensor,
        tokens: Tensor,
        inverse_temperature: Tensor,
        q: Tensor | None,
        row: Tensor,
        names: Tensor | None,
        coins: Tensor | None,
        last: Tensor,
        *,
        jointly: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        requests, width = tokens.shape
        tokens = tokens.contiguous()
        count, token = empty(requests, dtype=torch.int64), empty(requests, dtype=torch.int64)
        failed = empty(requests, dtype=torch.bool)
        slots, columns = (0, 0) if q is None else q.shape[1:]
        self._accept(
            logits.data_ptr(), start.data_ptr(), lengths.data_ptr(), tokens.data_ptr(),
            inverse_temperature.data_ptr(), None if q is None else q.data_ptr(), row.data_ptr(),
            None if names is None else names.data_ptr(), None if coins is None else coins.data_ptr(), last.data_ptr(),
            count.data_ptr(), token.data_ptr(), failed.data_ptr(), requests, logits.shape[1], width, slots, columns,
            0 if names is None else names.stride(0), 0 if names is None else names.stride(1),
            0 if coins is None else coins.stride(0), jointly, self.count(),
        )  # fmt: skip
        return count, token, failed

    def filter_logits(self, logits: Tensor, rows: Tensor, inverse_temperature: Tensor, filters: Filters) -> Tensor:
        vocabulary = logits.shape[1]
        out = empty(len(rows), vocabulary)
        self._filter_logits(
            logits.data_ptr(), rows.data_ptr(), inverse_temperature.data_ptr(), *_addresses(filters), out.data_ptr(),
            len(rows), vocabulary, self.count(),
        )  # fmt: skip
        return out

    def log_probabilities(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, vocabulary = logits.shape
        own, rank = empty(rows), empty(rows, dtype=torch.int64)
        best, values = empty((rows, count), dtype=torch.int64), empty((rows, count))
        self._log_probabilities(
            logits.data_ptr(), tokens.data_ptr(), own.data_ptr(), rank.data_ptr(), best.data_ptr(), values.data_ptr(),
            rows, vocabulary, count, self.count(),
        )  # fmt: skip
        return own, rank, best, values

    def draft_loss(
        self,
        draft: Tensor,
        target: Tensor,
        target_rows: Tensor,
        labels: Tensor,
        mass: Tensor,
        ce_weight: Tensor,
        tv_weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        rows, vocabulary = draft.shape
        cross_entropy, distance = empty(rows), empty(rows)
        self._draft_loss(
            draft.data_ptr(), target.data_ptr(), target_rows.data_ptr(), labels.data_ptr(), mass.data_ptr(),
            ce_weight.data_ptr(), tv_weight.data_ptr(),
            cross_entropy.data_ptr(), distance.data_ptr(), rows, vocabulary, _CODES[draft.dtype],
            _CODES[target.dtype], self.count(),
        )  # fmt: skip
        return cross_entropy, distance


def _addresses(filters: Filters) -> tuple[int, int, int]:
    return filters.top_k.data_ptr(), filters.top_p.data_ptr(), filters.min_p.data_ptr()
