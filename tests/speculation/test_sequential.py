"""Blocks of mixed batches: what some requests ask for changes nobody else's draft, and slows nobody else down."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from time import monotonic
from typing import Any

import pytest
import torch
from dspark_kernels import Rules, load
from torch import Tensor

from dspark_server.speculation.calibration import Calibration
from dspark_server.speculation.controls import Controls, Forbidden, Penalties
from dspark_server.speculation.copying import CopyBias, CopyTables, Match
from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.heads import ConfidenceHead, VanillaHead
from dspark_server.speculation.noise import CounterStreams
from dspark_server.speculation.sampling import SamplingBatch
from dspark_server.speculation.sequential import BlockSampler, Drawing

GAMMA, VOCABULARY, WIDTH, RANK, REQUESTS = 4, 120, 16, 8, 14
STYLES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"coupled": True, "top_k": 20},
    {"min_p": 0.05, "controls": Forbidden((0, 1, 2, 3), 22)},
    {"temperature": 0.0, "controls": Forbidden(tuple(range(40)), 21)},
]
DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "coupled": False, "controls": None}


def batch_of(requests: list[int]) -> SamplingBatch:
    options = [STYLES[i % len(STYLES)] for i in requests]
    columns = {name: [option.get(name, value) for option in options] for name, value in DEFAULTS.items()}
    return SamplingBatch.of(position=[20] * len(requests), key=requests, draft_number=[2] * len(requests), **columns)


def copies_of(requests: list[int], sampling: SamplingBatch) -> CopyBias:
    matches = [Match(5, [7, 90 + i, 3, 4]) if i % 3 else None for i in requests]
    return CopyBias(matches, GAMMA, sampling.temperature, CopyTables())


class Drafter:
    def __init__(self, named: bool) -> None:
        noise = torch.Generator().manual_seed(5)
        kernels = load()
        names = torch.randperm(VOCABULARY, generator=noise)[:60].sort().values if named else None
        columns = 60 if named else VOCABULARY
        w1, w2 = (torch.randn(n, RANK, generator=noise).bfloat16() for n in (VOCABULARY, columns))
        confidence = ConfidenceHead(torch.randn(1, WIDTH + RANK, generator=noise) / 4, torch.zeros(1), with_markov=True)
        self.sampler = BlockSampler(
            VOCABULARY, VanillaHead(w1, w2, kernels), confidence, Calibration.identity(GAMMA), names, kernels
        )
        self.hidden = torch.randn(REQUESTS, GAMMA, WIDTH, generator=noise)
        self.base = torch.randn(REQUESTS, GAMMA, columns, generator=noise) * 2
        self.anchors = torch.randint(VOCABULARY, (REQUESTS,), generator=noise)

    def draft(self, requests: list[int]) -> tuple[DraftBlock, CopyBias]:
        sampling, rows = batch_of(requests), torch.tensor(requests)
        copies = copies_of(requests, sampling)
        block = self.sampler.sample(
            self.hidden[rows], self.base[rows], self.anchors[rows], sampling, CounterStreams(), copies
        )
        return block, copies


@pytest.mark.parametrize("named", [False, True])
def test_a_mixed_batch_drafts_what_each_request_drafts_alone(named: bool) -> None:
    drafter = Drafter(named)
    together, copies = drafter.draft(list(range(REQUESTS)))
    assert together.q is not None
    for i in range(REQUESTS):
        alone, alone_copies = drafter.draft([i])
        assert torch.equal(together.tokens[i], alone.tokens[0])
        assert torch.equal(together.usable[i], alone.usable[0])
        assert torch.equal(copies.on[i], alone_copies.on[0])
        torch.testing.assert_close(copies.odds[i], alone_copies.odds[0])
        for name in ("confidence", "survival"):
            torch.testing.assert_close(getattr(together, name)[i], getattr(alone, name)[0])
        style = STYLES[i % len(STYLES)]
        if style.get("temperature") != 0.0 and not style.get("coupled"):
            assert alone.q is not None
            torch.testing.assert_close(together.q[i], alone.q[0])
            if alone.columns is not None:
                assert together.columns is not None
                assert torch.equal(together.columns[i], alone.columns[0])


def test_requests_without_a_seed_or_a_grammar_keep_the_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, sizes = Drafter(named=True), []
    slow = drafter.sampler._slot_by_slot

    def counted(hidden: Tensor, *rest: Any) -> DraftBlock:
        sizes.append(len(hidden))
        return slow(hidden, *rest)

    monkeypatch.setattr(drafter.sampler, "_slot_by_slot", counted)
    drafter.draft([0, 1, 2, 4, 5])
    drafter.draft([0, 1, 2, 3, 4, 5])
    assert sizes == [1]
    monkeypatch.setitem(STYLES[4], "controls", Worded((0, 1), 22))
    drafter.draft([0, 1, 2, 3, 4, 5])
    assert sizes == [1, 2]


class Worded(Forbidden):
    """Controls that cannot be said as data, as those of a grammar."""

    @cached_property
    def rules(self) -> Rules | None:
        return None


class Late(Worded):
    """Controls that are not ready after an even token; the wait for them ends within the step's."""

    def ready(self, drafted: Sequence[int], deadline: float) -> bool:
        assert deadline <= monotonic() + 0.005
        return not drafted or drafted[-1] % 2 == 1


