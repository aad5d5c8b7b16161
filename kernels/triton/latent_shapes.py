"""The launches of DeepSeek-V4's own operations, over meta tensors, for `compile.py`."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from dspark_kernels.triton import experts, indexer, latent, streams
from dspark_kernels.triton.launch import Launch
from dspark_kernels.triton.shapes import Case
from torch import Tensor

TOKENS, RUNS, BLOCK_SIZE, CONTEXT = 48, 8, 128, 131072
STREAMS, ROTATED, WINDOW, INDEX_HEADS, INDEX_DIM, HEAD_DIM = 4, 64, 128, 64, 128, 512


@dataclass(frozen=True)
class Compressed:
    """A model, of which a rank has `heads`: D hidden, entries that are chosen, experts, a token's, their features."""

    name: str
    hidden: int
    heads: int
    chosen: int
    experts: int
    each: int
    features: int
    dtype: torch.dtype = torch.bfloat16


FLASH = Compressed("DeepSeek-V4-Flash, 8 ranks", 4096, 8, 512, 256, 6, 256)
PRO = Compressed("DeepSeek-V4-Pro, 16 ranks", 7168, 8, 1024, 384, 6, 192)


def compressed_cases(model: Compressed) -> Iterator[Case]:
    """Every kernel of a layer that other models do not have, and the experts with their limit."""
    yield from _streams(model)
    yield from _entries(model)
    yield from _choice(model)
    for kind in ("chosen entries", "all entries", "window", "block"):
        yield Case("latent attention", kind, _attention(model, kind))
    numbers, shares = _empty(torch.int32, TOKENS, model.each), _empty(torch.float32, TOKENS, model.each)
    x = _empty(model.dtype, TOKENS, model.hidden)
    gate_up = _empty(model.dtype, model.experts, 2 * model.features, model.hidden)
    down = _empty(model.dtype, model.experts, model.hidden, model.features)
    for launch in experts.launches(x, gate_up, down, numbers, shares, torch.empty_like(x), 10.0):
        gated = ", gated" if launch.constants.get("GATED") else ""
        yield Case("limited experts", f"{launch.kernel.__name__}{gated}", launch)


def _streams(model: Compressed) -> Iterator[Case]:
    rows, wide = (2 + STREAMS) * STREAMS, STREAMS * model.hidden
    of_all = _empty(model.dtype, TOKENS, wide)
    post, mixing = _empty(torch.float32, TOKENS, STREAMS), _empty(torch.float32, TOKENS, STREAMS, STREAMS)
    out, weights = _empty(model.dtype, TOKENS, model.hidden), _empty(torch.float32, rows, wide)
    base, scale, norm = _empty(torch.float32, rows), _empty(torch.float32, 3), _empty(model.dtype, model.hidden)
    for launch in streams.read_launches(of_all, weights, base, scale, norm, 20, 1e-6, 1e-6, out, post, mixing):
        yield Case("streams", launch.kernel.__name__, launch)
    yield Case("streams", "write", streams.write_launch(of_all, out, post, mixing))
    logits, bias = _empty(torch.float32, TOKENS, model.experts), _empty(torch.float32, model.experts)
    numbers, shares = _empty(torch.int32, TOKENS, model.each), _empty(torch.float32, TOKENS, model.each)
    yield Case("router", "scored", streams.score_launch(logits, bias, None, 1.5, numbers, shares))
    yield Case("router", "hashed", streams.score_launch(logits, None, numbers, 1.5, numbers, shares))


def _entries(model: Compressed) -> Iterator[Case]:
    index, table = _empty(torch.int32, TOKENS), _empty(torch.float32, CONTEXT, ROTATED)
    x, norm = _empty(torch.float32, TOKENS, HEAD_DIM), _empty(model.dtype, HEAD_DIM)
    yield Case("latent rows", "", latent.rows_launch(x, norm, index, table, 1e-6, _cache(model.dtype, HEAD_DIM), index))
    starts, context, tables = _runs()
    for label, ratio, spans, width in (("4 tokens", 4, 2, HEAD_DIM), ("128", 128, 1, HEAD_DIM), ("4, keys", 4, 2, 128)):
        columns = spans * width
        both = _empty(torch.float32, TOKENS, columns)
        for launch in latent.compress_launches(
            both, both, _empty(torch.float32, ratio, columns), index, starts, index,
            _cache(torch.float32, 2 * columns), tables, context, _cache(model.dtype, width, ratio), tables,
            _empty(model.dtype, width), table, 1e-6,
        ):  # fmt: skip
            yield Case("entries", f"{launch.kernel.__name__}, {label}", launch)


def _choice(model: Compressed) -> Iterator[Case]:
    starts, _, tables = _runs()
    queries, weights = (
        _empty(torch.float32, TOKENS, INDEX_HEADS * INDEX_DIM),
        _empty(torch.float32, TOKENS, INDEX_HEADS),
    )
    for launch in indexer.launches(
        queries, weights, _empty(torch.int32, TOKENS), starts, _cache(model.dtype, INDEX_DIM, 4), tables,
        _empty(torch.float32, CONTEXT, ROTATED), 4, model.chosen, 0.01, _empty(torch.int32, TOKENS, model.chosen),
    ):  # fmt: skip
        yield Case("indexer", launch.kernel.__name__, launch)


def _attention(model: Compressed, kind: str) -> Launch:
    starts, context, tables = _runs()
    ratio = {"all entries": 128, "chosen entries": 4}.get(kind)
    return latent.attention_launch(
        _empty(torch.float32, TOKENS, model.heads * HEAD_DIM), _empty(torch.int32, TOKENS), starts,
        _empty(torch.float32, CONTEXT, ROTATED), _empty(torch.float32, model.heads), _cache(model.dtype, HEAD_DIM),
        tables, context, WINDOW, HEAD_DIM**-0.5, 1e-6, 0,
        _empty(model.dtype, TOKENS, HEAD_DIM) if kind == "block" else None,
        _cache(model.dtype, HEAD_DIM, ratio) if ratio else None, tables if ratio else None, ratio or 1,
        _empty(torch.int32, TOKENS, model.chosen) if ratio == 4 else None,
        _empty(model.dtype, TOKENS, model.heads * HEAD_DIM),
    )  # fmt: skip


def _runs() -> tuple[Tensor, Tensor, Tensor]:
    """First tokens, contexts and block tables of the runs."""
    tables = _empty(torch.int32, RUNS, CONTEXT // BLOCK_SIZE)
    return _empty(torch.int32, RUNS + 1), _empty(torch.int32, RUNS), tables


def _cache(dtype: torch.dtype, width: int, every: int = 1) -> Tensor:
    return _empty(dtype, 64, BLOCK_SIZE // every, 1, width)


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
