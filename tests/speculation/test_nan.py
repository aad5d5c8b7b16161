"""A NaN first seen at draft slot k cuts the prefix to the slots before it (DSPARK, "No value-dependent drop")."""

import pytest
import torch

from dspark_server.engine.core import EngineCore
from dspark_server.engine.trace import StepTrace
from dspark_server.speculation.heads import ConfidenceHead
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
