"""Micro-benchmark of the native kernels: `python -m dspark_kernels.bench`.

Matrix products of SmolLM2-135M (30 layers' four products, and lm_head) beside oneDNN's packed ones, paged attention,
and the small operations. Every figure is the least of interleaved repetitions.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import dspark_kernels
import torch
from dspark_kernels.interface import Kernels, PackedLinear
from torch import Tensor

HIDDEN, FF, LAYERS, VOCABULARY = 576, 1536, 30, 49152
Q_HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 16
SHAPES = [(HIDDEN + 2 * KV_HEADS * HEAD_DIM, HIDDEN), (HIDDEN, HIDDEN), (2 * FF, HIDDEN), (HIDDEN, FF)]  # [Nout, K]
Product = Callable[[Tensor, object], Tensor]


def seconds_of(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Least seconds of each function, called in turn: its time when nothing else runs on the cores."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 2):
        for function, measured in zip(functions, times, strict=True):
            started = time.perf_counter()
            function()
            if repeat >= 2:
                measured.append(time.perf_counter() - started)
    return [min(measured) for measured in times]


def products(kernels: Kernels, rows: Sequence[int], repeats: int) -> None:
    """Milliseconds of a pass's matrix products at M rows, ours and oneDNN's, body and lm_head."""
    pack_onednn = torch.ops.mkldnn._reorder_linear_weight
    linear_onednn = torch.ops.mkldnn._linear_pointwise.default
    ours: list[PackedLinear] = []
    onednn: list[Tensor] = []
    for shape in SHAPES * LAYERS + [(VOCABULARY, HIDDEN)]:
        weight = torch.randn(shape, dtype=torch.bfloat16) * 0.02
        ours.append(kernels.pack_linear(weight))
        onednn.append(pack_onednn(weight, None))

    print("| M | oneDNN body + head, ms | ours body + head, ms | ratio | ours GF/s |\n| --- | --- | --- | --- | --- |")
    for m in rows:
        inputs = {features: torch.randn(m, features, dtype=torch.bfloat16) for features in (HIDDEN, FF)}

        def body_ours(inputs: dict[int, Tensor] = inputs) -> None:
            for packed in ours[:-1]:
                kernels.linear(inputs[packed.in_features], packed)

        def body_onednn(inputs: dict[int, Tensor] = inputs) -> None:
            for index, packed in enumerate(onednn[:-1]):
                linear_onednn(inputs[SHAPES[index % 4][1]], packed, None, "none", [], "")

        def head_ours(inputs: dict[int, Tensor] = inputs) -> None:
            kernels.linear(inputs[HIDDEN], ours[-1])

        def head_onednn(inputs: dict[int, Tensor] = inputs) -> None:
            linear_onednn(inputs[HIDDEN], onednn[-1], None, "none", [], "")

        a, b, c, d = seconds_of([body_onednn, head_onednn, body_ours, head_ours], repeats)
        multiplications = LAYERS * sum(n * k for n, k in SHAPES) + VOCABULARY * HIDDEN
        speed = 2e-9 * m * multiplications / (c + d)
        print(
            f"| {m} | {1e3 * a:.2f} + {1e3 * b:.2f} | {1e3 * c:.2f} + {1e3 * d:.2f} | {(a + b) / (c + d):.2f} "
            f"| {speed:.0f} |"
        )


def attention(kernels: Kernels, repeats: int) -> None:
    """Milliseconds of 30 layers' attention, each over a cache of its own."""
    print("\n| runs x queries, context | ms for 30 layers | GB/s of K and V | GF/s |\n| --- | --- | --- | --- |")
    cases = [
        (1, 1, 300), (8, 1, 300), (32, 1, 300), (64, 1, 300), (32, 4, 300), (32, 8, 300), (8, 1, 4000), (1, 1, 8000),
        (1, 256, 0), (1, 2048, 0),
    ]  # fmt: skip
    for runs, queries, context in cases:
        width = -(-(context + queries) // BLOCK_SIZE)
        tables = torch.randperm(runs * width).reshape(runs, width).int()
        caches = torch.randn(LAYERS, 2, runs * width, BLOCK_SIZE, KV_HEADS, HEAD_DIM).bfloat16()
        qkv = torch.randn(runs * queries, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM).bfloat16()
        starts = torch.arange(0, runs * queries + 1, queries, dtype=torch.int32)
        lengths = torch.full((runs,), context, dtype=torch.int32)

        def call(
            caches: Tensor = caches,
            qkv: Tensor = qkv,
            starts: Tensor = starts,
            lengths: Tensor = lengths,
            tables: Tensor = tables,
        ) -> None:
            for keys, values in caches:
                kernels.paged_attention(qkv, Q_HEADS, keys, values, starts, lengths, tables, HEAD_DIM**-0.5)

        (seconds,) = seconds_of([call], repeats)
        read = LAYERS * 4 * runs * (context + queries) * KV_HEADS * HEAD_DIM
        seen = runs * queries * (context + (queries + 1) / 2)
        operations = LAYERS * 4 * seen * Q_HEADS * HEAD_DIM
        print(
            f"| {runs} x {queries}, {context} | {1e3 * seconds:.2f} | {1e-9 * read / seconds:.1f} "
            f"| {1e-9 * operations / seconds:.0f} |"
        )


def small(kernels: Kernels, rows: Sequence[int], repeats: int) -> None:
    """Microseconds of one call of the operations between the matrix products."""
    print("\n| M | rms_norm | add_rms_norm | rotary_kv_write | silu_mul | argmax float32, µs |")
    print("| --- | --- | --- | --- | --- | --- |")
    weight = torch.ones(HIDDEN).bfloat16()
    for m in rows:
        x, residual = torch.randn(2, m, HIDDEN).bfloat16()
        gate_up = torch.randn(m, 2 * FF).bfloat16()
        qkv = torch.randn(m, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM).bfloat16()
        keys, values = torch.zeros(2, -(-m // BLOCK_SIZE), BLOCK_SIZE, KV_HEADS, HEAD_DIM).bfloat16()
        index = torch.arange(m, dtype=torch.int32)
        table = torch.randn(m, HEAD_DIM)
        logits = torch.randn(m, VOCABULARY)
        calls: list[Callable[[], object]] = [
            lambda x=x: kernels.rms_norm(x, weight, 1e-5),  # type: ignore[misc]
            lambda x=x, residual=residual: kernels.add_rms_norm(x, residual, weight, 1e-5),  # type: ignore[misc]
            lambda qkv=qkv, index=index, table=table, keys=keys, values=values: kernels.rotary_kv_write(  # type: ignore[misc]
                qkv, index, table, index, keys, values, Q_HEADS
            ),
            lambda gate_up=gate_up: kernels.silu_mul(gate_up),  # type: ignore[misc]
            lambda logits=logits: kernels.argmax(logits),  # type: ignore[misc]
        ]
        cells = (f"{1e6 * seconds:.1f}" for seconds in seconds_of(calls, 20 * repeats))
        print(f"| {m} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", choices=["products", "attention", "small"])
    arguments = parser.parse_args()
    kernels = dspark_kernels.load("native")
    print(f"{kernels.name}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    with torch.inference_mode():
        if arguments.only in (None, "products"):
            products(kernels, arguments.rows, arguments.repeats)
        if arguments.only in (None, "attention"):
            attention(kernels, arguments.repeats)
        if arguments.only in (None, "small"):
            small(kernels, arguments.rows, arguments.repeats)


if __name__ == "__main__":
    main()
