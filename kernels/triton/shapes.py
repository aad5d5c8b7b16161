"""The launches of a served model's step, over meta tensors, for `compile.py`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from dspark_kernels.interface import DraftedTokens, Favour, Filters
from dspark_kernels.triton import accept, attention, elementwise, experts, filter, rotary, sequential, vocabulary
from dspark_kernels.triton.launch import Gpu, Launch
from torch import Tensor

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Model:
    """A target and its drafter: layers of both, D hidden, F features, C draftable columns, r Markov rank."""

    name: str
    layers: int
    draft_layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    features: int
    vocabulary: int
    columns: int
    rank: int
    gamma: int
    qk_norm: bool
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.bfloat16
    mixture: tuple[int, int, int] = (8, 2, 768)  # experts, those of a token, their features


QWEN3_8B = Model(
    "Qwen3-8B", 36, 5, 4096, 32, 8, 128, 12288, 151936, 151936, 256, 7, qk_norm=True, mixture=(128, 8, 768)
)
SMOLLM2 = Model("SmolLM2-135M", 30, 2, 576, 9, 3, 64, 1536, 49152, 8192, 128, 5, qk_norm=False)
# Other head sizes: their attention only.
GEMMA4 = Model("Gemma4-12B, full layers", 8, 5, 3840, 16, 1, 512, 15360, 262144, 262144, 256, 7, qk_norm=True)
OTHERS = (
    GEMMA4,
    Model("Gemma4-12B, sliding layers", 40, 0, 3840, 16, 8, 256, 15360, 262144, 0, 0, 7, qk_norm=True, window=1024),
    Model("d 96, group 1", 1, 0, 3072, 32, 32, 96, 8192, 32064, 0, 0, 7, qk_norm=False),
    Model(
        "d 256, group 2, window, soft-cap",
        1,
        0,
        3584,
        16,
        8,
        256,
        14336,
        256000,
        0,
        0,
        7,
        qk_norm=True,
        window=4096,
        softcap=50.0,
    ),
)


@dataclass(frozen=True)
class Case:
    """A launch with its kernel family and its meaning."""

    family: str
    configuration: str
    launch: Launch


def cases(model: Model, gpu: Gpu) -> Iterator[Case]:
    """Every kernel of a step of `model` on `gpu`."""
    yield from attention_cases(model, gpu, model.dtype)
    yield from attention_cases(model, gpu, torch.float8_e4m3fn)
    if model in OTHERS:
        return
    rows, dtype = 256, model.dtype
    yield Case("norm", "RMSNorm", elementwise.norm_launch(*_norm(model, rows, False)))
    yield Case("norm", "add + RMSNorm", elementwise.norm_launch(*_norm(model, rows, True)))
    features = model.features
    gate_up, activated = _on_meta(dtype, (rows, 2 * features), (rows, features))
    yield Case("gate_mul", "silu", elementwise.gate_launch(gate_up, activated))
    yield Case("gate_mul", "gelu", elementwise.gate_launch(gate_up, activated, gelu=True))
    x, residual, weight = _on_meta(dtype, (rows, model.hidden), (rows, model.hidden), (model.hidden,))
    yield Case("norm_add", "", elementwise.norm_add_launch(x, residual, weight, 1e-6, 0.5))
    yield from _experts(model)
    logits = _empty(torch.float32, rows, model.vocabulary)
    for part, launch in zip(
        ("parts", "whole"), elementwise.argmax_launches(logits, _empty(torch.int64, rows)), strict=True
    ):
        yield Case("argmax", part, launch)
    for family, cache in (("rotary", dtype), ("rotary, e4m3", torch.float8_e4m3fn)):
        yield Case(family, "q, k with norm" if model.qk_norm else "q, k", _rotary(model, rows, cache))
        yield Case(family, "normalised values, the keys'", _rotary(model, rows, cache, values=True))
    yield from _drafting(model, None)
    of_all, index = _on_meta(torch.float32, (rows,), (rows,)), _empty(torch.int64, rows)
    filters = Filters(index, *of_all)
    yield from _drafting(model, filters)
    yield Case("filter_logits", "", filter.launch(logits, index, of_all[0], filters, torch.empty_like(logits)))
    for law in ("dense" if model.columns == model.vocabulary else "named", "greedy"):
        yield from _acceptance(model, law)


def attention_cases(model: Model, gpu: Gpu, cache: torch.dtype) -> Iterator[Case]:
    """Decode, verification, draft block and prefill, with and without split keys."""
    same = cache == model.dtype
    for label, runs, queries, context, causal in (
        ("decode, 1 x 1 over 8k", 1, 1, 8192, True),
        ("decode, 64 x 1", 64, 1, 1024, True),
        (f"verify, 1 x {model.gamma + 1} over 8k", 1, model.gamma + 1, 8192, True),
        (f"verify, 32 x {model.gamma + 1}", 32, model.gamma + 1, 1024, True),
        (f"draft block, 32 x {model.gamma}", 32, model.gamma, 1024, False),
        ("prefill, 1 x 2048", 1, 2048, 0, True),
    ):
        tokens, width = runs * queries, -(-(context + queries) // BLOCK_SIZE)
        heads = model.q_heads + 2 * model.kv_heads
        qkv = _empty(model.dtype, tokens, heads * model.head_dim)
        keys, values = _on_meta(cache, *[(4096 // BLOCK_SIZE, BLOCK_SIZE, model.kv_heads, model.head_dim)] * 2)
        starts, lengths = _empty(torch.int32, runs + 1), _empty(torch.int32, runs)
        out = _empty(model.dtype, tokens, model.q_heads * model.head_dim)
        for launch in attention.launches(
            qkv, model.q_heads, keys, values, starts, lengths, _empty(torch.int32, runs, width),
            model.head_dim**-0.5, causal, model.window, model.softcap, 0, out, gpu,
        ):  # fmt: skip
            chosen = launch.constants
            if launch.kernel is attention.attend:
                tile = f"{chosen['ROWS']} x {chosen['KEYS']}"
                yield Case(
                    "attention" if same else "attention, e4m3",
                    f"{label}, tile {tile}, splits {chosen['SPLITS']}",
                    launch,
                )
            elif same:  # it does not depend on the cache
                yield Case("combine", f"{label}, {chosen['SPLITS']} splits", launch)


def _norm(model: Model, rows: int, residual: bool) -> tuple[Tensor, Tensor | None, Tensor, float, Tensor]:
    x, other, out = _on_meta(model.dtype, *[(rows, model.hidden)] * 3)
    return x, other if residual else None, _empty(model.dtype, model.hidden), 1e-6, out


def _experts(model: Model) -> Iterator[Case]:
    """A decode step's few rows to an expert, and a prompt's many."""
    count, each, features = model.mixture
    gate_up, down = _on_meta(model.dtype, (count, 2 * features, model.hidden), (count, model.hidden, features))
    for tokens in (8, 2048):
        x, out = _on_meta(model.dtype, (tokens, model.hidden), (tokens, model.hidden))
        chosen, shares = _empty(torch.int32, tokens, each), _empty(torch.float32, tokens, each)
        for launch in experts.launches(x, gate_up, down, chosen, shares, out):
            gated = {True: ", gated", False: ""}[bool(launch.constants.get("GATED"))]
            yield Case("experts", f"{launch.kernel.__name__}{gated}, {tokens} tokens", launch)


def _rotary(model: Model, rows: int, cache: torch.dtype, values: bool = False) -> Launch:
    qkv = _empty(model.dtype, rows, (model.q_heads + (1 if values else 2) * model.kv_heads) * model.head_dim)
    keys, stored = _on_meta(cache, *[(4096 // BLOCK_SIZE, BLOCK_SIZE, model.kv_heads, model.head_dim)] * 2)
    norm = _empty(model.dtype, model.head_dim) if model.qk_norm else None
    table, index = _empty(torch.float32, 4096, model.head_dim), _empty(torch.int32, rows)
    return rotary.launch(qkv, index, table, index, keys, stored, model.q_heads, norm, norm, 1e-6, values)


def _drafting(model: Model, filters: Filters | None) -> Iterator[Case]:
    """The head over the model's own columns, and over so few that whole blocks are one launch."""
    family = "draft_tokens" if filters is None else "draft_tokens, filtered"
    for columns in sorted({model.columns, 2048}):
        rows, slots = 32, model.gamma
        base = _empty(torch.float32, rows, slots, columns)
        w1, w2 = _empty(model.dtype, model.vocabulary, model.rank), _empty(model.dtype, columns, model.rank)
        drawn = DraftedTokens(
            _empty(torch.int64, rows, slots),
            _empty(torch.float32, rows, slots, columns),
            _empty(torch.bool, rows, slots),
            _empty(torch.float32, rows, slots),
            _empty(torch.int64, rows),
        )
        index, chance = _empty(torch.int64, rows, slots), _empty(torch.float32, rows, slots)
        favour = Favour(index, index, drawn.on, chance, _empty(torch.bool, rows))

        def multiply(x: Tensor, columns: int = columns) -> Tensor:
            return _empty(torch.float32, len(x), columns)

        names = None if columns == model.vocabulary else _empty(torch.int64, columns)
        seen: set[object] = set()
        for launch in sequential.launches(
            base, drawn.usable, names, (w1, w2), multiply,
            _empty(torch.float32, rows), _empty(torch.float64, rows, slots), favour, filters, drawn,
        ):  # fmt: skip
            alike = filters is not None and launch.kernel in (vocabulary.slot_parts, vocabulary.slot_pick)
            if launch.kernel not in seen and not alike:  # all slots of a block are alike
                yield Case(family, f"{launch.kernel.__name__}, {columns} columns", launch)
            seen.add(launch.kernel)


