"""Runs laid out on the device, padded or not, against `Batch.of`, which lays them out on the host."""

import random

import pytest
import torch
from torch import Tensor

from dspark_server.runtime.batch import Batch, Run
from dspark_server.runtime.layout import lay_out, lay_out_blocks
from dspark_server.runtime.paging import BlockTable, CacheGroup, tables_for
from dspark_server.speculation.prefix_scheduler import Ranked, keep_likeliest

from .twin import AWAY, Far, TwinDevice, TwinError

GAMMA, BLOCKS, MOST = 3, 64, 6
GROUPS = CacheGroup(4), CacheGroup(2, reach=7)
SCRATCH = [group.block_size * BLOCKS for group in GROUPS]


def random_tables(source: random.Random, context: int, end: int) -> list[BlockTable]:
    return tables_for(GROUPS, iter(source.sample(range(BLOCKS), BLOCKS)), context, end)


def stale_tables(tables: list[list[BlockTable]], most: int, width: int = 20) -> dict[str, Tensor]:
    """Staged tables; the rows and columns that are not used hold those of a step before."""
    fields = {}
    for index in range(len(GROUPS)):
        if GROUPS[index].reach is not None:
            fields[f"first{index}"] = torch.tensor([each[index].first for each in tables] + [0] * (most - len(tables)))
        rows = torch.full((most, width), BLOCKS - 1, dtype=torch.int32)
        for row, each in zip(rows, tables, strict=False):
            row[: len(each[index].blocks)] = torch.tensor(each[index].blocks, dtype=torch.int32)
        fields[f"tables{index}"] = rows
    return fields


def random_runs(source: random.Random) -> tuple[list[Run], list[int], list[int], Tensor]:
    """Runs without their drafts, each one's row of the drafts (-1: none), lengths by row, and drafts [MOST, GAMMA]."""
    count = source.randint(1, MOST)
    drafts = torch.tensor([[source.randrange(100, 200) for _ in range(GAMMA)] for _ in range(MOST)])
    rows = source.sample(range(MOST), count)
    lengths = [source.randint(0, GAMMA) for _ in range(MOST)]
    runs = []
    for index in range(count):
        length, context = source.randint(1, 5), source.randint(0, 20)
        tables = random_tables(source, context, context + length + GAMMA + source.randint(0, 8))
        wanted = source.choice([0, 1, 1, length])
        if wanted != 1 or source.random() < 0.3:
            rows[index] = -1
        runs.append(Run([source.randrange(100) for _ in range(length)], context, tables, wanted))
    return runs, rows, lengths, drafts


def staged(runs: list[Run], rows: list[int]) -> dict[str, Tensor]:
    def column(values: list[int], size: int = MOST) -> Tensor:
        return torch.tensor(values + [0] * (size - len(values)))

    return {
        "tokens": column([token for run in runs for token in run.tokens], 40),
        "count": column([len(run.tokens) for run in runs]),
        "context": column([run.context_len for run in runs]),
        "rows": column([run.logits_rows for run in runs]),
        "draft_row": column([row + 1 for row in rows]),
        **stale_tables([list(run.tables) for run in runs], MOST),
    }


@pytest.mark.parametrize("seed", range(200))
def test_a_layout_is_that_of_the_host(seed: int) -> None:
    source = random.Random(seed)
    runs, rows, lengths, drafts = random_runs(source)
    whole = [
        Run(
            run.tokens + (drafts[row, : lengths[row]].tolist() if row >= 0 else []),
            run.context_len,
            run.tables,
            run.logits_rows + (lengths[row] if row >= 0 else 0),
        )
        for run, row in zip(runs, rows, strict=True)
    ]
    wanted = Batch.of(whole, GROUPS)
    real, count = len(wanted.tokens), len(runs)
    size = real + source.randint(0, 9)
    made = lay_out(size, staged(runs, rows), drafts, torch.tensor(lengths), GROUPS, SCRATCH)
    batch = made.batch
    for name in ("tokens", "positions"):
        mine, its = getattr(batch, name), getattr(wanted, name)
        assert mine.dtype == its.dtype
        assert mine[:real].tolist() == its.tolist(), name
    slots = min(size, MOST)
    for own, theirs, scratch in zip(batch.paging, wanted.paging, SCRATCH, strict=True):
        assert own.slots.dtype == theirs.slots.dtype
        assert own.slots.tolist() == theirs.slots.tolist() + [scratch] * (size - real)
        assert own.context_len.tolist() == theirs.context_len.tolist() + [0] * (slots - count)
        assert own.block_tables[:count, : theirs.block_tables.shape[1]].shape == theirs.block_tables.shape
    assert batch.query_start.tolist() == wanted.query_start.tolist() + [real] * (slots - count)
    asked = wanted.row_start[-1]
    assert made.row_start.tolist() == wanted.row_start + [asked] * (slots - count)
    assert batch.logits_index.tolist() == wanted.logits_index.tolist() + [0] * (size - asked)
    assert made.drafted.tolist()[:count] == [lengths[row] if row >= 0 else 0 for row in rows]


