#!/usr/bin/env python3
"""How close the engine is to this machine: `make bench`.

Four questions, the first two and the last answered as a ratio of figures taken in turn:

1. A target pass of B decoding requests against its packed matrix products alone (the floor), without a drafter.
2. The same requests through HTTP streaming and through the engine driven offline.
3. How a decoding step grows, with running requests and with context, drafter on (`--only growth --plot FILE`).
4. A pass of a random mixture of eight experts of SmolLM2's width against its products, each expert's alone
   (`--only mixture`).
5. The same of a random DeepSeek-V4 of that width, eight layers of all kinds and 16 experts, and how the time of a token
   grows with the context (`--only deepseek`).
"""

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import dspark_kernels
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.request import SamplingParams
from dspark_server.models.decoder import Decoder
from dspark_server.models.deepseek_v4 import StreamLayer
from dspark_server.models.hub import resolve_model
from dspark_server.models.layers.moe import Moe
from dspark_server.models.layers.prenorm import PreNormLayer
from dspark_server.runtime.batch import Batch, Run
from dspark_server.runtime.kv import KVPool
from dspark_server.runtime.linear import Linear
from dspark_server.runtime.paging import CacheLayout, tables_for

MODEL = "SmolLM2-135M-Instruct"
BLOCK = 16


def prompt(index: int, length: int = 48) -> list[int]:
    """Token ids that no other index shares, so that no prefix is cached."""
    return [100 + (index * 7919 + 31 * place) % 40000 for place in range(length)]


@torch.inference_mode()
def passes(sizes: list[int], context: int, repeats: int) -> None:
    """Median milliseconds of a whole target pass, greedy choice included, and of its matrix products alone."""
    decoder = Decoder.load(resolve_model(MODEL), torch.bfloat16, dspark_kernels.load("native"), 4096)
    head = decoder.config.hidden_size

    def products(wide: dict[int, Tensor]) -> None:
        for layer in decoder.layers:
            for linear in layer.products:
                linear(wide[linear.in_features])
        decoder.head(wide[head])

    compare(decoder, products, sizes, context, repeats)


@torch.inference_mode()
def mixture(sizes: list[int], context: int, repeats: int) -> None:
    """The same of a mixture of experts, whose products are those of each touched expert with its own rows."""
    hidden, features, experts, layers, kernels = 576, 1536, 8, 8, dspark_kernels.load("native")
    with tempfile.TemporaryDirectory() as directory:
        random_mixture(Path(directory), hidden, features, experts, layers)
        decoder = Decoder.load(Path(directory), torch.bfloat16, kernels, 4096)

    def random_linear(rows: int, columns: int) -> Linear:
        return Linear((torch.randn(rows, columns) * columns**-0.5).bfloat16(), None, kernels)

    alone = [
        [(random_linear(2 * features, hidden), random_linear(hidden, features)) for _ in range(experts)]
        for _ in decoder.layers
    ]

    def products(wide: dict[int, Tensor]) -> None:
        for layer, own in zip(decoder.layers, alone, strict=True):
            for linear in layer.products:
                linear(wide[linear.in_features])
            assert isinstance(layer, PreNormLayer)
            assert isinstance(layer.mlp, Moe)
            chosen, _ = layer.mlp.route(wide[hidden])
            for expert, rows in zip(*(each.tolist() for each in chosen.unique(return_counts=True)), strict=True):
                gate_up, down = own[expert]
                gate_up(wide[hidden][:rows])
                down(wide[features][:rows])
        decoder.head(wide[hidden])

    compare(decoder, products, sizes, context, repeats)