def _acceptance(model: Model, law: str) -> Iterator[Case]:
    requests, width, columns = 32, model.gamma, model.columns
    whole = _empty(torch.int64, requests)
    q = None if law == "greedy" else _empty(torch.float32, requests, width, columns)
    names = _empty(torch.int64, requests, width, columns) if law == "named" else None
    coins, last = _empty(torch.float64, requests, width), _empty(torch.float64, requests, width + 1)
    logits = _empty(torch.float32, requests * (width + 1), model.vocabulary)
    seen = set()
    for family in ("accept_drafts", "accept_drafts, jointly"):
        for launch in accept.launches(
            logits, whole, whole, _empty(torch.int64, requests, width), _empty(torch.float32, requests), q, whole,
            names, coins, last, whole, whole, _empty(torch.bool, requests), family == "accept_drafts, jointly",
        ):  # fmt: skip
            depends = launch.kernel in (accept.decide, accept.joints, accept.overlaps, accept.remainder)
            alike = launch.kernel in seen and launch.kernel is not accept.remainder
            if (depends or law != "greedy") and not alike:
                name = launch.kernel.__name__
                yield Case(family, f"{name}, {law} law" if depends else name, launch)
            seen.add(launch.kernel)


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _on_meta(dtype: torch.dtype, *shapes: Sequence[int]) -> list[Tensor]:
    return [_empty(dtype, *shape) for shape in shapes]
