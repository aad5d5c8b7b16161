"""A NaN first seen at draft slot k cuts the prefix to the slots before it (DSPARK, "No value-dependent drop")."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark_server.engine.core import EngineCore
from dspark_server.engine.trace import StepTrace
from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.heads import ConfidenceHead
from dspark_server.speculation.prefix_scheduler import Load
from tests.engine.support import greedy, on_cycles, prompts, seeded, tiny_core
from tests.speculation.enumeration import block_cycles, ratio_cycles
from tests.speculation.support import Joint, Law, State, distance, joint, worlds


def traced(core: EngineCore) -> list[StepTrace]:
    """Every sampling step of the core from here on."""
    seen: list[StepTrace] = []
    core.loop._trace = seen.append
    return seen


@pytest.mark.parametrize("slot", [0, 1, 3])
@pytest.mark.parametrize("source", ["logits", "confidence"])
def test_a_nan_at_a_slot_keeps_exactly_the_slots_before_it(
    monkeypatch: pytest.MonkeyPatch, slot: int, source: str
) -> None:
    prompt = prompts(1)[0]
    expected = tiny_core(drafter=False).generate([prompt], greedy(24))
    core = tiny_core()
    drafter = core.loop.executor.drafter.inner
    calls = 0

    if source == "logits":
        bias = drafter.sampler.head.bias

        def broken_bias(*arguments: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            value = bias(*arguments)
            calls += 1
            return value * float("nan") if (calls - 1) % drafter.gamma == slot else value

        monkeypatch.setattr(drafter.sampler.head, "bias", broken_bias)
    else:
        logit = ConfidenceHead.logit

        def broken_logit(self: ConfidenceHead, *arguments: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            value = logit(self, *arguments)
            calls += 1
            return value * float("nan") if (calls - 1) % drafter.gamma == slot else value

        monkeypatch.setattr(ConfidenceHead, "logit", broken_logit)

    steps = traced(core)
    assert core.generate([prompt], greedy(24)) == expected
    drafted = [step.block for step in steps if step.block is not None]
    assert drafted
    assert drafted[0].lengths == [slot]
    assert all(length <= slot for block in drafted for length in block.lengths)


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("source", ["logits", "confidence"])
def test_only_that_requests_prefix_is_cut(monkeypatch: pytest.MonkeyPatch, source: str, value: str) -> None:
    """The drafts of the others beside it are verified whole, and all say what they say without a drafter."""
    made, slot, row = prompts(3), 2, 1
    expected = tiny_core(drafter=False).generate(made, greedy(24))
    core = tiny_core()
    drafter, calls = core.loop.executor.drafter.inner, 0
    target, name = (drafter.sampler.head, "bias") if source == "logits" else (ConfidenceHead, "logit")
    real = getattr(target, name)

    def broken(*arguments: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        found, calls = real(*arguments), calls + 1
        if (calls - 1) % drafter.gamma == slot and len(found) == len(made):
            found = found.clone()
            found[row] = float(value)
        return found

    monkeypatch.setattr(target, name, broken)
    steps = traced(core)
    assert core.generate(made, greedy(24)) == expected
    first = next(step.block for step in steps if step.block is not None and len(step.block.requests) == len(made))
    assert [*first.lengths[:row], *first.lengths[row + 1 :]] == [drafter.gamma] * 2
    assert first.lengths[row] == (drafter.gamma if (source, value) == ("confidence", "inf") else slot)


def test_what_a_draft_may_reach_is_counted_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN lowers limits, and only the drafted tokens may have led there: costs are not looked up by them."""
    core = tiny_core()
    bias, real = core.loop.executor.drafter.inner.sampler.head.bias, core.loop._selection.lengths
    seen: list[tuple[int, int]] = []

    def lengths(survival: Tensor, limits: list[int], load: Load, *, by_drafter: int, slots: int) -> list[int]:
        seen.append((sum(limits), slots))
        return real(survival, limits, load, by_drafter=by_drafter, slots=slots)

    def broken(*arguments: Tensor) -> Tensor:
        found = bias(*arguments)
        return found.index_fill(0, torch.tensor([0]), torch.nan) if len(found) == 2 else found

    monkeypatch.setattr(core.loop.executor.drafter.inner.sampler.head, "bias", broken)
    monkeypatch.setattr(core.loop._selection, "lengths", lengths)
    core.generate(prompts(2), greedy(12))
    block = core.loop.executor.block
    assert (block, 2 * block) in seen


# -- the target's rows -----------------------------------------------------------------------------------------------

FAILED = -1  # stands in a sequence from where its request failed


