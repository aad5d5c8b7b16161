"""Triton's kernels of DeepSeek-V4 against plain torch, over padded steps: empty runs, tokens of none, stale rows."""

from typing import Any

import pytest
import torch
from dspark_kernels import Kernels, load
from dspark_kernels.triton import indexer
from torch import Tensor

from .support import close, triton_kernels
from .test_latent import Paged, some, table

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

TRITON, REFERENCE = triton_kernels(), load("reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PADDED = 2  # tokens of no run behind the others
CASES = [Paged([1], [0]), Paged([6, 0, 1, 9], [3, 0, 127, 0]), Paged([0, 1, 6, 0], [0, 259, 122, 0])]
cases = pytest.mark.parametrize(("case", "dtype"), list(zip(CASES, DTYPES, strict=True)))


def padded(x: Tensor) -> Tensor:
    """Rows of tokens, and of those that belong to no run: NaN, or the first position."""
    return torch.cat([x, x.new_full((PADDED, *x.shape[1:]), torch.nan if x.is_floating_point() else 0)])


def stale(cache: Tensor, tables: Tensor, case: Paged, every: int = 1) -> Tensor:
    """The cache with NaN where no row of a run lies."""
    size, known = cache.shape[1], torch.zeros(cache.shape[:2], dtype=torch.bool)
    for run, (count, context) in enumerate(zip(case.counts, case.contexts, strict=True)):
        for row in range((count + context) // every):
            known[tables[run, row // size].long(), row % size] = True
    cache[~known] = torch.nan
    return cache


@pytest.mark.parametrize(
    ("tokens", "streams", "width", "dtype"),
    [(1, 4, 64, torch.bfloat16), (17, 2, 20, torch.float32), (3, 3, 400, torch.float16), (2, 8, 33, torch.float32)],
)
def test_streams(tokens: int, streams: int, width: int, dtype: torch.dtype) -> None:
    """And a token's own are the same to the last bit, whoever shares the call."""
    rows, wide = (2 + streams) * streams, streams * width
    given: list[Any] = [
        some(tokens, wide, dtype=dtype), some(rows, wide) * wide**-0.5, some(rows), some(3) + 1,
        some(width, dtype=dtype), 20, 1e-6, 1e-6,
    ]  # fmt: skip
    expected, mine = REFERENCE.read_streams(*given), TRITON.read_streams(*given)
    for ours, theirs in zip(mine, expected, strict=True):
        close(ours, theirs)
    alone = TRITON.read_streams(given[0][-1:], *given[1:])
    assert all(torch.equal(one, each[-1:]) for one, each in zip(alone, mine, strict=True))
    both = [given[0].clone(), given[0].clone()]
    for kernels, each in zip((TRITON, REFERENCE), both, strict=True):
        kernels.write_streams(each, some(tokens, width, dtype=dtype), *expected[1:])
    close(*both)


@pytest.mark.parametrize("hashed", [False, True])
def test_scores_of_experts(hashed: bool) -> None:
    """Of equal ones the lower is chosen; logits beyond what exp can say are their own softplus."""
    logits = some(10, 24) * 4
    logits[3, :5], logits[4], logits[5, 7], logits[6] = 200.0, 1.0, -300.0, -25.0
    bias, given = (None, torch.rand(10, 24).argsort(1)[:, :3].int()) if hashed else (some(24) * 0.2, None)
    if bias is not None:
        bias[8] = bias[9] = 0.5
    mine, theirs = (kernels.score_experts(logits, bias, given, 3, 1.5) for kernels in (TRITON, REFERENCE))
    assert torch.equal(mine[0], theirs[0])
    torch.testing.assert_close(mine[1], theirs[1])


@cases
def test_rows(case: Paged, dtype: torch.dtype) -> None:
    cache, tables = case.cache(8, 24, dtype)
    wide, norm, cos_sin = some(len(case.positions), 40), some(24, dtype=dtype), table(300, 8)
    given = (wide[:, 10:34], norm, case.positions, cos_sin, 1e-6)
    both = [cache.clone(), cache.clone()]
    slots = case.slots(8, tables)
    for kernels, each in zip((TRITON, REFERENCE), both, strict=True):
        assert kernels.latent_rows(*given, each, slots) is None
    close(*both)
    before = both[0].clone()
    TRITON.latent_rows(*given, both[0], slots * 0 - 1)
    assert torch.equal(both[0], before), "a negative slot is not written"
    mine, theirs = (kernels.latent_rows(*given) for kernels in (TRITON, REFERENCE))
    assert mine is not None
    assert theirs is not None
    close(mine, theirs)


@pytest.mark.parametrize(("ratio", "spans", "width"), [(4, 2, 20), (128, 1, 16)])
@cases
def test_entries(case: Paged, ratio: int, spans: int, width: int, dtype: torch.dtype) -> None:
    """Of windows that the runs close; tokens of no run write to one slot, and close none."""
    columns = spans * width
    raw, raw_tables = case.cache(8, 2 * columns, torch.float32)
    raw = stale(raw, raw_tables, case)
    entries, entry_tables = case.cache(2, width, dtype, every=ratio)
    wide = padded(some(len(case.positions), 2 * columns + 5))
    places, norm, cos_sin = some(ratio, columns), some(width, dtype=dtype), table(300, 8)
    scratch = torch.full((PADDED,), raw.shape[0] * 8, dtype=torch.int32)
    raw = torch.cat([raw, torch.zeros_like(raw[:1])])
    slots = torch.cat([case.slots(8, raw_tables), scratch])

    def run(kernels: Kernels) -> tuple[Tensor, Tensor]:
        kept, written = raw.clone(), entries.clone()
        kernels.compress(
            wide[:, :columns], wide[:, 5 : columns + 5], places, padded(case.positions), case.query_start, slots, kept,
            raw_tables, case.context, written, entry_tables, norm, cos_sin, 1e-6,
        )  # fmt: skip
        return kept, written

    mine, theirs = run(TRITON), run(REFERENCE)
    torch.testing.assert_close(mine[0], theirs[0], rtol=0, atol=0, equal_nan=True)
    close(mine[1], theirs[1])


@pytest.mark.parametrize("most", [1, 8, 70])
@cases
def test_choices(monkeypatch: pytest.MonkeyPatch, case: Paged, most: int, dtype: torch.dtype) -> None:
    """Some tokens' scores at a time, and some scores at a time."""
    keys, tables = case.cache(4, 24, dtype, every=4)
    keys = stale(keys, tables, case, 4)
    monkeypatch.setattr(indexer, "SCRATCH", 3 * tables.shape[1] * 4)
    monkeypatch.setattr(indexer, "SPAN", 32)
    monkeypatch.setattr(indexer, "COUNTED", 16)
    tokens = len(case.positions)
    queries, weights = padded(some(tokens, 5 * 24 + 7))[:, 7:], padded(some(tokens, 8))[:, 3:]
    given = (padded(case.positions), case.query_start, keys, tables, table(300, 8), 4, most, 0.1)
    mine, theirs = (kernels.choose_entries(queries, weights, *given)[:tokens] for kernels in (TRITON, REFERENCE))
    assert torch.equal(mine, theirs)


def test_of_equal_scores_the_lower_entries_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every score is 0, or -0, where all products are negative; then but for one. More tie than a step counts."""
    monkeypatch.setattr(indexer, "COUNTED", 4)
    case = Paged([1, 2], [200, 97])
    keys, tables = case.cache(4, 16, torch.float32, every=4)
    keys.abs_()
    queries, weights = -some(3, 48).abs(), some(3, 3)
    weights[:, 0] = -1.0
    cos_sin = torch.cat([torch.ones(300, 2), torch.zeros(300, 2)], dim=1)
    given = (case.positions, case.query_start, keys, tables, cos_sin, 4, 6, 1.0)
    assert TRITON.choose_entries(queries, weights, *given).tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    for run in range(2):
        keys[tables[run, 5].long(), 1] *= -1  # entry 21
    expected = REFERENCE.choose_entries(queries, weights.abs(), *given)
    assert expected[:, -1].tolist() == [21, 21, 21]
    assert torch.equal(TRITON.choose_entries(queries, weights.abs(), *given), expected)


@pytest.mark.parametrize(
    ("kind", "case", "dtype"),
    [
        *(("window", CASES[i], DTYPES[i]) for i in range(3)),
        *(("first key", CASES[i], DTYPES[i - 1]) for i in range(2)),
        *(("all entries", CASES[i], DTYPES[i - 2]) for i in range(3)),
        *(("chosen", CASES[i], DTYPES[i - 1]) for i in range(3)),
        ("block", Paged([3, 3, 0], [0, 200, 0]), torch.float32),
        ("block", Paged([4], [17]), torch.bfloat16),
    ],
)
def test_attention(kind: str, case: Paged, dtype: torch.dtype) -> None:
    """Nothing that a token does not see matters, nor who shares the call, to the last bit."""
    heads, width, seen, tokens = 18, 40, 16, len(case.positions)
    window, tables = case.cache(8, width, dtype)
    window = stale(window, tables, case)
    queries, cos_sin, sinks = padded(some(tokens, heads * width + 9))[:, 9:], table(300, 16), some(heads)
    more: dict[str, Any] = {"first_key": 1} if kind == "first key" else {}
    if kind in ("all entries", "chosen"):
        entries, entry_tables = case.cache(4, width, dtype, every=4)
        more = {"entries": stale(entries, entry_tables, case, 4), "entry_tables": entry_tables, "ratio": 4}
    if kind == "chosen":
        visible = ((padded(case.positions).long() + 1) // 4).unsqueeze(1)
        order = torch.rand(len(visible), 80, generator=case.noise).masked_fill(torch.arange(80) >= visible, 2.0)
        some_of = order.argsort(1)[:, :35].sort(1).values
        ascending = torch.where(some_of < visible, some_of, 99).sort(1).values
        more["chosen"] = torch.where(ascending == 99, -1, ascending).int()
    if kind == "block":
        more["own"] = some(max(case.counts) * len(case.counts), width, dtype=dtype)
    place = (window, tables, case.context, seen, width**-0.5, 1e-6)
    given = (queries, padded(case.positions), case.query_start, cos_sin, sinks)
    if kind == "block":  # all blocks have rows
        positions = torch.cat([case.positions, case.positions.new_zeros(len(more["own"]) - tokens)])
        given = (queries[:1].expand(len(positions), -1).contiguous(), positions, case.query_start, cos_sin, sinks)
    mine, theirs = (kernels.latent_attention(*given, *place, **more)[:tokens] for kernels in (TRITON, REFERENCE))
    close(mine, theirs)
    if kind == "block":
        return
    run = max(range(len(case.counts)), key=lambda run: case.counts[run])
    rows, own = slice(*case.query_start[run : run + 2].tolist()), slice(run, run + 1)
    if "entries" in more:
        more["entry_tables"] = more["entry_tables"][own]
    if "chosen" in more:
        more["chosen"] = more["chosen"][rows]
    alone = TRITON.latent_attention(
        queries[rows], case.positions[rows], torch.tensor([0, case.counts[run]]).int(), cos_sin, sinks, window,
        tables[own], case.context[own], *place[3:], **more,
    )  # fmt: skip
    assert torch.equal(alone, mine[rows])