@pytest.mark.parametrize("style", [{"temperature": 0.0}, {}, {"coupled": True, "top_k": 20}])
def test_a_draft_ends_where_its_controls_are_late(style: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At a slot that the tokens before it decide; those, and their probabilities, are the same."""
    drafter = Drafter(named=False)
    blocks = []
    for control in (Worded((0,), 22), Late((0,), 22)):
        monkeypatch.setattr("tests.speculation.test_sequential.STYLES", [style | {"controls": control}])
        blocks.append(drafter.draft(list(range(REQUESTS)))[0])
    whole, ended = blocks
    assert whole.usable.tolist() == [GAMMA] * REQUESTS
    for i, row in enumerate(whole.tokens.tolist()):
        length = next((k + 1 for k, token in enumerate(row) if token % 2 == 0), GAMMA)
        assert ended.usable[i] == length
        assert ended.tokens[i, :length].tolist() == row[:length]
        if whole.q is not None and ended.q is not None:
            assert torch.equal(ended.q[i, :length], whole.q[i, :length])
    assert len(set(ended.usable.tolist())) > 2


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("width", [1, 2])
def test_slots_drawn_one_by_one_are_those_drawn_together(named: bool, width: int) -> None:
    """Noise, rules, copies and broken logits are those of each slot's own place, whatever the passes of the drafter."""
    drafter, requests = Drafter(named), list(range(REQUESTS))
    sampler = BlockSampler(VOCABULARY, None, None, Calibration.identity(GAMMA), drafter.sampler.draft_tokens, load())
    drafter.base[3, 2] = torch.nan
    drafter.base[6, 0] = torch.nan

    def sampling() -> SamplingBatch:
        batch = batch_of(requests)
        penalised = Controls(
            VOCABULARY,
            [1, 2, 3],
            penalties=Penalties(1.0, 1.9, 0.0),
            bias=(),
            allowed=None,
            bad_words=(),
            early=None,
            grammar=None,
        )
        controls = tuple(penalised if i in (1, 7) else each for i, each in enumerate(batch.controls))
        return replace(batch, controls=controls)

    drafter.base[1, :, 5] = 9.0  # without the penalty of those before, this column is drawn again and again
    whole_copies, copies = copies_of(requests, sampling()), copies_of(requests, sampling())
    whole = sampler.sample(
        drafter.hidden, drafter.base, drafter.anchors, sampling(), CounterStreams(), whole_copies, patience=60
    )
    drawing = Drawing(sampler, drafter.anchors, sampling(), CounterStreams(), copies)
    drawing._patience = 60
    for slot in range(0, GAMMA, width):
        here = slice(slot, slot + width)
        drawing.draw(drafter.hidden[:, here], drafter.base[:, here])
    block = drawing.block(GAMMA)
    assert whole.q is not None
    assert block.q is not None
    assert torch.equal(block.usable, whole.usable)
    for i, usable in enumerate(whole.usable.tolist()):
        assert torch.equal(block.tokens[i, :usable], whole.tokens[i, :usable])
        assert torch.equal(copies.on[i, :usable], whole_copies.on[i, :usable])
        torch.testing.assert_close(copies.odds[i, :usable], whole_copies.odds[i, :usable])
        if STYLES[i % len(STYLES)].get("temperature", 1.0):  # a greedy row's q is not read
            mine, all_of_it = block.q[i, :usable], whole.q[i, :usable]
            if block.columns is not None and whole.columns is not None:
                # Where a block has left a copied text, one of them may still have a column for the token to be copied.
                same = block.columns[i, :usable] == whole.columns[i, :usable]
                mine, all_of_it = mine[same], all_of_it[same]
            torch.testing.assert_close(mine, all_of_it)
    assert not torch.equal(copies.on, torch.zeros_like(copies.on))
    assert len(whole.tokens[1].unique()) > 1
    short = Drawing(sampler, drafter.anchors, sampling(), CounterStreams(), None)
    short.draw(drafter.hidden[:, :width], drafter.base[:, :width])
    assert short.block(GAMMA).tokens.shape == (REQUESTS, GAMMA)
    assert int(short.block(GAMMA).usable.max()) == width