@torch.inference_mode()
def deepseek(sizes: list[int], context: int, contexts: list[int], repeats: int, plot: Path | None) -> None:
    """The same of DeepSeek-V4, the mixing of its streams included; then milliseconds a token by length of context."""
    hidden, features, experts, kernels = 576, 384, 16, dspark_kernels.load("native")
    with tempfile.TemporaryDirectory() as directory:
        random_deepseek(Path(directory), hidden, features, experts)
        decoder = Decoder.load(Path(directory), torch.bfloat16, kernels, max(contexts) + 64)

    def random_linear(rows: int, columns: int) -> Linear:
        return Linear((torch.randn(rows, columns) * columns**-0.5).bfloat16(), None, kernels)

    alone = [
        [(random_linear(2 * features, hidden), random_linear(hidden, features)) for _ in range(experts)]
        for _ in decoder.layers
    ]

    assert decoder.config.streams is not None
    streams = decoder.config.streams.count
    mixes = [random_linear((2 + streams) * streams, streams * hidden) for _ in range(2 * len(decoder.layers))]

    def products(wide: dict[int, Tensor]) -> None:
        tokens, mixed = torch.arange(len(wide[hidden])), wide[hidden].repeat(1, streams)
        for mix in mixes:
            mix(mixed)
        for layer, own in zip(decoder.layers, alone, strict=True):
            for linear in layer.products:
                linear(wide[linear.in_features])
            assert isinstance(layer, StreamLayer)
            chosen, _ = layer.mlp.route(wide[hidden], tokens)
            for expert, rows in zip(*(each.tolist() for each in chosen.unique(return_counts=True)), strict=True):
                gate_up, down = own[expert]
                gate_up(wide[hidden][:rows])
                down(wide[features][:rows])
        decoder.head(wide[hidden])

    compare(decoder, products, sizes, context, repeats)
    print("\n| context | ms a token |\n| --- | --- |")
    medians = []
    for length in contexts:
        layout = CacheLayout.of([decoder.caches], BLOCK, 2)
        tables = tables_for(layout.groups, count(), length, length + 1)
        pool = KVPool(sum(len(table.blocks) for table in tables), layout, torch.bfloat16)
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            decoder.forward(Batch.of([Run([7], length, tables, 1)], layout.groups), pool.layers(0))
            times.append(time.perf_counter() - started)
        medians.append(1e3 * statistics.median(times[3:]))
        print(f"| {length} | {medians[-1]:.2f} |", flush=True)
    if plot is not None:
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(contexts, medians, marker="o")
        axes.set(xlabel="tokens of context", ylabel="ms a token", ylim=(0, None), title="DeepSeek-V4, D 576, 8 layers")
        figure.savefig(plot)


