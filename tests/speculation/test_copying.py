"""Copies from the context: found where they are, favoured as long as they are followed, believed as the tables say."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_server.speculation.copy_drafter import Copying
from dspark_server.speculation.copying import ALONE_WEIGHT, BUCKETS, ContextIndex, CopyBias, CopyTables, Match, buckets
from dspark_server.speculation.draft_block import DraftBlock, DraftRequest, Source
from dspark_server.speculation.drafter import NoDrafter
from dspark_server.speculation.history import SurvivalHistory

TABLES = CopyTables()


def stood_before(tokens: Sequence[int]) -> dict[int, int]:
    """Place (of what followed) -> length of the suffix of `tokens` that ends there, for every earlier place."""
    found = {}
    for end in range(1, len(tokens)):
        length = 0
        while length < min(end, BUCKETS[-1]) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= 2:
            found[end] = length
    return found


def match_all(index: ContextIndex, tokens: Sequence[int], width: int) -> Match | None:
    """A match in all that ended before now."""
    index.enter(tokens, len(tokens))
    return index.match(tokens, width)


@given(st.lists(st.integers(0, 3), max_size=120), st.randoms(use_true_random=False))
def test_matches_are_real_and_as_good_as_promised(tokens: list[int], source: object) -> None:
    """However the sequence grew: a match is a place where the suffix stood; one is found whenever there is one."""
    index, length = ContextIndex(), 0
    while length < len(tokens):
        length = min(len(tokens), length + source.randint(1, 9))  # type: ignore[attr-defined]
        seen = tokens[:length]
        match, possible = match_all(index, seen, 6), stood_before(seen)
        if match is None:
            assert not possible
            continue
        continued = [[seen[(end + k) if end + k < length else end + (k % (length - end))] for k in range(6)]
                     for end, its in possible.items() if its == match.length]  # fmt: skip
        assert match.tokens in continued
        # A four-gram is preferred to a pair; nothing promises the very longest.
        assert match.length >= (4 if max(possible.values()) >= 4 else 2)


def test_a_running_match_is_kept() -> None:
    """A text that goes on as it did before keeps its place, though the same pair has been seen since."""
    period = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    tokens, index = [*period, 0, *period[:9]], ContextIndex()
    match = match_all(index, tokens, 2)
    assert match == Match(9, [10, 0])
    tokens += [10, 0]
    assert match_all(index, tokens, 2) == Match(11, [1, 2])


def test_a_loop_is_continued_past_its_end() -> None:
    assert match_all(ContextIndex(), [9, 1, 2, 3, 1, 2, 3], 7) == Match(3, [1, 2, 3, 1, 2, 3, 1])


def ends_of(index: ContextIndex) -> list[dict[tuple[int, ...], int]]:
    """Last end of each n-gram that an index knows."""
    return [shared | own for shared, own in zip(index.prompt.ends, index._own.ends, strict=True)]


@given(st.integers(0, 60), st.lists(st.integers(1, 9), max_size=80))
def test_a_prompt_is_indexed_part_by_part_once_for_all_its_answers(boundary: int, parts: list[int]) -> None:
    """Never more tokens than a step has time for; two answers share the prompt's part; the end is as if at once."""
    tokens = [token % 7 * token % 5 for token in range(90)]
    whole, first = ContextIndex(), ContextIndex(boundary)
    second = ContextIndex(boundary, first.prompt)
    spent = 0
    for part in parts:
        for index in (first, second):
            taken = index.enter(tokens, part)
            assert 0 <= taken <= part
            spent += taken
    assert spent <= boundary + 2 * (len(tokens) - boundary)
    rest = [index.enter(tokens, len(tokens)) for index in (whole, first, second)]
    assert rest[0] == len(tokens) - 1
    assert spent + sum(rest[1:]) == boundary + 2 * (len(tokens) - 1 - boundary), "a token was indexed twice"
    assert ends_of(whole) == ends_of(first) == ends_of(second)
    assert [index.enter(tokens, 9) for index in (whole, first, second)] == [0, 0, 0]


COLUMNS = torch.tensor([[2, 5, 7, 9]])


