"""The target's law through the whole engine: batching, preemption, prefix hits, load-aware selection, back-off.

Three thousand answers over five tokens, the first three of each counted against the exact law of the target alone
(chi-square, alpha = 1e-6). Few tokens and a drafter of another mind: with many near-uniform ones bugs do not show.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.executor import TorchExecutor
from dspark_server.engine.request import SamplingParams
from dspark_server.engine.trace import StepTrace
from dspark_server.runtime.batch import Batch, Run
from dspark_server.runtime.kv import KVPool
from dspark_server.speculation.capacity import Profile
from dspark_server.speculation.noise import CounterStreams, Purpose
from dspark_server.speculation.sampling import SamplingBatch
from dspark_server.training.checkpoint import draft_config, export
from dspark_server.training.config import TrainConfig
from dspark_server.training.model import DraftModel
from tests.models.support import save_tiny
from tests.speculation.test_controls import reference

VOCABULARY, TOKENS, ANSWERS = 5, 3, 3000
Z = 4.753  # the normal quantile of 1 - 1e-6
PROMPT = [3, 0, 4, 4, 1, 3, 2, 0, 0, 3, 1, 4, 2, 3]

BIAS, BAD_WORDS = ((1, 0.7),), ((2, 4), (0, 0))  # of the answers with rules

# A step in the curve, so that the early stop matters, and drafts that must earn their cost, so that some are left out.
COSTS = Profile((1, 16, 18, 32, 64), (1.0, 1.2, 1.9, 2.3, 8.0), (1, 16), (0.03, 0.1), 0.0, 0.0)


@torch.inference_mode()
def exact_law(core: EngineCore, forbidden: int | None = None, ruled: bool = False) -> dict[tuple[int, ...], float]:
    """Every answer of TOKENS tokens, by running the target over all of them; one token may be forbidden."""
    executor = core.loop.executor
    assert isinstance(executor, TorchExecutor)
    target = executor.target
    pool = KVPool(8, 16, [target.kv_group], target.embedding.dtype)
    law = {(): 1.0}
    for _ in range(TOKENS):
        longer = {}
        for answer, chance in law.items():
            tokens = [*PROMPT, *answer]
            batch = Batch.of([Run(tokens, 0, list(range(8)), 1)], 16)
            logits = target.logits(target.forward(batch, pool.layers(0), ())[0])[0]
            if forbidden is not None:
                logits[forbidden] = -torch.inf
            if ruled:
                logits = torch.tensor(
                    reference(
                        logits.tolist(), PROMPT, answer, repetition=1.4, frequency=0.8, bias=BIAS, bad_words=BAD_WORDS
                    )
                )
            for token, share in enumerate(logits.double().softmax(0).tolist()):
                longer[(*answer, token)] = chance * share
        law = longer
    return law


def chi_square(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> tuple[float, float]:
    """The statistic and its critical value (Wilson and Hilferty), outcomes rarer than five expected put together."""
    assert set(counts) <= {answer for answer, chance in law.items() if chance > 0}
    total = sum(counts.values())
    cells = [(counts[answer], chance * total) for answer, chance in law.items() if chance > 0]
    rare = [cell for cell in cells if cell[1] < 5]
    cells = [cell for cell in cells if cell[1] >= 5] + (
        [(sum(c[0] for c in rare), sum(c[1] for c in rare))] * bool(rare)
    )
    freedom = len(cells) - 1
    critical = freedom * (1 - 2 / (9 * freedom) + Z * (2 / (9 * freedom)) ** 0.5) ** 3
    return sum((seen - expected) ** 2 / expected for seen, expected in cells), critical


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random target and a random drafter of blocks of 4."""
    target, draft = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    save_tiny(target, "qwen3", vocab_size=VOCABULARY)
    options = TrainConfig("", "", mask_token_id=0, target_layer_ids=(0, 1), num_layers=1, block_size=4, markov_rank=8)
    model = DraftModel(draft_config(options, target), 64)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=noise)
    export(model, options, target, None, draft)
    return target, draft


def load(
    pair: tuple[Path, Path],
    selection: str,
    trace: Callable[[StepTrace], None] | None = None,
    dtype: str = "float32",
) -> EngineCore:
    target, draft = map(str, pair)
    speculative = SpeculativeConfig(method="dspark", model=draft, selection=selection)
    config = EngineConfig(
        model=target,
        dtype=dtype,
        speculative=speculative,
        block_size=4,
        num_blocks=44,
        max_num_seqs=13,
        max_num_batched_tokens=64,
        check_invariants=True,
    )
    return EngineCore.load(config, COSTS, trace=trace)


