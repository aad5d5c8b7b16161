"""Lays out a step's runs on the device, as `Batch.of` does on the host; the host need not know every length.

Shapes: N token slots of the bucket, of which the first n are real, R run slots, Rd rows of drafts, gamma draft tokens
each, W block-table width, T committed tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_server.runtime.batch import Batch, Paging
from dspark_server.runtime.paging import BlockTable, CacheGroup
from dspark_server.runtime.staging import Field


@dataclass(frozen=True)
class Layout:
    """The batch; row_start [R+1] int64, each run's first row of logits; drafted [R] int64, its draft length."""

    batch: Batch
    row_start: Tensor
    drafted: Tensor


def table_fields(groups: Sequence[CacheGroup], most: int, longest: int, run: int) -> dict[str, Field]:
    """Staged fields of the block tables of `most` requests: up to `longest` tokens, `run` of them in a step."""
    fields: dict[str, Field] = {}
    for index, group in reversed(list(enumerate(groups))):  # the longest table last: only its used rows are sent
        if group.reach is not None:
            fields[f"first{index}"] = ((most,), torch.int64)
        fields[f"tables{index}"] = ((most, group.blocks_between(0, group.most_kept(longest) + run) + 1), torch.int32)
    return fields


def staged_tables(groups: Sequence[CacheGroup], tables: Sequence[Sequence[BlockTable]]) -> dict[str, Any]:
    """Block tables of R runs in each group, [R, W] padded with zeros; in groups with a reach each one's first token."""
    fields: dict[str, Any] = {}
    for index in reversed(range(len(groups))):
        own = [each[index] for each in tables]
        width = max((len(table.blocks) for table in own), default=0)
        rows = [table.blocks + [0] * (width - len(table.blocks)) for table in own]
        if groups[index].reach is not None:
            fields[f"first{index}"] = [table.first for table in own]
        fields[f"tables{index}"] = torch.tensor(rows, dtype=torch.int32).view(len(own), width)
    return fields


def lay_out(
    size: int,
    staged: Mapping[str, Tensor],
    draft_tokens: Tensor,
    draft_lengths: Tensor,
    groups: Sequence[CacheGroup],
    scratch: Sequence[int],
) -> Layout:
    """Lay out the first R = min(size, run slots) staged runs as a batch of N = `size` tokens, without host reads.

    staged: tokens [T] int64, the committed ones of all runs; count [.] int64, the number of a run's own; context [.];
    rows [.], its rows of logits before any draft; draft_row [.], its row of the drafts plus one, 0: none; for each
    group G of caches tablesG [., W] int32, its block table, and in one with a reach firstG [.] int64, the table's first
    token. A run is its committed tokens and the first draft_lengths[row] of draft_tokens[row]. draft_tokens [Rd, gamma]
    and draft_lengths [Rd] are int64.

    Unused run slots are empty runs after the others. Token slots n .. N belong to no run and write to slot scratch[G].
    Row j of logits is wanted for j < row_start[R]; rows beyond repeat the first token's.
    """
    runs = min(size, len(staged["count"]))
    count, context = staged["count"][:runs], staged["context"][:runs]
    row = staged["draft_row"][:runs]
    drafted = torch.where(row > 0, draft_lengths[(row - 1).clamp(min=0)], 0)
    query_start = F.pad((count + drafted).cumsum(0), (1, 0))
    row_start = F.pad((staged["rows"][:runs] + drafted).cumsum(0), (1, 0))
    slot = torch.arange(size, device=count.device)

    run = _owner(query_start, slot)
    real = slot < query_start[-1]
    offset = slot - query_start[run]
    committed = F.pad(count.cumsum(0), (1, 0))[run] + offset
    beyond = (offset - count[run]).clamp(0, draft_tokens.shape[1] - 1)
    tokens = torch.where(
        offset < count[run],
        staged["tokens"][committed.clamp(max=len(staged["tokens"]) - 1)],
        draft_tokens[(row[run] - 1).clamp(min=0), beyond],
    )
    positions = torch.where(real, context[run] + offset, 0)

    asker = _owner(row_start, slot)
    from_end = row_start[asker + 1] - slot
    logits_index = torch.where(slot < row_start[-1], query_start[asker + 1] - from_end, 0)
    batch = Batch(
        tokens=torch.where(real, tokens, 0),
        positions=positions.int(),
        query_start=query_start.int(),
        paging=_paging(staged, groups, scratch, context, run, positions, real),
        logits_index=logits_index,
        row_start=[],
    )
    return Layout(batch, row_start, drafted)


def lay_out_blocks(
    size: int,
    gamma: int,
    staged: Mapping[str, Tensor],
    mask_token: int,
    groups: Sequence[CacheGroup],
    scratch: Sequence[int],
) -> Batch:
    """Lay out `size` draft blocks of gamma tokens, [anchor, mask, ...]; the first staged["requests"] [1] are real.

    staged: anchors [.] int64, positions [.] int64 of the anchors, firstG and tablesG. As above: the others are empty
    runs, and their tokens belong to none.
    """
    anchors, anchored = staged["anchors"][:size], staged["positions"][:size]
    requests = staged["requests"]
    slot, run = torch.arange(gamma, device=anchors.device), torch.arange(size * gamma, device=anchors.device) // gamma
    real = run < requests
    positions = torch.where(real, (anchored.unsqueeze(1) + slot).flatten(), 0)
    starts = torch.arange(size + 1, device=anchors.device).minimum(requests) * gamma
    return Batch(
        tokens=torch.where(slot == 0, anchors.unsqueeze(1), mask_token).flatten(),
        positions=positions.int(),
        query_start=starts.int(),
        paging=_paging(staged, groups, scratch, anchored, run, positions, real),
        logits_index=slot[:0],
        row_start=[],
    )


def _paging(
    staged: Mapping[str, Tensor],
    groups: Sequence[CacheGroup],
    scratch: Sequence[int],
    context: Tensor,
    run: Tensor,
    positions: Tensor,
    real: Tensor,
) -> tuple[Paging, ...]:
    """Places in each group of the rows of `real` tokens [N], of runs `run` [N] with `context` [R] rows before them."""

    def of(index: int, group: CacheGroup) -> Paging:
        tables, size = staged[f"tables{index}"][: len(context)], group.block_size
        kept, place = context, positions
        if group.reach is not None:
            first = staged[f"first{index}"][: len(context)]
            kept, place = context - first, torch.where(real, positions - first[run], 0)
        block = tables[run, (place // size).clamp(max=tables.shape[1] - 1)].long()
        slots = torch.where(real, block * size + place % size, scratch[index])
        return Paging(slots.int(), kept.int(), tables)

    return tuple(of(index, group) for index, group in enumerate(groups))


def _owner(starts: Tensor, slot: Tensor) -> Tensor:
    """Return the run whose share of `starts` [R+1] holds each slot [N]; the last run for slots in none."""
    return torch.searchsorted(starts[1:], slot, right=True).clamp(max=len(starts) - 2)
