"""Replays a folder of DeepSpec outputs through the real engine, with forced acceptance counts.

A folder holds `target/`, `draft/` (or both in one directory, as DeepSeek-V4) and `expected.safetensors`: caseC.prompt
[T], then per round R the anchor, its
position, draft_hidden [gamma, D], base_logits, draft_logits and target_logits (the last with gamma + 1 rows) [., V],
confidence_logits [gamma], draft_tokens [gamma], the forced `accepted` and the `committed` tokens; caseC.sequence, the
prompt and all committed tokens; caseC.prefill_logits [., V], those of the prompt's last positions, and prefill_taps
[., m D]; caseC.mtp_logits [T - 1, V], those of an MTP layer for each token's features and the next token.
"""

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.executor import TorchExecutor
from dspark_server.engine.request import SamplingParams
from dspark_server.engine.trace import StepTrace, Verification
from dspark_server.errors import CheckpointError
from dspark_server.models.fields import architecture, read_json
from dspark_server.runtime.batch import Batch, Run
from dspark_server.runtime.paging import tables_for
from dspark_server.speculation.acceptance import Accepted
from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.model_drafter import ModelDrafter
from dspark_server.speculation.noise import CounterStreams
from dspark_server.speculation.sampling import SamplingBatch

TOLERANCE = 1e-4  # absolute, float32
# Of the numbers of drafters whose hidden states are large.
LOOSER = {"Gemma4DSparkModel": 5e-4, "Gemma4UnifiedAssistantForCausalLM": 5e-4, "DeepseekV4ForCausalLM": 2e-4}
# Of the target's logits.
LOOSER_TARGET = {"DeepseekV4ForCausalLM": 2e-4}
# Of hidden states before any norm, which grow to 180 in the fixture: there float64 is 3e-4 from DeepSpec's float32.
LOOSER_HIDDEN = {"Qwen3Eagle3Model": 5e-4, "Gemma4Eagle3Model": 5e-4}


@dataclass
class Report:
    """Largest absolute error per kind of tensor, and every difference in exact values.

    `of_target` is the tolerance of the target's numbers, `of_drafts` of what the drafter computes, `of_hidden` of its
    hidden states.
    """

    of_target: float = TOLERANCE
    of_drafts: float = TOLERANCE
    of_hidden: float = TOLERANCE
    largest: dict[str, float] = field(default_factory=dict)
    mismatches: list[str] = field(default_factory=list)
    rounds: int = 0

    @property
    def passed(self) -> bool:
        """Whether all numbers are within tolerance, all tokens equal, and something was compared. A NaN fails."""
        return self.rounds > 0 and not self.mismatches and all(e <= self.tolerance(k) for k, e in self.largest.items())

    def tolerance(self, kind: str) -> float:
        """Largest absolute error allowed."""
        if kind in ("target_logits", "prefill_logits", "prefill_taps"):
            return self.of_target
        return self.of_hidden if kind == "draft_hidden" else self.of_drafts

    def close(self, kind: str, where: str, ours: Tensor | None, theirs: Tensor) -> None:
        """Compare numbers."""
        if ours is None or ours.shape != theirs.shape:
            self.mismatches.append(f"{where}: shape {None if ours is None else list(ours.shape)}, "
                                   f"expected {list(theirs.shape)}")  # fmt: skip
            return
        error = (ours.double() - theirs.double()).abs().max().item()
        previous = self.largest.get(kind, 0.0)
        # A NaN must stay: comparisons with it are false, so a later error would replace it.
        self.largest[kind] = previous if math.isnan(previous) or error <= previous else error

    def equal(self, where: str, ours: list[int], theirs: Tensor) -> None:
        """Compare tokens."""
        if ours != theirs.tolist():
            self.mismatches.append(f"{where}: {ours}, expected {theirs.tolist()}")


class _Forced:
    """Acceptance that accepts a given number of draft tokens, then takes the target's arg max."""

    def __init__(self) -> None:
        self.counts: Iterator[int] = iter(())
        self.seen: list[StepTrace] = []

    def accept(self, verified: Verification, block: DraftBlock | None, sampling: SamplingBatch) -> Accepted:
        count = next(self.counts) if block else 0
        token = verified.logits[verified.row_start[0] + count].argmax()
        return Accepted(torch.tensor([count]), token.view(1), torch.tensor([False]))

    def trace(self, trace: StepTrace) -> None:
        if trace.block is not None:
            self.seen.append(trace)


def replay(directory: Path, progress: Callable[[str], None] = lambda line: None) -> Report:
    """Replay every case of the folder. Raises CheckpointError if it is not such a folder."""
    path = directory / "expected.safetensors"
    try:
        expected = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); a conformance folder has target/, draft/ and it."
        ) from error
    own = architecture(read_json(_parts(directory)[1] / "config.json"))
    looser = LOOSER.get(own, TOLERANCE)
    report = Report(LOOSER_TARGET.get(own, TOLERANCE), looser, LOOSER_HIDDEN.get(own, looser))
    names = {m[1] for key in expected if (m := re.fullmatch(r"(case\d+)\.prompt", key))}
    if not names:
        raise CheckpointError(f"{path} has no caseC.prompt tensor.")
    for case in sorted(names, key=lambda name: int(name[4:])):
        tensors = {key.removeprefix(case + "."): value for key, value in expected.items() if key.startswith(case + ".")}
        _replay_case(directory, case, tensors, report)
        progress(f"{case}: {report.rounds} rounds so far")
    return report