def run(
    pair: tuple[Path, Path], selection: str, forbidden: int | None = None, dtype: str = "float32", ruled: bool = False
) -> tuple[EngineCore, Counter[tuple[int, ...]], Counter[str]]:
    """Unseeded answers to one prompt, ten at a time beside a greedy request and two that share a seed.

    `forbidden` is a stop token that min_tokens keeps out of what is counted.
    """
    seen: Counter[str] = Counter()

    def look(step: StepTrace) -> None:
        drafted = set(step.drafted.requests) if step.drafted else set()
        for request in step.verified.requests:
            if request.is_decoding and request.remaining > 1:  # the last token is never a draft
                seen["drafted" if request in drafted else "skipped"] += 1
                seen["backed off"] += request.history.wait > 1
        if step.drafted:
            seen["cut"] += sum(length < 4 for length in step.drafted.lengths)
            seen["kept"] += sum(step.drafted.lengths)
            seen["favoured"] += int(step.drafted.block.copies.on.sum()) if step.drafted.block.copies else 0
            seen["alone"] += len(step.drafted.requests) - step.drafted.backbone

    core = load(pair, selection, look, dtype)
    stop = frozenset() if forbidden is None else frozenset({forbidden})
    least = 0 if forbidden is None else TOKENS
    own = SamplingParams(max_tokens=6, min_tokens=least, temperature=1.0, stop_token_ids=stop, ignore_eos=True)
    if ruled:
        own = replace(own, repetition_penalty=1.4, frequency_penalty=0.8, logit_bias=BIAS, bad_words=BAD_WORDS)
    others = [
        SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True),
        *[SamplingParams(max_tokens=30, temperature=1.0, seed=5, ignore_eos=True)] * 2,
    ]
    counts: Counter[tuple[int, ...]] = Counter()
    for batch in range(ANSWERS // 100):
        requests = [core.new_request(PROMPT, own, nonce=1000 * batch + index) for index in range(100)]
        company = [core.new_request(PROMPT[:9], other, nonce=9) for other in others]
        for request in [*company, *requests]:
            core.batcher.add(request)
        while core.loop.has_work:
            core.loop.step()
        counts.update(tuple(request.output[:TOKENS]) for request in requests)
    return core, counts, seen


@pytest.mark.parametrize(
    ("selection", "forbidden", "dtype", "ruled"),
    [
        ("causal", None, "float32", False),
        ("lagged", None, "float32", False),
        ("causal", 3, "float32", False),
        ("causal", None, "bfloat16", False),
        ("causal", None, "float32", True),
    ],
)
def test_the_law_is_the_targets(
    pair: tuple[Path, Path], selection: str, forbidden: int | None, dtype: str, ruled: bool
) -> None:
    """In bfloat16, the drafts of steps in which nobody has a seed come from one native call."""
    core, counts, seen = run(pair, selection, forbidden, dtype, ruled)
    assert sum(counts.values()) == ANSWERS
    statistic, critical = chi_square(counts, exact_law(core, forbidden, ruled))
    assert statistic < critical
    assert seen["drafted"] > 500
    assert seen["skipped"] > 500  # some are left out
    assert seen["backed off"] > 100  # and wait longer than a step to be tried again
    assert seen["cut"] > 500  # and of those that draft, not all is verified
    assert seen["kept"] > 500
    assert seen["favoured"] > 500  # by copies of the context, among them blocks that left their copy
    assert seen["alone"] > 10  # the greedy request's
    assert core.loop.stats.accepted_tokens > 1000
    assert core.loop.stats.preemptions > 0
    assert core.loop.stats.prefix_hits > 0


def test_a_coin_shared_with_the_draft_is_seen(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: what these counts can tell apart."""
    honest = CounterStreams.uniform

    def shared(self: CounterStreams, purpose: Purpose, sampling: SamplingBatch, offsets: torch.Tensor) -> torch.Tensor:
        return honest(self, Purpose.DRAFT if purpose is Purpose.COIN else purpose, sampling, offsets)

    monkeypatch.setattr(CounterStreams, "uniform", shared)
    core, counts, _ = run(pair, "fixed")
    statistic, critical = chi_square(counts, exact_law(core))
    assert statistic > 2 * critical


def test_all_outcomes_are_counted(pair: tuple[Path, Path]) -> None:
    law = exact_law(load(pair, "causal"))
    assert set(law) == set(itertools.product(range(VOCABULARY), repeat=TOKENS))
    assert sum(law.values()) == pytest.approx(1)
