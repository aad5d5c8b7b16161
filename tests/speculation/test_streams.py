"""The counter-based noise: known answers, separate streams, the right laws."""

import numpy as np
import pytest
import torch

from dspark_server.speculation.acceptance import accept
from dspark_server.speculation.law import draw, draw_coupled
from dspark_server.speculation.noise import CounterStreams, Purpose, philox4x32
from dspark_server.speculation.sampling import SamplingBatch

# Random123's kat_vectors for philox4x32-10: counter, key, answer.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    def words(text: str) -> list[np.ndarray]:
        return [np.array([int(word, 16)], dtype=np.uint64) for word in text.split()]

    assert [int(word[0]) for word in philox4x32(words(counter), words(key))] == [int(w, 16) for w in answer.split()]


def one(**changes: int) -> SamplingBatch:
    fields = {"position": 5, "key": 9, "choice": 0, "draft_number": 1} | changes
    return SamplingBatch.of(**{name: [value] for name, value in fields.items()})


def test_everything_in_the_key_gives_another_number() -> None:
    streams, offset = CounterStreams(), torch.tensor([0])
    variants = [one(), one(position=6), one(key=10), one(key=9 + (1 << 40)), one(choice=1), one(draft_number=2)]
    purposes = (Purpose.DRAFT, Purpose.COIN, Purpose.RESIDUAL)
    numbers = {float(streams.uniform(purpose, each, offset)) for purpose in purposes for each in variants}
    assert len(numbers) == len(variants) * len(purposes)


def test_coupled_noise_knows_nothing_of_drafts() -> None:
    """Seed, choice, position and token only: whatever was drafted before cannot change it (DSPARK.md, "Coupled")."""
    streams = CounterStreams()
    base = streams.exponential(one(), 50, torch.float32)
    assert torch.equal(base, CounterStreams().exponential(one(draft_number=7), 50, torch.float32))
    for other in (one(position=6), one(key=10), one(choice=1)):
        assert not torch.equal(base, streams.exponential(other, 50, torch.float32))


def test_both_ways_of_drawing_have_the_law_asked_for() -> None:
    law = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.1])
    count = 20_000
    where = SamplingBatch.of(position=list(range(count)), key=[3] * count)
    streams = CounterStreams()
    rows = law.expand(count, -1)
    uniform = streams.uniform(Purpose.RESIDUAL, where, torch.tensor([0]))[:, 0]
    for drawn in (draw(rows, uniform), draw_coupled(rows, streams.exponential(where, 5, torch.float32))):
        seen = torch.bincount(drawn, minlength=5).double()
        assert seen[1] == 0
        expected = law.double() * count
        chi_square = ((seen - expected) ** 2 / expected)[expected > 0].sum()
        assert chi_square < 30.7  # 3 degrees of freedom, alpha = 1e-6


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_nan_fails_its_own_request_and_no_other(coupled: bool, temperature: float) -> None:
    logits = torch.randn(3, 64)
    logits[1, 7] = torch.nan
    where = SamplingBatch.of(position=[1] * 3, key=[1, 2, 3], coupled=[coupled] * 3, temperature=[temperature] * 3)
    result = accept(logits, [0, 1, 2, 3], None, [-1] * 3, where, CounterStreams())
    assert result.failed.tolist() == [False, True, False]
    assert (result.token[[0, 2]] >= 0).all()


def test_u_zero_never_draws_an_impossible_token() -> None:
    law = torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.0]])
    assert draw(law, torch.tensor([0.0], dtype=torch.float64)).item() == 2
    assert draw(law, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 3
