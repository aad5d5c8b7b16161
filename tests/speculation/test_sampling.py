"""From logits to a law to a token: filters against a slow reference, ties, masks, dtypes, corners of drawing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_server.speculation.controls import Forbidden
from dspark_server.speculation.law import NUCLEUS_WIDTHS, distribution, draw, draw_coupled, sample, top
from dspark_server.speculation.noise import CounterStreams, Purpose, philox4x32
from dspark_server.speculation.sampling import SamplingBatch
from tests.speculation.support import TableStreams, reference_law

INF = math.inf


def one(**options: object) -> SamplingBatch:
    return SamplingBatch.of(position=[0], key=[0], **{name: [value] for name, value in options.items()})


filters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.75]),
        "top_k": st.sampled_from([0, 1, 2, 3, 5, 40]),
        "top_p": st.sampled_from([0.0, 0.125, 0.5, 0.90625, 1.0]),
        "min_p": st.sampled_from([0.0, 0.03125, 0.3125, 1.0]),
    }
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(filters, st.integers(0, 2**31)), min_size=1, max_size=5))
def test_filters_agree_with_the_slow_reference(rows: list[tuple[dict[str, float], int]]) -> None:
    """Several requests at once, each with its own filters: every row must come out as if it were alone."""
    logits = torch.stack(
        [torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 for _, seed in rows]
    )
    options = [option for option, _ in rows]
    columns = {name: [option[name] for option in options] for name in options[0]}
    batch = SamplingBatch.of(position=[0] * len(rows), key=[0] * len(rows), **columns)
    expected = [reference_law(row.tolist(), **option) for row, option in zip(logits, options, strict=True)]
    torch.testing.assert_close(
        distribution(logits, batch), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_each_filter_sees_what_the_ones_before_it_left() -> None:
    """vLLM's order: temperature, min-p, top-k, top-p."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    # Alone, 0.6 of the mass takes two tokens; among the best two the first alone has 0.625.
    assert distribution(logits, one(top_p=0.6)).count_nonzero() == 2
    assert distribution(logits, one(top_k=2, top_p=0.6)).count_nonzero() == 1
    assert distribution(logits, one(min_p=0.5, top_p=0.6)).count_nonzero() == 1
    # The second token has 0.6 of the first's probability; at temperature 2, 0.77 of it.
    assert distribution(logits, one(min_p=0.7)).count_nonzero() == 1
    assert distribution(logits, one(min_p=0.7, temperature=2.0)).count_nonzero() == 2


def test_ties_at_the_edge_are_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    for batch in (one(top_k=2), one(top_p=0.7)):
        assert (distribution(logits, batch)[0] > 0).tolist() == [True, True, True, False]


def flat_nucleus(logits: torch.Tensor, top_p: float) -> list[float]:
    kept, mass, probs = torch.zeros_like(logits), 0.0, logits.softmax(-1)
    for token in probs.argsort(descending=True).tolist():
        if mass >= top_p:
            break
        kept[token] = probs[token]
        mass += float(probs[token])
    return (kept / kept.sum()).tolist()


@pytest.mark.parametrize("vocabulary", [5, 4096, 9000])
def test_a_wide_nucleus_is_found_beyond_the_first_look(vocabulary: int) -> None:
    """A nearly uniform row, whose nucleus is wider than the first looks, beside a peaked one and one without top-p."""
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.01
    logits[1, 3] = 50
    batch = SamplingBatch.of(position=[0] * 3, key=[0] * 3, top_p=[0.75, 0.75, 1.0])
    probs = distribution(logits, batch)
    assert probs[0].tolist() == pytest.approx(flat_nucleus(logits[0], 0.75), abs=1e-12)
    assert probs[1].count_nonzero() == 1
    torch.testing.assert_close(probs[2], logits[2].softmax(-1), atol=1e-15, rtol=1e-12)
    assert vocabulary < NUCLEUS_WIDTHS[0] or probs[0].count_nonzero() > NUCLEUS_WIDTHS[0]