@pytest.mark.parametrize("requests", [1, 2, 4])
def test_blocks_are_laid_out_as_on_the_host(requests: int) -> None:
    source = random.Random(requests)
    positions = [source.randint(0, 20) for _ in range(requests)]
    tables = [random_tables(source, position, position + GAMMA) for position in positions]
    runs = [
        Run([7 + i, *[99] * (GAMMA - 1)], position, each, GAMMA)
        for i, (position, each) in enumerate(zip(positions, tables, strict=True))
    ]
    wanted = Batch.of(runs, GROUPS)
    rest = [0] * (4 - requests)
    fields = {
        "requests": torch.tensor([requests]),
        "anchors": torch.tensor([7 + i for i in range(requests)] + rest),
        "positions": torch.tensor(positions + rest),
        **stale_tables(tables, 4),
    }
    batch = lay_out_blocks(4, GAMMA, fields, 99, GROUPS, SCRATCH)
    real = requests * GAMMA
    for name in ("tokens", "positions"):
        assert getattr(batch, name)[:real].tolist() == getattr(wanted, name).tolist(), name
    for own, theirs, scratch in zip(batch.paging, wanted.paging, SCRATCH, strict=True):
        assert own.slots.tolist() == theirs.slots.tolist() + [scratch] * (4 * GAMMA - real)
        assert own.context_len.tolist()[:requests] == theirs.context_len.tolist()
    assert batch.query_start.tolist() == wanted.query_start.tolist() + [real] * len(rest)


@pytest.mark.parametrize("seed", range(100))
def test_the_device_keeps_what_the_host_ranks_first(seed: int) -> None:
    """Ties, zeros, NaN and a count beyond what there is, too."""
    source = torch.Generator().manual_seed(seed)
    chances = torch.rand((5, GAMMA), generator=source).mul(4).round().div(4)
    chances[torch.rand((5, GAMMA), generator=source) < 0.1] = torch.nan
    survival = chances.cumprod(1)
    limits = torch.randint(0, GAMMA + 1, (5,), generator=source)
    ranked = Ranked.of(survival, limits.tolist())
    for count in (0, 1, 4, 7, 20):
        assert keep_likeliest(survival, limits, torch.tensor([count])).tolist() == ranked.first(count)


# ---- the twin itself: it refuses what CUDA would ------------------------------------------------------------------


def test_a_replay_repeats_operations_not_python() -> None:
    """Numbers stay what they were, static inputs are read anew, results keep their place."""
    with TwinDevice() as device:
        source, factor = device.zeros((3,), torch.float32), [2.0]
        graph = device.capture(lambda: (source + 1)[1:] * factor[0])
        factor[0] = 5.0
        source += 1
        place = graph.result.near.data_ptr()  # type: ignore[attr-defined]
        graph.replay()
        assert graph.result.tolist() == [4.0, 4.0]
        assert graph.result.near.data_ptr() == place  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(3).to(AWAY) + x,
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x + torch.tensor([1.0], device=AWAY),
    ],
)
def test_what_a_graph_may_not_hold_is_refused(work: object) -> None:
    with TwinDevice() as device:
        x = device.zeros((3,), torch.float32)
        with pytest.raises(TwinError):
            device.capture(lambda: work(x))  # type: ignore[operator]


def test_looks_outside_of_a_graph_are_counted() -> None:
    with TwinDevice() as device:
        x = device.zeros((3,), torch.float32)
        assert float(x[0]) == 0.0
        assert isinstance(torch.ones(3).to(x.device), Far)
        assert len(device.surprises) == 1
        with pytest.raises(TwinError, match="mixes"):
            x + torch.ones(3)
