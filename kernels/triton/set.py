"""`interface.Kernels` on a CUDA GPU; with TRITON_INTERPRET=1 in Triton's interpreter, on CPU tensors, for tests."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from dspark_kernels.cpu.build import KernelBuildError
from dspark_kernels.interface import DraftedTokens, Favour, Filters, LayerParts, PackedExperts, PackedLinear, Ruled
from dspark_kernels.reference import PlainExperts, PlainLinear, ReferenceKernels, stacked
from dspark_kernels.triton import accept, attention, elementwise, experts, filter, indexer, latent, rotary, sequential
from dspark_kernels.triton import streams as streams_of
from dspark_kernels.triton.launch import H100, Gpu
from torch import Tensor, empty, empty_like


class TritonKernels:
    """The kernel set on the current CUDA device. No method reads the device's memory on the host.

    Raises KernelBuildError without a CUDA GPU, unless Triton interprets. Beyond the contract, float16 is a dtype like
    bfloat16, a run may have no queries, and `rotary_kv_write` writes nothing to a negative slot: CUDA graphs pad
    batches with these. Short of it, `linear` is cuBLAS: a row's result may depend on the number of rows, and
    attention's on the number of key splits.
    """

    name = "triton"
    reads_fp8 = True
    ruled = False
    threads: int | None = None

    def __init__(self) -> None:
        self._gpu = H100  # the GPU that the interpreter simulates
        if torch.cuda.is_available():
            found = torch.cuda.get_device_properties()
            self._gpu = Gpu(found.multi_processor_count, 10 * found.major + found.minor)
        elif not triton.knobs.runtime.interpret:
            raise KernelBuildError(
                "the Triton kernels need a CUDA GPU and PyTorch's CUDA build; without, use DSPARK_KERNELS=native "
                "(TRITON_INTERPRET=1 runs them on the CPU, for tests only)"
            )
        sources = sorted(Path(__file__).parent.glob("*.py"))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
        self.build = f"triton-{triton.__version__}-{digest[:16]}"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = empty(x.shape, dtype=x.dtype, device=x.device)
        elementwise.norm_launch(x, None, weight, eps, out).run()
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = empty(x.shape, dtype=residual.dtype, device=x.device)
        elementwise.norm_launch(x, residual, weight, eps, out).run()
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
        rotary.launch(qkv, positions, cos_sin, slots, keys, values, num_q_heads, q_norm, k_norm, eps, value_norm).run()

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
        out = empty(qkv.shape[0], num_q_heads * keys.shape[3], dtype=qkv.dtype, device=qkv.device)
        for launch in attention.launches(
            qkv, num_q_heads, keys, values, query_start, context_len, block_tables, scale, causal, window,
            softcap, first_key, out, self._gpu,
        ):  # fmt: skip
            launch.run()
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        out = empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
        elementwise.gate_launch(gate_up, out).run()
        return out

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor:
        out = empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
        elementwise.gate_launch(gate_up, out, gelu=True).run()
        return out

    def norm_add(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: float = 1.0) -> None:
        elementwise.norm_add_launch(x, residual, weight, eps, scale).run()

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
        tokens, width = streams.shape[0], norm.shape[0]
        count = streams.shape[1] // width
        out = empty(tokens, width, dtype=streams.dtype, device=streams.device)
        post, mixing = (empty(tokens, *shape, device=streams.device) for shape in ((count,), (count, count)))
        for launch in streams_of.read_launches(
            streams, fn, base, scale, norm, iterations, floor, eps, out, post, mixing
        ):
            launch.run()
        return out, post, mixing

    def write_streams(self, streams: Tensor, output: Tensor, post: Tensor, mixing: Tensor) -> None:
        streams_of.write_launch(streams, output, post, mixing).run()

    def score_experts(
        self, logits: Tensor, bias: Tensor | None, chosen: Tensor | None, count: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        numbers = empty(logits.shape[0], count, dtype=torch.int32, device=logits.device)
        shares = empty(logits.shape[0], count, device=logits.device)
        given = None if chosen is None else chosen.contiguous()
        streams_of.score_launch(logits, bias, given, scale, numbers, shares).run()
        return numbers, shares

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
        if cache is not None:
            latent.rows_launch(x, norm, positions, cos_sin, eps, cache, slots).run()
            return None
        out = empty(x.shape, dtype=norm.dtype, device=x.device)
        latent.rows_launch(x, norm, positions, cos_sin, eps, out, None).run()
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
        for launch in latent.compress_launches(
            values, gates, places, positions, query_start, slots, raw, raw_tables, raw_context, entries, entry_tables,
            norm, cos_sin, eps,
        ):  # fmt: skip
            launch.run()

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
        chosen = empty(queries.shape[0], most, dtype=torch.int32, device=queries.device)
        for launch in indexer.launches(
            queries, weights, positions, query_start, keys, tables, cos_sin, ratio, most, scale, chosen
        ):
            launch.run()
        return chosen

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
        shape = queries.shape[0], sinks.shape[0] * window.shape[3]
        out = empty(shape, dtype=window.dtype, device=queries.device)
        latent.attention_launch(
            queries, positions, query_start, cos_sin, sinks, window, tables, context_len, seen, scale, eps, first_key,
            own, entries, entry_tables, ratio, chosen, out,
        ).run()  # fmt: skip
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        out = empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        for launch in elementwise.argmax_launches(logits, out):
            launch.run()
        return out

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> PlainLinear:
        return PlainLinear(weight.clone(), None if bias is None else bias.clone())

    def linear(self, x: Tensor, packed: PackedLinear, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
        assert isinstance(packed, PlainLinear)
        if x.is_cuda and out_dtype == torch.float32 != x.dtype:
            product = torch.mm(x, packed.weight.T, out_dtype=torch.float32)
            return product if packed.bias is None else product + packed.bias
        if x.is_cuda:
            return F.linear(x, packed.weight, packed.bias).to(out_dtype)
        return ReferenceKernels().linear(x, packed, out_dtype)

    def pack_experts(self, count: int, experts: Iterable[tuple[Tensor, Tensor]]) -> PlainExperts:
        return PlainExperts(*stacked(count, experts))

    def experts(
        self, x: Tensor, packed: PackedExperts, chosen: Tensor, shares: Tensor, limit: float | None = None
    ) -> Tensor:
        assert isinstance(packed, PlainExperts)
        out = empty(x.shape, dtype=x.dtype, device=x.device)
        for launch in experts.launches(x, packed.gate_up, packed.down, chosen, shares, out, limit):
            launch.run()
        return out

    def fuse_layer(self, parts: LayerParts) -> None:
        return None

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
        """Reads nothing from the device: `law` is present if there are `uniforms`, though all rows may be greedy."""
        assert ruled is None, "this set edits no logits"
        rows, slots, _ = base.shape
        device, weights = base.device, None
        if head is not None:
            w1, w2 = head
            assert isinstance(w2, PlainLinear)
            weights = w1, w2.weight
        drawn = DraftedTokens(
            empty((rows, slots), dtype=torch.int64, device=device),
            None if uniforms is None else empty_like(base),
            torch.zeros((rows, slots), dtype=torch.bool, device=device),
            torch.zeros((rows, slots), device=device),
            torch.full((rows,), slots, device=device),
        )

        def multiply(x: Tensor) -> Tensor:
            assert head is not None
            return self.linear(x, head[1], torch.float32)

        for launch in sequential.launches(
            base, anchors, names, weights, multiply, inverse_temperature, uniforms, favour, filters, drawn
        ):
            launch.run()
        return drawn

    def apply_rules(self, logits: Tensor, start: Tensor, lengths: Tensor, tokens: Tensor, ruled: Ruled) -> None:
        raise NotImplementedError("see `ruled`")

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
        count, token = empty_like(start), empty_like(start)
        failed = empty(start.shape, dtype=torch.bool, device=start.device)
        for launch in accept.launches(
            logits, start, lengths, tokens.contiguous(), inverse_temperature, q, row, names, coins, last, count, token,
            failed, jointly,
        ):  # fmt: skip
            launch.run()
        return count, token, failed

    def filter_logits(self, logits: Tensor, rows: Tensor, inverse_temperature: Tensor, filters: Filters) -> Tensor:
        out = empty((len(rows), logits.shape[1]), dtype=logits.dtype, device=logits.device)
        filter.launch(logits, rows, inverse_temperature, filters, out).run()
        return out

    def log_probabilities(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return ReferenceKernels().log_probabilities(logits, tokens, count)

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
        """In plain PyTorch: training on a GPU has no kernel of its own."""
        return ReferenceKernels().draft_loss(draft, target, target_rows, labels, mass, ce_weight, tv_weight)
