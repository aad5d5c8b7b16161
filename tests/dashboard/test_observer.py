"""The pictures of steps are the steps: the choice stands where the policy put it."""

from dataclasses import replace

import pytest

from dspark_server.engine.observer import Block, Picture, StepObserver
from dspark_server.speculation import exploration
from tests.engine.support import greedy, prompts, seeded

from .support import core


def pictures(selection: str, count: int = 6) -> list[Picture]:
    """Every step of a run."""
    ticks = iter(range(1_000_000))
    made = core()
    made.select(selection)
    watch = StepObserver(made.loop.cost_model, clock=lambda: float(next(ticks)))
    seen: list[Picture] = []

    def look(trace):  # type: ignore[no-untyped-def]
        watch(trace)
        assert watch.picture is not None
        seen.append(watch.picture)

    made.loop.watch(look)
    made.generate(prompts(count), greedy(24))
    assert sum(picture.committed for picture in seen) >= 24 * count
    return seen


def test_a_picture_adds_up() -> None:
    for picture in pictures("causal"):
        assert picture.policy == "causal"
        assert picture.tokens == picture.prefill + picture.sampling + picture.drafts
        assert sum(row.verified for row in picture.rows) == picture.drafts
        assert len(picture.rows) == picture.sampling
        assert picture.committed == picture.sampling + sum(row.accepted for row in picture.rows)
        assert all(row.accepted <= row.verified <= len(row.survival) for row in picture.rows)


def test_causal_stands_on_the_peak_of_theta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exploration, "EXPLORING", 0.0)  # steps that explore go past it
    drafted = [picture for picture in pictures("causal") if picture.theta]
    assert len(drafted) > 5
    for picture in drafted:
        assert picture.theta[0][0] == picture.tokens - picture.drafts
        assert picture.expected == max(value for _, value in picture.theta)
    assert len({picture.drafts for picture in drafted}) > 1, "a choice that never changes shows nothing"


def test_fixed_goes_on_past_the_peak() -> None:
    drafted = [picture for picture in pictures("fixed") if picture.theta]
    assert all(picture.expected == picture.theta[-1][1] for picture in drafted), "it verifies all there is"
    assert any(picture.expected < max(value for _, value in picture.theta) for picture in drafted)


def test_a_draft_token_that_ends_the_request_is_its_last() -> None:
    made = core(selection="fixed")  # sixteen at once would leave the others hardly a draft
    watch = StepObserver(made.loop.cost_model)
    seen: list[Block] = []
    made.loop.watch(watch)
    stopping = [replace(seeded(seed, 20), stop_token_ids=frozenset(range(3, 130))) for seed in range(200)]
    requests = [made.new_request([5, 6, 7], params, nonce=0, id=f"{params.seed}") for params in stopping]
    followed = [watch.follow(request.id) for request in requests]
    for request in requests:
        made.batcher.add(request)
    while made.loop.has_work:
        made.loop.step()
    for request, blocks in zip(requests, followed, strict=True):
        assert [token for block in blocks for token in block.committed] == request.output
        seen += blocks
    ended = [block for block in seen if block.accepted == len(block.committed)]
    assert ended, "no draft token ended a request"
    assert all(block.draft[: block.accepted] == block.committed for block in ended)