def _parts(directory: Path) -> tuple[Path, Path]:
    """The directories of target and drafter."""
    whole = (directory / "config.json").is_file()
    return (directory, directory) if whole else (directory / "target", directory / "draft")


def _replay_case(directory: Path, case: str, expected: dict[str, Tensor], report: Report) -> None:
    forced, (target, draft) = _Forced(), _parts(directory)
    depth = len(expected["round0.draft_tokens"]) if "round0.draft_tokens" in expected else None
    core = EngineCore.load(
        EngineConfig(
            model=str(target),
            dtype="float32",
            kv_cache_memory_bytes=256 << 20,
            speculative=SpeculativeConfig(
                model=None if draft == target else str(draft),
                num_speculative_tokens=depth,
                selection="fixed",
                copying=False,
            ),
            check_invariants=True,
        ),
        acceptance=forced.accept,
        trace=forced.trace,
    )
    executor = core.loop.executor
    assert isinstance(executor, TorchExecutor)
    assert isinstance(executor.drafter, ModelDrafter)
    executor.drafter.sampler.keep_logits = True
    rounds = sum(1 for key in expected if key.endswith(".accepted"))
    forced.counts = iter([int(expected[f"round{r}.accepted"]) for r in range(rounds)])
    prompt = expected["prompt"].tolist()
    # Room for a whole block after the last round, so that no block is cut short.
    params = SamplingParams(max_tokens=(rounds + 2) * (executor.gamma + 1), temperature=0.0, ignore_eos=True)
    request = core.new_request(prompt, params, nonce=0)
    core.batcher.check_fits(len(prompt), params.max_tokens)
    core.batcher.add(request)
    for r in range(-1, rounds):  # the prompt's own step drafts nothing
        before = len(request.tokens)
        while len(request.tokens) == before:
            core.loop.step()
        if r >= 0:
            want = {k.removeprefix(f"round{r}."): v for k, v in expected.items() if k.startswith(f"round{r}.")}
            _compare_round(report, f"{case}.round{r}", want, forced.seen[r], before, request.tokens)
    if "sequence" in expected:
        report.equal(f"{case}.sequence", request.tokens, expected["sequence"])
    core.batcher.remove(request)
    ours = _of_prompt(executor, prompt)
    for kind in ("prefill_logits", "prefill_taps"):
        if kind in expected:
            report.close(kind, f"{case}.{kind}", ours[kind][-len(expected[kind]) :], expected[kind])
    if "mtp_logits" in expected:
        report.rounds += 1
        mine = torch.cat([_pair_logits(executor, prompt, place) for place in range(1, len(prompt))])
        report.close("mtp_logits", f"{case}.mtp_logits", mine, expected["mtp_logits"])


@torch.inference_mode()
def _of_prompt(executor: TorchExecutor, prompt: list[int]) -> dict[str, Tensor]:
    """Logits [T, V] and taps [T, m D] of every position of a prompt, in one pass."""
    tables = tables_for(executor.pool.groups, itertools.count(), 0, len(prompt))
    run = Run(prompt, 0, tables, len(prompt))
    logits = executor.cycle([run], CounterStreams(), time.perf_counter).verify(None)[0]
    target, pool = executor.target, executor.pool
    taps = target.forward(Batch.of([run], pool.groups), pool.layers(0), executor.drafter.taps)[1]
    return {"prefill_logits": logits, "prefill_taps": torch.cat(taps, dim=-1)}


@torch.inference_mode()
def _pair_logits(executor: TorchExecutor, prompt: list[int], place: int) -> Tensor:
    """Logits [1, V] of the pair that ends with the token at `place` of a prompt whose rows `_of_prompt` has written."""
    drafter, pool = executor.drafter, executor.pool
    assert isinstance(drafter, ModelDrafter)
    tables = tables_for(pool.groups, itertools.count(), 0, len(prompt))
    blocks = Batch.of([Run([prompt[place]] * drafter.width, place, tables, 0)], pool.groups)
    return drafter.forward(0, blocks, torch.tensor([prompt[place]]), None, pool).base[:, 0]


def _compare_round(
    report: Report, where: str, want: dict[str, Tensor], seen: StepTrace, before: int, tokens: list[int]
) -> None:
    block = seen.block
    assert block is not None
    report.rounds += 1
    report.equal(f"{where}.anchor", [tokens[before - 1]], want["anchor"])
    report.equal(f"{where}.anchor_position", [before - 1], want["anchor_position"])
    report.equal(f"{where}.draft_tokens", block.tokens[0].tolist(), want["draft_tokens"])
    report.equal(f"{where}.committed", tokens[before:], want["committed"])
    numbers = {
        "draft_hidden": block.hidden,
        "base_logits": block.base_logits,
        "draft_logits": block.logits,
        "confidence_logits": block.confidence,
    }
    for kind, ours in numbers.items():
        if kind in want:
            report.close(kind, f"{where}.{kind}", None if ours is None else ours[0], want[kind])
    report.close("target_logits", f"{where}.target_logits", seen.verified.logits, want["target_logits"])
