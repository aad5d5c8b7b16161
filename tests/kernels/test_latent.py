"""DeepSeek-V4's operations: the native kernels against plain torch, and that a token's result is its own."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from dspark_kernels import Kernels, load
from dspark_kernels.reference import ReferenceKernels
from torch import Tensor

REFERENCE = ReferenceKernels()
TOLERANCES = {torch.float32: {"atol": 2e-5, "rtol": 2e-5}, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@pytest.fixture(scope="module")
def native() -> Kernels:
    return load("native")


def some(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def table(positions: int, rotated: int) -> Tensor:
    angles = torch.outer(torch.arange(positions).float(), 1e4 ** (-torch.arange(rotated // 2) / (rotated // 2)))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@pytest.mark.parametrize(("tokens", "streams", "width"), [(1, 4, 64), (7, 2, 20), (70, 4, 576), (3, 8, 33)])
@dtypes
def test_streams(native: Kernels, tokens: int, streams: int, width: int, dtype: torch.dtype) -> None:
    rows, wide = (2 + streams) * streams, streams * width
    given: list[Any] = [
        some(tokens, wide, dtype=dtype), some(rows, wide) * wide**-0.5, some(rows), some(3) + 1,
        some(width, dtype=dtype), 20, 1e-6, 1e-6,
    ]  # fmt: skip
    expected = REFERENCE.read_streams(*given)
    mine = native.read_streams(*given)
    for ours, theirs in zip(mine, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCES[dtype])
    alone = native.read_streams(given[0][:1], *given[1:])
    assert all(torch.equal(one, each[:1]) for one, each in zip(alone, mine, strict=True))
    streams_of = [given[0].clone(), given[0].clone()]
    for kernels, each in zip((native, REFERENCE), streams_of, strict=True):
        kernels.write_streams(each, some(tokens, width, dtype=dtype), *expected[1:])
    torch.testing.assert_close(*streams_of, **TOLERANCES[dtype])


@pytest.mark.parametrize("hashed", [False, True])
def test_scores_of_experts(native: Kernels, hashed: bool) -> None:
    """Of equal ones the lower is chosen; logits beyond what exp can say are their own softplus."""
    logits = some(40, 24) * 4
    logits[3, :5], logits[4], logits[5, 7] = 200.0, 1.0, -300.0
    bias, given = (None, torch.rand(40, 24).argsort(1)[:, :4]) if hashed else (some(24) * 0.2, None)
    if bias is not None:
        bias[8] = bias[9] = 0.5
    mine, theirs = (kernels.score_experts(logits, bias, given, 4, 1.5) for kernels in (native, REFERENCE))
    assert torch.equal(mine[0], theirs[0])
    torch.testing.assert_close(mine[1], theirs[1])


@dataclass
class Paged:
    """Runs of tokens over scattered blocks: counts[i] tokens of run i after contexts[i]."""

    counts: list[int]
    contexts: list[int]

    def __post_init__(self) -> None:
        self.noise = torch.Generator().manual_seed(3)
        starts = torch.tensor([0, *self.counts]).cumsum(0)
        self.query_start = starts.int()
        pairs = list(zip(self.counts, self.contexts, strict=True))
        self.positions = torch.cat([torch.arange(context, context + count) for count, context in pairs]).int()
        self.context = torch.tensor(self.contexts).int()
        self.run = torch.arange(len(pairs)).repeat_interleave(torch.tensor(self.counts))

    def cache(self, size: int, width: int, dtype: torch.dtype, every: int = 1) -> tuple[Tensor, Tensor]:
        """A cache whose blocks lie apart, and tables for every row of the runs."""
        most = max(count + context for count, context in zip(self.counts, self.contexts, strict=True))
        blocks = -(-most // (size * every))
        order = torch.randperm(blocks * len(self.counts), generator=self.noise).int().view(len(self.counts), blocks)
        whole = torch.randn(order.numel(), size + 1, 1, width, generator=self.noise).to(dtype)
        return whole[:, :size], order

    def slots(self, size: int, tables: Tensor) -> Tensor:
        block = tables[self.run, self.positions.long() // size]
        return (block * size + self.positions % size).int()


CASES = [Paged([1], [0]), Paged([6, 1, 130], [3, 127, 0]), Paged([1, 1, 6], [260, 31, 122])]


@pytest.mark.parametrize("case", CASES)
@dtypes
def test_rows(native: Kernels, case: Paged, dtype: torch.dtype) -> None:
    caches = [case.cache(8, 48, dtype) for _ in range(2)]
    wide, norm, cos_sin = some(len(case.positions), 100), some(48, dtype=dtype), table(300, 16)
    for kernels, (cache, _) in zip((native, REFERENCE), caches, strict=True):
        cache.zero_()
        given = (wide[:, 10:58], norm, case.positions, cos_sin, 1e-6)
        assert kernels.latent_rows(*given, cache, case.slots(8, caches[0][1])) is None
    torch.testing.assert_close(caches[0][0], caches[1][0], **TOLERANCES[dtype])
    rows = [kernels.latent_rows(*given) for kernels in (native, REFERENCE)]
    torch.testing.assert_close(*rows, **TOLERANCES[dtype])


@pytest.mark.parametrize(("ratio", "spans", "width"), [(4, 2, 32), (128, 1, 48), (4, 2, 20)])
@pytest.mark.parametrize("case", CASES)
@dtypes
def test_entries(native: Kernels, case: Paged, ratio: int, spans: int, width: int, dtype: torch.dtype) -> None:
    """Raw rows are the same to the last bit, entries nearly so; the first run alone writes the same to the last bit."""
    columns = spans * width
    raw, raw_tables = case.cache(8, 2 * columns, torch.float32)
    entries, entry_tables = case.cache(4, width, dtype, every=ratio)
    wide = some(len(case.positions), 2 * columns + 5)
    places, norm, cos_sin = some(ratio, columns), some(width, dtype=dtype), table(300, 8)
    slots = case.slots(8, raw_tables)

    def run(kernels: Kernels, tokens: int, runs: int) -> tuple[Tensor, Tensor]:
        kept, written = raw.clone(), entries.clone()
        kernels.compress(
            wide[:tokens, :columns], wide[:tokens, 5 : columns + 5], places, case.positions[:tokens],
            case.query_start[: runs + 1], slots[:tokens], kept, raw_tables[:runs], case.context[:runs], written,
            entry_tables[:runs], norm, cos_sin, 1e-6,
        )  # fmt: skip
        return kept, written

    together, plain = (run(kernels, len(wide), len(case.counts)) for kernels in (native, REFERENCE))
    assert torch.equal(together[0], plain[0])
    torch.testing.assert_close(together[1], plain[1], **TOLERANCES[dtype])
    alone, own = run(native, case.counts[0], 1), (raw_tables[0].long(), entry_tables[0].long())
    assert all(torch.equal(mine[rows], its[rows]) for mine, its, rows in zip(alone, together, own, strict=True))


@pytest.mark.parametrize("most", [1, 8, 100])
@pytest.mark.parametrize("case", CASES)
@dtypes
def test_choices(native: Kernels, case: Paged, most: int, dtype: torch.dtype) -> None:
    heads, width = 5, 24
    keys, tables = case.cache(4, width, dtype, every=4)
    tokens = len(case.positions)
    queries, weights = some(tokens, heads * width + 7)[:, 7:], some(tokens, heads + 3)[:, 3:]
    given = (case.positions, case.query_start, keys, tables, table(300, 8), 4, most, 0.1)
    chosen = native.choose_entries(queries, weights, *given)
    assert torch.equal(chosen, REFERENCE.choose_entries(queries, weights, *given))


def test_of_equal_scores_the_lower_entries_are_chosen(native: Kernels) -> None:
    """Every score is 0 where all products are negative."""
    case = Paged([1, 3], [200, 97])
    keys, tables = case.cache(4, 16, torch.float32, every=4)
    keys.abs_()
    queries, weights = -some(4, 48).abs(), some(4, 3)
    cos_sin = torch.cat([torch.ones(300, 2), torch.zeros(300, 2)], dim=1)
    for kernels in (native, REFERENCE):
        given = (case.positions, case.query_start, keys, tables, cos_sin, 4, 6, 1.0)
        assert kernels.choose_entries(queries, weights, *given).tolist() == [[0, 1, 2, 3, 4, 5]] * 4


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *((kind, case) for kind in ("window", "first key", "all entries", "chosen") for case in CASES),
        ("block", Paged([5, 5, 5], [0, 3, 200])),
        ("block", Paged([4], [17])),
    ],
)
@dtypes
def test_attention(native: Kernels, kind: str, case: Paged, dtype: torch.dtype) -> None:
    """And a run alone has the same result, to the last bit."""
    heads, width, seen = 6, 40, 16
    window, tables = case.cache(8, width, dtype)
    tokens = len(case.positions)
    queries, cos_sin, sinks = some(tokens, heads * width + 9)[:, 9:], table(300, 16), some(heads)
    more: dict[str, Any] = {"first_key": 1} if kind == "first key" else {}
    if kind in ("all entries", "chosen"):
        entries, entry_tables = case.cache(4, width, dtype, every=4)
        more = {"entries": entries, "entry_tables": entry_tables, "ratio": 4}
    if kind == "chosen":
        visible = ((case.positions.long() + 1) // 4).unsqueeze(1)
        order = torch.rand(tokens, 80, generator=case.noise).masked_fill(torch.arange(80) >= visible, 2.0)
        some_of = order.argsort(1)[:, :5].sort(1).values
        more["chosen"] = torch.where(some_of < visible, some_of, -1).sort(1, descending=True).values.int()
    if kind == "block":
        more["own"] = some(tokens, width, dtype=dtype)
    place = (window, tables, case.context, seen, width**-0.5, 1e-6)
    given = (queries, case.positions, case.query_start, cos_sin, sinks)
    mine, theirs = (kernels.latent_attention(*given, *place, **more) for kernels in (native, REFERENCE))
    torch.testing.assert_close(mine, theirs, **TOLERANCES[dtype])
    rows = slice(0, case.counts[0])
    one = {name: each[:1] if name == "entry_tables" else each[rows] if name in ("chosen", "own") else each
           for name, each in more.items()}  # fmt: skip
    alone = native.latent_attention(
        queries[rows], case.positions[rows], case.query_start[:2], cos_sin, sinks, window, tables[:1], case.context[:1],
        *place[3:], **one,
    )  # fmt: skip
    assert torch.equal(alone, mine[rows])
