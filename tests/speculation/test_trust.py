"""Live acceptance against calibration: a warning when far fewer draft tokens survive than promised, and its end."""

import logging
import random

import pytest

from dspark_server.speculation.trust import ENOUGH, LOW, Trust


def feed(trust: Trust, survival: float, promised: float, blocks: int, seed: int = 0) -> None:
    """Blocks of five tokens, of which each survives with the same chance as long as those before it did."""
    source = random.Random(seed)
    for _ in range(blocks):
        stood = next((place for place in range(5) if source.random() >= survival), 5)
        trust.observe(sum(promised**place for place in range(1, 6)), stood, 5)


def test_what_was_promised_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    trust = Trust()
    feed(trust, 0.8, 0.8, 3000)
    assert trust.ratio == pytest.approx(1.0, abs=0.1)
    assert not trust.low
    assert not caplog.records


def test_a_drafter_for_other_weights_is_noticed_once_and_its_end_too(caplog: pytest.LogCaptureFixture) -> None:
    trust = Trust()
    feed(trust, 0.3, 0.8, 3000)
    assert trust.low
    assert trust.ratio < LOW
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "made for these weights" in caplog.text
    feed(trust, 0.8, 0.8, 3000, seed=1)
    assert not trust.low
    assert len(caplog.records) == 2


def test_a_few_blocks_are_no_verdict() -> None:
    trust = Trust()
    trust.observe(ENOUGH / 2, 0, 700)
    assert not trust.low
    assert Trust().ratio == 1.0