@pytest.mark.parametrize("name", sorted(worlds()))
@pytest.mark.parametrize("broken", [[(0, 1)], [(1, 1), (0, 0)]])
def test_requests_fail_where_plain_decoding_does(name: str, broken: list[State]) -> None:
    """Exactly: tokens and failures of gamma + 1 steps, where the target has nothing to say in some contexts."""
    whole = worlds()[name]
    target = whole.target.clone()
    for state in broken:
        target[state] = torch.nan
    world = replace(whole, target=target)

    def failing(step: Callable[[State], Law]) -> Callable[[State], Law]:
        return lambda state: {(FAILED,): 1.0} if FAILED in state or world.is_broken(state) else step(state)

    def plain(state: State) -> Law:
        return {(token,): share for token, share in enumerate(world.p(state)) if share > 0}

    for cycles in (ratio_cycles(world), block_cycles(world)):
        length, ours, its = world.gamma + 1, Joint(), Joint()
        for state in cycles:
            mine = joint(failing(cycles.__getitem__), state, length, ours)
            assert distance(mine, joint(failing(plain), state, length, its)) < 1e-12
        reached = any(FAILED in tokens for state in cycles for tokens in its[state, length])
        assert reached or name == "disjoint-supports"  # whose contexts lead nowhere else


def with_draft(core: EngineCore, slot: int, token: int) -> None:
    """The drafter draws `token` at `slot`, always, and says so."""
    drafter = core.loop.executor.drafter.inner
    propose = drafter.propose

    def drafted(*arguments: object) -> object:
        block = propose(*arguments)
        block.tokens[:, slot] = token
        return block

    drafter.propose = drafted


@pytest.mark.parametrize("slot", [0, 2])
@pytest.mark.parametrize("params", [greedy(20), seeded(3, 20)], ids=["greedy", "seeded"])
def test_the_broken_row_of_a_rejected_draft_token_breaks_no_other(slot: int, params: object) -> None:
    """Its keys and values, NaN in every layer, lie behind the mask of the anchor, in the same tile."""
    made = prompts(3)
    expected = tiny_core(drafter=False).generate(made, params)
    unseen = next(token for token in range(3, 500) if all(token not in each for each in [*made, *expected]))
    core = tiny_core()
    core.loop.executor.target.embed.weight = core.loop.executor.target.embed.weight.clone()
    core.loop.executor.target.embed.weight[unseen] = torch.nan
    with_draft(core, slot, unseen)
    steps = traced(core)
    assert core.generate(made, params) == expected
    rows = [step.verified.logits.isnan().any(1) for step in steps]
    assert any(bool(row.any()) for row in rows), "the token was never run"
    assert core.loop.stats.accepted_tokens > 0 or slot == 0


@pytest.mark.parametrize("params", [greedy(20), seeded(3, 20)], ids=["greedy", "seeded"])
def test_a_draft_token_that_stands_is_kept_though_its_own_row_is_broken(params: object) -> None:
    """The next pass, where it is the anchor, says what follows: then, if at all, its request fails."""
    made = prompts(3)
    expected = tiny_core(drafter=False).generate(made, params)
    core = tiny_core()

    def broken(cycle: Any) -> None:
        verify = cycle.verify

        def verified(block: DraftBlock | None) -> tuple[Tensor, list[int]]:
            logits, row_start = verify(block)
            logits[[row for row in range(len(logits)) if row not in row_start]] = torch.nan
            return logits, row_start

        cycle.verify = verified

    on_cycles(core.loop.executor, broken)
    steps = traced(core)
    assert core.generate(made, params) == expected
    assert not any(bool(step.accepted.failed.any()) for step in steps)
    assert any(bool(step.verified.logits.isnan().any()) for step in steps)


def test_an_end_that_was_drafted_ends_though_its_own_row_is_broken() -> None:
    prompt = prompts(1)[0]
    plain = tiny_core(drafter=False)
    answer = plain.generate([prompt], greedy(20))[0]
    end = answer[6]
    ending = replace(greedy(20), stop_token_ids=frozenset({end}))
    core = tiny_core()

    def broken(cycle: Any) -> None:
        verify = cycle.verify

        def verified(block: DraftBlock | None) -> tuple[Tensor, list[int]]:
            logits, row_start = verify(block)
            flat = [(token, row) for run, first in zip(cycle._runs, row_start, strict=False)
                    for row, token in enumerate(run.tokens[-run.logits_rows :], first)]  # fmt: skip
            logits[[row for token, row in flat if token == end and row not in row_start]] = torch.nan
            return logits, row_start

        cycle.verify = verified

    on_cycles(core.loop.executor, broken)
    request = core.new_request(prompt, ending, nonce=0)
    core.batcher.add(request)
    while core.loop.has_work:
        core.loop.step()
    assert request.error is None
    assert request.output == answer[: answer.index(end) + 1]