@pytest.mark.parametrize("columns", [None, COLUMNS.expand(3, -1)])
def test_the_bias_goes_to_the_copied_token_only_and_only_while_it_is_followed(columns: torch.Tensor | None) -> None:
    """Rows: a match whose token has a column, no match, a match whose token has none where columns are named."""
    width = 4 if columns is not None else 10
    logits = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    matches = [Match(3, [7, 2]), None, Match(8, [3, 9])]
    copies = CopyBias(matches, 2, torch.tensor([0.0, 0.0, 1.0]), TABLES)
    before = logits.clone()
    biased, names = copies.favour(0, logits, columns)
    assert torch.equal(logits, before), "the base logits are not written"
    place = 2 if columns is not None else 7
    change = biased - logits
    assert change[0, place] == pytest.approx(TABLES.greedy_bias[1])
    assert change[0].count_nonzero() == 1
    assert change[1].count_nonzero() == 0
    assert copies.on[:, 0].tolist() == [True, False, True]
    odds = torch.logit(torch.softmax(logits[0], -1)[place])
    assert float(copies.odds[0, 0]) == pytest.approx(float(odds), abs=1e-4)
    if names is not None:
        assert 3 in names[2].tolist()
        assert len(set(names[2].tolist())) == 4, "no token has two columns"
        assert names[:2].tolist() == [COLUMNS[0].tolist()] * 2
    copies.follow(0, torch.tensor([7, 7, 9]))  # the third block left its copy
    biased, _ = copies.favour(1, logits, columns)
    assert (biased - logits)[0].count_nonzero() == 1
    assert (biased - logits)[1:].count_nonzero() == 0
    assert copies.on[:, 1].tolist() == [True, False, False]


@given(st.integers(2, 60))
def test_buckets_grow_with_the_block(length: int) -> None:
    expected = [max(i for i, least in enumerate(BUCKETS) if length + k >= least) for k in range(5)]
    assert buckets(torch.tensor([length]), 5)[0].tolist() == expected


def test_lone_copies_stand_below_the_drafters_rows() -> None:
    def asked(match: Match | None, record: SurvivalHistory | None = None) -> DraftRequest:
        source = Source.COPY if match else Source.DRAFTER
        return DraftRequest(0, 5, 9, (), 3, match, source, record or SurvivalHistory())

    copying = Copying(NoDrafter(), TABLES)
    copying.gamma = 3
    block, own, copied = DraftBlock(torch.tensor([[1, 2]]), torch.tensor([1])), asked(None), Match(4, [7, 8, 9])
    both = copying.complete(block, [own, asked(copied)])
    assert both.tokens.tolist() == [[1, 2, 0], [7, 8, 9]]
    assert both.usable.tolist() == [1, 3]
    assert both.by_drafter == 1
    assert both.survival is not None
    assert bool(both.survival[0, :2].isnan().all())
    assert both.survival[1].tolist() == pytest.approx(torch.tensor(TABLES.alone[2:5]).cumprod(0).tolist())
    assert copying.complete(block, [own]).tokens.tolist() == [[1, 2, 0]]
    proven = SurvivalHistory()
    for _ in range(20):
        proven.judged(3, 3)
    alone = copying.complete(None, [asked(copied), asked(copied, proven)]).survival
    assert alone is not None
    believed = [(proven.stood + ALONE_WEIGHT * chance) / (proven.tried + ALONE_WEIGHT) for chance in TABLES.alone[2:5]]
    assert alone[1].tolist() == pytest.approx(torch.tensor(believed).cumprod(0).tolist())
    assert bool((alone[1] > alone[0]).all()), "what a request's copies came to counts"


@pytest.mark.parametrize("broken", [{"alone": [0.5]}, {"greedy_bias": [float("nan")] * len(BUCKETS)}])
def test_tables_are_checked(broken: dict[str, list[float]]) -> None:
    fields = {name: list(getattr(TABLES, name)) for name in CopyTables.__dataclass_fields__}
    assert CopyTables.parse(fields) == TABLES
    with pytest.raises(ValueError, match="copying"):
        CopyTables.parse(fields | broken)