@pytest.mark.parametrize("vocabulary", [3, 64, 1000, 49_152, 50_257])
def test_greedy_takes_the_lowest_index_of_a_tie(vocabulary: int) -> None:
    logits = torch.zeros(4, vocabulary)
    logits[1, 1:] = 2.0
    logits[2, [vocabulary // 2, vocabulary - 1]] = 1.0
    logits[3, vocabulary - 1] = 0.5
    expected = [0, 1, vocabulary // 2, vocabulary - 1]
    batch = SamplingBatch.of(position=[0] * 4, key=[0] * 4, temperature=[0.0] * 4)
    assert top(logits)[1].tolist() == expected
    assert distribution(logits, batch).argmax(-1).tolist() == expected
    assert sample(logits, batch, torch.zeros(4), TableStreams())[0].tolist() == expected


def test_a_temperature_below_vllms_epsilon_is_greedy() -> None:
    batch = SamplingBatch.of(position=[0] * 3, key=[0] * 3, temperature=[1e-10, 9.9999999e-6, 1.0])
    assert batch.greedy.tolist() == [True, True, False]
    assert distribution(torch.tensor([[0.0, 1.0, 0.999]] * 3), batch)[:2].tolist() == [[0, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize("given_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_laws_are_float32_unless_the_logits_are_float64(given_dtype: torch.dtype, temperature: float) -> None:
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).to(given_dtype)
    before = logits.clone()
    columns = {"temperature": [temperature] * 2, "top_p": [0.9] * 2, "top_k": [9] * 2, "min_p": [0.01] * 2}
    forbidden = [Forbidden((1,), 5), None]
    batch = SamplingBatch.of(position=[0, 0], key=[0, 0], controls=forbidden, **columns)
    probs = distribution(logits, batch)
    assert probs.dtype is (torch.float64 if given_dtype is torch.float64 else torch.float32)
    assert torch.equal(logits, before), "the caller's logits were written"
    assert probs.sum(-1).tolist() == pytest.approx([1, 1])


def test_forbidden_tokens_return_at_their_position() -> None:
    """min_tokens inside one block: the slot at `until` may end the sequence, the slots before it may not."""
    batch = SamplingBatch.of(position=[8, 8], key=[0, 0], controls=[Forbidden((0, 2), until=10), None])
    for offset in range(4):
        law = distribution(torch.zeros(2, 4, dtype=torch.float64), batch.ahead(offset))
        assert law[0].tolist() == ([0, 0.5, 0, 0.5] if offset < 2 else [0.25] * 4)
        assert law[1].tolist() == [0.25] * 4
    greedy = SamplingBatch.of(position=[8], key=[0], temperature=[0.0], controls=[Forbidden((0,), until=10)])
    tokens = [int(sample(torch.zeros(1, 4), greedy.ahead(k), torch.zeros(1), TableStreams())[0]) for k in range(4)]
    assert tokens == [1, 1, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("vocabulary", [6, 600])
def test_a_broken_row_is_nan_throughout_and_alone(temperature: float, bad: float, vocabulary: int) -> None:
    logits = torch.randn(3, vocabulary)
    logits[1, 4] = bad
    if bad == -INF:
        logits[1] = bad  # one token may be impossible, but not all
    for extra in ({}, {"top_k": [3] * 3}, {"top_p": [0.5] * 3}, {"min_p": [0.1] * 3}):
        batch = SamplingBatch.of(position=[0] * 3, key=[0] * 3, temperature=[temperature] * 3, **extra)
        probs = distribution(logits, batch)
        assert probs[1].isnan().all()
        assert probs[[0, 2]].isfinite().all()
        assert (draw(probs, torch.full((3,), 0.5, dtype=torch.float64)) < vocabulary).all()


# ---- drawing ----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-9, 0.1, 1.0, 7.0]), min_size=1, max_size=96).filter(any),
    u=st.one_of(st.sampled_from([0.0, 2.0**-53, 0.5, 1 - 2.0**-53]), st.floats(0, 1, exclude_max=True)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_draw_inverts_the_cumulative_sum(weights: list[float], u: float, dtype: torch.dtype) -> None:
    token = int(draw(torch.tensor([weights], dtype=dtype), torch.tensor([u], dtype=torch.float64)))
    assert weights[token] > 0
    total = math.fsum(weights)
    assert math.fsum(weights[:token]) <= (u + 1e-6) * total
    assert math.fsum(weights[: token + 1]) >= (u - 1e-6) * total


def test_draw_across_blocks() -> None:
    """The blocked sum has the cells of the flat one."""
    generator = torch.Generator().manual_seed(2)
    probs = torch.rand(64, 49_152, generator=generator, dtype=torch.float64)
    probs[:, ::3] = 0
    u = torch.rand(64, dtype=torch.float64, generator=generator)
    flat = probs.cumsum(-1)
    expected = torch.searchsorted(flat, (u * flat[:, -1])[:, None], right=True).squeeze(1)
    assert torch.equal(draw(probs, u), expected)
    assert (draw(probs.float(), u) - expected).abs().max() <= 2  # float32 sums: a cell's edge may move by a hair


def test_coupled_draw_survives_underflow_and_extreme_noise() -> None:
    tiny = torch.finfo(torch.float32).tiny
    probs = torch.tensor([[0.0, tiny, 0.0], [0.0, 0.0, 1.0], [1.0, tiny, 0.0]])
    noise = torch.tensor([[1e-10, 16.6, 1e-10], [1e-10, 1e-10, 16.6], [1.0, 1.0, 1e-10]])
    assert draw_coupled(probs, noise).tolist() == [1, 2, 0]


def test_mixed_draft_slots_equal_lone_ones() -> None:
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(4))
    columns = {
        "temperature": [0.0, 1.0, 0.6, 1.0, 0.0, 1.4],
        "coupled": [False, True, False, True, True, False],
        "top_p": [1.0, 0.8, 0.9, 1.0, 1.0, 1.0],
        "top_k": [0, 0, 20, 0, 0, 5],
    }
    batch = SamplingBatch.of(position=[3] * 6, key=range(6), **columns)
    streams = CounterStreams()
    uniform = streams.uniform(Purpose.DRAFT, batch, torch.arange(1))[:, 0]
    tokens, law = sample(logits, batch, uniform, streams)
    assert law is not None
    for row in range(6):
        lone = {name: [values[row]] for name, values in columns.items()}
        alone = SamplingBatch.of(position=[3], key=[row], **lone)
        token, own = sample(logits[row : row + 1], alone, uniform[row : row + 1], CounterStreams())
        assert token.tolist() == [tokens[row].item()]
        assert (own is not None) == (columns["temperature"][row] > 0 and not columns["coupled"][row])
        assert torch.equal(law[row], own[0] if own is not None else torch.zeros(500))


# ---- noise, beyond test_streams.py ------------------------------------------------------------------------------


def test_uniforms_are_uniform_and_purposes_do_not_know_each_other() -> None:
    count, bins = 40_000, 8
    batch = SamplingBatch.of(position=range(count), key=[123] * count)
    streams, offset = CounterStreams(), torch.tensor([0])
    drawn = [streams.uniform(p, batch, offset)[:, 0] for p in (Purpose.DRAFT, Purpose.COIN, Purpose.RESIDUAL)]
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert drawn[first].dtype is torch.float64
        assert drawn[first].min() > 0
        assert drawn[first].max() < 1
        pairs = (drawn[first] * bins).long() * bins + (drawn[second] * bins).long()
        seen, expected = torch.bincount(pairs, minlength=bins**2).double(), count / bins**2
        assert ((seen - expected) ** 2 / expected).sum() < 130  # 63 degrees of freedom, alpha = 1e-6


def test_offsets_are_positions() -> None:
    """Slot k of a batch at position t draws what slot 0 at t + k would: noise belongs to places, not to calls."""
    streams = CounterStreams()
    batch = SamplingBatch.of(position=[10, 50], key=[1, 2**64 - 1], draft_number=[4, 5])
    block = streams.uniform(Purpose.COIN, batch, torch.arange(5))
    for k in range(5):
        assert torch.equal(block[:, k : k + 1], streams.uniform(Purpose.COIN, batch.ahead(k), torch.tensor([0])))


def test_exponentials_are_finite_in_float32_and_agree_with_float64() -> None:
    batch = SamplingBatch.of(position=range(40), key=[5] * 40)
    single = CounterStreams().exponential(batch, 49_152, torch.float32).double()
    double = CounterStreams().exponential(batch, 49_152, torch.float64)
    assert single.isfinite().all()
    assert single.min() > 0
    small = double < 1  # where races are decided
    torch.testing.assert_close(single[small], double[small], rtol=5e-7, atol=0)
    # Beyond, float32 sees w near 1 in steps of 2^-24: coarse, but it does not matter how badly a loser loses.
    assert double.mean().item() == pytest.approx(1, abs=0.005)
    assert single.mean().item() == pytest.approx(1, abs=0.005)


def test_the_cache_of_exponentials_changes_nothing_and_stays_bounded() -> None:
    small, large = CounterStreams(cache_bytes=3 * 40), CounterStreams()
    for position in (1, 2, 1, 5, 2, 1):
        batch = SamplingBatch.of(position=[position, position + 1], key=[8, 8])
        rows = small.exponential(batch, 10, torch.float32)
        assert torch.equal(rows, large.exponential(batch, 10, torch.float32))
        assert len(small._rows) <= 3


def test_the_layout_of_the_noise_is_fixed() -> None:
    """Seeded output must survive an upgrade: which Philox word serves what is an interface, pinned here."""
    key, choice, position, draft_number = -5, 3, 70_000, 11
    batch = SamplingBatch.of(position=[position], key=[key], choice=[choice], draft_number=[draft_number])
    bits = key & (2**64 - 1)

    def block(*counter: int) -> list[int]:
        words = [np.array([word], dtype=np.uint64) for word in (*counter, bits & 0xFFFFFFFF, bits >> 32)]
        return [int(word[0]) for word in philox4x32(words[:4], words[4:])]

    uniform = CounterStreams().uniform(Purpose.COIN, batch, torch.tensor([2]))
    high, low, _, _ = block(position + 2, draft_number, choice, Purpose.COIN)
    assert uniform.item() == ((high >> 6) * 2**26 + (low >> 6) + 0.5) / 2**52
    row = CounterStreams().exponential(batch, 10, torch.float64)[0]
    words = [word for b in range(3) for word in block(b, position, choice, Purpose.GUMBEL)][:10]
    assert row.tolist() == pytest.approx([-math.log1p(-(word + 0.5) / 2**32) for word in words], rel=1e-14)