def random_deepseek(directory: Path, hidden: int, features: int, experts: int) -> None:
    """Write a random DeepSeek-V4 checkpoint with all kinds of layers."""
    ratios, heads, size, rank, groups, inner = [0, 0, 4, 128, 4, 128, 4, 4], 8, 64, 144, 4, 288
    index_heads, index_size, streams = 16, 32, 4
    fields = {
        "architectures": ["DeepseekV4ForCausalLM"], "vocab_size": 49152, "hidden_size": hidden, "head_dim": size,
        "num_hidden_layers": len(ratios), "compress_ratios": ratios, "num_attention_heads": heads, "o_groups": groups,
        "o_lora_rank": inner, "q_lora_rank": rank, "qk_rope_head_dim": 16, "sliding_window": 128, "hc_mult": streams,
        "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "index_n_heads": index_heads, "index_head_dim": index_size,
        "index_topk": 64, "n_routed_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": features,
        "num_hash_layers": 2, "swiglu_limit": 10.0, "routed_scaling_factor": 1.5, "max_position_embeddings": 65536,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(fields))
    wide, both = streams * hidden, (2 + streams) * streams
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (49152, hidden), "head.weight": (49152, hidden), "norm.weight": (hidden,),
        "hc_head_fn": (streams, wide), "hc_head_base": (streams,), "hc_head_scale": (1,),
    }  # fmt: skip
    for index, ratio in enumerate(ratios):
        layer, at, ff = f"layers.{index}.", f"layers.{index}.attn.", f"layers.{index}.ffn."
        for half in ("attn", "ffn"):
            shapes |= {f"{layer}hc_{half}_fn": (both, wide), f"{layer}hc_{half}_base": (both,)}
            shapes |= {f"{layer}hc_{half}_scale": (3,), f"{layer}{half}_norm.weight": (hidden,)}
        shapes |= {f"{at}wq_a.weight": (rank, hidden), f"{at}wq_b.weight": (heads * size, rank)}
        shapes |= {f"{at}q_norm.weight": (rank,), f"{at}kv_norm.weight": (size,), f"{at}attn_sink": (heads,)}
        shapes |= {f"{at}wkv.weight": (size, hidden), f"{at}wo_b.weight": (hidden, groups * inner)}
        shapes[f"{at}wo_a.weight"] = (groups * inner, heads * size // groups)
        parts = [(f"{at}compressor.", size)] if ratio else []
        if ratio == 4:
            parts.append((f"{at}indexer.compressor.", index_size))
            shapes[f"{at}indexer.wq_b.weight"] = (index_heads * index_size, rank)
            shapes[f"{at}indexer.weights_proj.weight"] = (index_heads, hidden)
        for part, width in parts:
            columns = width * (2 if ratio == 4 else 1)
            shapes |= {f"{part}{name}.weight": (columns, hidden) for name in ("wkv", "wgate")}
            shapes |= {f"{part}ape": (ratio, columns), f"{part}norm.weight": (width,)}
        shapes[f"{ff}gate.weight"] = (experts, hidden)
        if index >= 2:
            shapes[f"{ff}gate.bias"] = (experts,)
        for name in (*(f"experts.{each}" for each in range(experts)), "shared_experts"):
            shapes |= {f"{ff}{name}.{gate}.weight": (features, hidden) for gate in ("w1", "w3")}
            shapes[f"{ff}{name}.w2.weight"] = (hidden, features)
    plain = ("hc_", "attn_sink", "ape", "gate.bias")
    tensors = {
        name: (torch.randn(shape) * shape[-1] ** -0.5).to(
            torch.float32 if any(p in name for p in plain) else torch.bfloat16
        )
        for name, shape in shapes.items()
    }
    for index in range(2):
        order = torch.rand(49152, experts).argsort(1)
        tensors[f"layers.{index}.ffn.gate.tid2eid"] = order[:, :2].contiguous()
    save_file(tensors, directory / "model.safetensors")


def random_mixture(directory: Path, hidden: int, features: int, experts: int, layers: int) -> None:
    """Write a random Qwen3-MoE checkpoint of SmolLM2's attention."""
    fields = {"architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 49152, "hidden_size": hidden, "head_dim": 64}
    fields |= {"num_hidden_layers": layers, "num_attention_heads": 9, "num_key_value_heads": 3, "num_experts": experts}
    fields |= {"num_experts_per_tok": 2, "moe_intermediate_size": features, "intermediate_size": features}
    fields |= {"max_position_embeddings": 8192, "norm_topk_prob": True, "tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(fields))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (49152, hidden), "model.norm": (hidden,)}
    for index in range(layers):
        layer = f"model.layers.{index}."
        shapes |= {f"{layer}{name}": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}self_attn.{name}": (64,) for name in ("q_norm", "k_norm")}
        shapes |= {f"{layer}self_attn.{name}": (192, hidden) for name in ("k_proj", "v_proj")}
        shapes |= {f"{layer}self_attn.{name}": (hidden, hidden) for name in ("q_proj", "o_proj")}
        shapes[f"{layer}mlp.gate"] = (experts, hidden)
        for expert in range(experts):
            shapes |= {f"{layer}mlp.experts.{expert}.{name}": (features, hidden) for name in ("gate_proj", "up_proj")}
            shapes[f"{layer}mlp.experts.{expert}.down_proj"] = (hidden, features)
    tensors = {f"{name}.weight": (torch.randn(shape) * shape[-1] ** -0.5).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")


def compare(
    decoder: Decoder, products: Callable[[dict[int, Tensor]], None], sizes: list[int], context: int, repeats: int
) -> None:
    """Time passes and `products`, which gets rows of every width [size, width], in turn."""
    kernels = dspark_kernels.load("native")
    layout, numbers = CacheLayout.of([decoder.caches], BLOCK, 2), count()
    tables = [tables_for(layout.groups, numbers, context, context + 1) for _ in range(max(sizes))]
    pool = KVPool(next(numbers), layout, torch.bfloat16)
    print(f"| B, context {context} | pass, ms | products alone, ms | ratio |\n| --- | --- | --- | --- |")
    for size in sizes:
        runs = [Run([index], context, tables[index], 1) for index in range(size)]
        wide = {
            columns: torch.randn(size, columns).bfloat16()
            for layer, config in zip(decoder.layers, decoder.config.layers, strict=True)
            for columns in (config.mlp.features, *(linear.in_features for linear in layer.products))
        }
        whole: list[float] = []
        floor: list[float] = []
        for _ in range(repeats):
            started = time.perf_counter()
            batch = Batch.of(runs, pool.groups)
            hidden, _ = decoder.forward(batch, pool.layers(0))
            kernels.argmax(decoder.logits(hidden)).tolist()
            middle = time.perf_counter()
            products(wide)
            whole.append(middle - started)
            floor.append(time.perf_counter() - middle)
        a, b = statistics.median(whole[3:]), statistics.median(floor[3:])
        print(f"| {size} | {1e3 * a:.2f} | {1e3 * b:.2f} | {a / b:.2f} |", flush=True)


def offline(core: EngineCore, streams: int, tokens: int, first: int) -> float:
    """Tokens a second of the engine called directly."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    started = time.perf_counter()
    core.generate([prompt(first + index) for index in range(streams)], params)
    return streams * tokens / (time.perf_counter() - started)


async def over_http(port: int, streams: int, tokens: int, first: int) -> float:
    """Tokens a second of as many streams, read by a client that counts events and parses none."""
    fields = {"model": MODEL, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}

    async def one(index: int) -> None:
        body = json.dumps(fields | {"prompt": prompt(first + index)}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body)
        answer = await reader.read()
        writer.close()
        if not answer.startswith(b"HTTP/1.1 200") or b"data: [DONE]" not in answer:
            raise SystemExit(f"the server answered {answer[:300]!r}")

    started = time.perf_counter()
    await asyncio.gather(*[one(index) for index in range(streams)])
    return streams * tokens / (time.perf_counter() - started)


def growth(requests: list[int], contexts: list[int], repeats: int, plot: Path | None) -> None:
    """Median milliseconds of a decoding step and of its parts; blocks verified whole."""
    most = max(requests)
    core = EngineCore.load(
        EngineConfig(
            model=MODEL,
            speculative=SpeculativeConfig(selection="fixed"),
            max_num_seqs=most,
            max_num_batched_tokens=16 * most,
            num_blocks=max(most * 8, 2 * max(contexts) // BLOCK + 64),
            enable_prefix_caching=False,
        )
    )
    seconds = core.loop.stats.seconds

    def parts(running: int, context: int) -> list[float]:
        """[draft, verify, host] of the median step."""
        params = SamplingParams(max_tokens=repeats * 13, temperature=1.0, ignore_eos=True)
        made = [core.new_request(prompt(index, context), params, nonce=index) for index in range(running)]
        for request in made:
            core.batcher.add(request)
        while not all(request.is_decoding for request in made):
            core.loop.step()
        rows = []
        for _ in range(repeats):
            before = dict(seconds)
            core.loop.step()
            rows.append([1e3 * (seconds[part] - before[part]) for part in ("draft", "verify", "host")])
        for request in made:
            core.batcher.remove(request)
        return [statistics.median(column) for column in zip(*rows, strict=True)]

    print("| requests | context | draft, ms | verify, ms | host, ms | host per request, us |")
    print("| --- | --- | --- | --- | --- | --- |")
    curves: dict[str, list[tuple[int, list[float]]]] = {"running requests": [], "context of one request": []}
    for axis, sizes in (("running requests", requests), ("context of one request", contexts)):
        for size in sizes:
            running, context = (size, 32) if axis == "running requests" else (1, size)
            found = parts(running, context)
            curves[axis].append((size, found))
            draft, verify, host = found
            print(f"| {running} | {context} | {draft:.2f} | {verify:.2f} | {host:.2f} | {1e3 * host / running:.0f} |")
    if plot is not None:
        figure = Figure((9, 4), layout="constrained")
        for axes, (axis, points) in zip(figure.subplots(1, 2), curves.items(), strict=True):
            for index, part in enumerate(("draft", "verify", "host")):
                axes.plot([size for size, _ in points], [found[index] for _, found in points], marker="o", label=part)
            axes.set(xlabel=axis, ylabel="ms of a step", xscale="log", yscale="log")
            axes.legend()
        figure.savefig(plot, dpi=120)


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server accepts connections."""
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise SystemExit("the server ended while starting")


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """User and system time the process has used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def streaming(streams: int, tokens: int, rounds: int) -> None:
    """HTTP against offline in turn; also the server's start and its idle CPU."""
    port = free_port()
    command = [sys.executable, "-c", "from dspark_server.cli import main; main()", "serve", "--port", str(port)]
    started = time.perf_counter()
    with open("/dev/null", "wb") as silent:
        process = subprocess.Popen(command, stderr=silent)
    try:
        wait_ready(port, process)
        print(f"\nStart to ready {time.perf_counter() - started:.1f} s;", end=" ", flush=True)
        time.sleep(2)
        before = cpu_seconds(process)
        time.sleep(10)
        print(f"idle CPU {10 * (cpu_seconds(process) - before):.1f} %.\n")

        # One thread loads and ends, another one steps: the reason is in cli/serving.py.
        with ThreadPoolExecutor(1) as loader:
            core = loader.submit(EngineCore.load, EngineConfig(model=MODEL)).result()
        figures: list[tuple[float, float]] = []
        with ThreadPoolExecutor(1) as engine:
            for turn in range(rounds + 1):
                first = 1 + turn * streams
                direct = engine.submit(offline, core, streams, tokens, first).result()
                served = asyncio.run(over_http(port, streams, tokens, first))
                if turn:  # the first warms up
                    figures.append((served, direct))
        http, direct = (statistics.median(column) for column in zip(*figures, strict=True))
        ratio = statistics.median(a / b for a, b in figures)
        print(f"{streams} streams x {tokens} tokens, {rounds} rounds in turn, medians:")
        print(f"HTTP {http:.1f} tok/s, offline {direct:.1f} tok/s, ratio {ratio:.3f}")
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 16, 64], help="requests in a pass")
    parser.add_argument("--context", type=int, default=128, help="tokens each request has behind it")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="output tokens a stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096, 8000])
    parser.add_argument("--plot", type=Path, help="where to draw the growth of a step")
    parser.add_argument("--only", choices=["passes", "streaming", "growth", "mixture", "deepseek"])
    arguments = parser.parse_args()
    if arguments.only in (None, "passes"):
        # In a thread that ends, so that its OpenMP pool is gone before the engine's is made.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(passes, arguments.sizes, arguments.context, arguments.repeats).result()
    if arguments.only in (None, "mixture"):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(mixture, arguments.sizes, arguments.context, arguments.repeats).result()
    if arguments.only in (None, "deepseek"):
        with ThreadPoolExecutor(1) as thread:
            sizes, context, contexts = arguments.sizes, arguments.context, [1024, 2048, 4096, 8192]
            thread.submit(deepseek, sizes, context, contexts, arguments.repeats, arguments.plot).result()
    if arguments.only in (None, "streaming"):
        streaming(arguments.streams, arguments.tokens, arguments.rounds)
    if arguments.only in (None, "growth"):
        growth(arguments.requests, arguments.contexts, min(arguments.repeats, 9), arguments.plot)


if __name__ == "__main__":
    main()
