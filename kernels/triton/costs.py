"""Data movement and computation of each kernel in a step: bytes of device memory and FLOPs, for a roofline.

Every operand counts once (a run's query tiles read it again from the cache), every result once, and data passed between
the launches of one kernel both ways. Filters read a row PASSES times: from the L2 cache, and counted once, as long as
all active rows fit there. FLOPs are those of products on tensor cores; other arithmetic takes far less time than the
bytes and is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from dspark_kernels.triton import attention, draw
from dspark_kernels.triton.launch import Gpu
from dspark_kernels.triton.shapes import BLOCK_SIZE, Model

L2 = 50 << 20  # bytes, of an H100
PASSES = 9  # over a row with top-k and top-p, as counted in the interpreter (tests/kernels/test_triton_filter.py)


@dataclass(frozen=True)
class Cost:
    """Totals of all of a step's calls of one kernel: calls, launches, bytes, FLOPs."""

    kernel: str
    calls: int
    launches: int
    bytes: float
    flops: float = 0.0


def step_costs(
    model: Model,
    requests: int,
    queries: int,
    context: int,
    gpu: Gpu,
    cache: torch.dtype | None = None,
    filtered: bool = False,
) -> Iterator[Cost]:
    """A step that drafts for `requests` requests and verifies `queries` tokens of each over `context` tokens.

    With one query a request it is a decode step, and nothing is drafted. `cache` is the KV cache's dtype (None: the
    model's); `filtered`: every request has top-k and top-p.
    """
    tokens, size = requests * queries, model.dtype.itemsize
    cache = cache or model.dtype
    heads = 2 * model.q_heads + 2 * model.kv_heads  # q is written where it was read, k and v to the cache
    layers, norms = model.layers, 2 * model.layers + 1
    yield _attention("attention, target", model, layers, requests, queries, context, gpu, cache)
    written = 2 * model.kv_heads * cache.itemsize
    yield Cost("rotary_kv_write", layers, layers, layers * tokens * (heads * size + written) * model.head_dim)
    yield Cost("add_rms_norm", norms, norms, norms * (4 * tokens + 1) * model.hidden * size)
    yield Cost("gate_mul", layers, layers, layers * 3 * tokens * model.features * size)
    if filtered:
        moved = 4 * tokens * model.vocabulary * (1 + _reads(4 * model.vocabulary, tokens, gpu))
        yield Cost("filter_logits", 1, 1, moved)
    if queries == 1:
        yield Cost("argmax", 1, 2, 4 * tokens * model.vocabulary)
        return
    drafts, columns = model.gamma, model.columns
    yield _attention("attention, draft", model, model.draft_layers, requests, drafts, context, gpu, cache)
    # A slot: base and correction are read for the softmax and again for q, which is written; W2 is the product's.
    parts = -(-columns // draw.PART)
    slot = requests * (5 * 4 * columns + 2 * parts * 28) + columns * model.rank * size + 4 * requests * columns
    if filtered:
        slot += requests * 8 * columns * _reads(8 * columns, requests, gpu)
    launches = (5 + filtered) * drafts
    yield Cost("draft_tokens", 1, launches, drafts * slot, drafts * 2.0 * requests * columns * model.rank)
    # Each row's softmax, what q has of it, then the row that decides: logits and q are read, the residual written and a
    # part of it read.
    decided = requests * 4 * (2 * model.vocabulary + columns + draw.PART)
    judged = 2 * 4 * (tokens - 2 * requests) * columns
    yield Cost("accept_drafts, jointly", 1, 6, 4 * tokens * model.vocabulary + judged + decided)


def _reads(row: int, rows: int, gpu: Gpu) -> int:
    """Number of times that filters read rows of `row` bytes from memory: a processor works on one at a time."""
    return 1 if min(rows, gpu.processors) * row <= L2 else PASSES


def _attention(
    name: str, model: Model, layers: int, runs: int, queries: int, context: int, gpu: Gpu, cache: torch.dtype
) -> Cost:
    tokens, keys = runs * queries, context + queries
    group = model.q_heads // model.kv_heads
    tile = attention.tiles(queries, group, model.head_dim, model.dtype, gpu.capability)
    grid = (tokens // (tile.rows // group) + runs) * model.kv_heads
    parts = attention.splits(grid, -(-keys // BLOCK_SIZE) * BLOCK_SIZE, gpu.processors)
    size = model.dtype.itemsize
    stored = 2 * runs * keys * model.kv_heads * model.head_dim * cache.itemsize
    moved = 2 * tokens * model.q_heads * model.head_dim * size + stored
    if parts > 1:
        moved += 2 * 4 * parts * tokens * model.q_heads * (model.head_dim + 2)
    flops = 4.0 * tokens * (context + (queries + 1) / 2) * model.q_heads * model.head_dim
    return Cost(name, layers, layers * (1 if parts == 1 else 2), layers * moved, layers * flops)
