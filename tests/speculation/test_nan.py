"""A NaN first seen at draft slot k cuts the prefix to the slots before it (DSPARK, "No value-dependent drop")."""

import pytest
import torch
from torch import Tensor

from dspark_server.engine.core import EngineCore
from dspark_server.engine.trace import StepTrace
from dspark_server.speculation.admission import Load
from dspark_server.speculation.heads import ConfidenceHead
from dspark_server.speculation.selection import Drafts
from tests.engine.support import greedy, prompts, tiny_core


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
    drafter = core.loop.executor.drafter
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
    drafted = [step.drafted for step in steps if step.drafted is not None]
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
    drafter, calls = core.loop.executor.drafter, 0
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
    first = next(step.drafted for step in steps if step.drafted is not None and len(step.drafted.requests) == len(made))
    assert first.lengths[:row] + first.lengths[row + 1 :] == [drafter.gamma] * 2
    assert first.lengths[row] == (drafter.gamma if (source, value) == ("confidence", "inf") else slot)


def test_what_a_draft_may_reach_is_counted_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN lowers limits, and only the drafted tokens may have led there: costs are not looked up by them."""
    core = tiny_core()
    bias, real = core.loop.executor.drafter.sampler.head.bias, core.loop._selection.lengths
    seen: list[tuple[int, int]] = []

    def lengths(survival: Tensor, limits: list[int], load: Load, drafts: Drafts) -> list[int]:
        seen.append((sum(limits), drafts.slots))
        return real(survival, limits, load, drafts)

    def broken(*arguments: Tensor) -> Tensor:
        found = bias(*arguments)
        return found.index_fill(0, torch.tensor([0]), torch.nan) if len(found) == 2 else found

    monkeypatch.setattr(core.loop.executor.drafter.sampler.head, "bias", broken)
    monkeypatch.setattr(core.loop._selection, "lengths", lengths)
    core.generate(prompts(2), greedy(12))
    block = core.loop.executor.block
    assert (block, 2 * block) in seen
