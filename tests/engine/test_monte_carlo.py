"""The target's law through the whole engine: batching, preemption, prefix hits, load-aware selection, back-off.

Fifteen hundred answers of six tokens out of five, every token counted against the target's exact law after the tokens
before it (chi-square, alpha = 1e-6). Few tokens and a drafter of another mind: with many near-uniform ones bugs do not
show. The first token is never a draft; five that may be, of half as many answers, tell more than the two of three
thousand whose first three tokens are counted together, at as many degrees of freedom.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.executor import TorchExecutor
from dspark_server.engine.request import SamplingParams
from dspark_server.engine.trace import StepTrace
from dspark_server.runtime.batch import Batch, Run
from dspark_server.runtime.kv import KVPool
from dspark_server.runtime.paging import BlockTable, CacheLayout
from dspark_server.speculation.cost_model import Profile
from dspark_server.speculation.noise import CounterStreams, Purpose
from dspark_server.speculation.sampling import SamplingBatch
from dspark_server.training.checkpoint import draft_model, export, target_head
from dspark_server.training.config import TrainConfig
from tests.engine.support import still
from tests.models.support import save_tiny
from tests.speculation.test_controls import reference

VOCABULARY, TOKENS, ANSWERS = 5, 6, 1500
TOGETHER = 500  # answers that are asked for at once
FORBIDDEN = 3  # tokens of an answer before which none may end it, in the tests of min_tokens
Z = 4.753  # the normal quantile of 1 - 1e-6
LEAST = 5  # variance of a count; what has less is counted together
PROMPT = [3, 0, 4, 4, 1, 3, 2, 0, 0, 3, 1, 4, 2, 3]

BIAS, BAD_WORDS = ((1, 0.7),), ((2, 4), (0, 0))  # of the answers with rules

# A step in the curve, so that the early stop matters, and drafts that must earn their cost, so that some are left out.
COSTS = Profile((1, 64, 72, 128, 256), (1.0, 1.2, 1.9, 2.3, 8.0), (1, 64), (0.03, 0.1), 0.0, 0.0)


Answer = tuple[int, ...]


@torch.inference_mode()
def exact_laws(
    core: EngineCore, answers: list[Answer], forbidden: int | None = None, ruled: bool = False
) -> list[list[Tensor]]:
    """Of each answer the target's law [VOCABULARY] of every token, by running the target over the tokens before it."""
    executor = core.loop.executor
    assert isinstance(executor, TorchExecutor)
    target = executor.target
    block = len(PROMPT) + TOKENS
    dtype = target.embed.weight.dtype
    pool = KVPool(len(answers), CacheLayout.of([target.caches], block, dtype.itemsize), dtype)
    runs = [
        Run([*PROMPT, *answer[:-1]], 0, [BlockTable(0, [place])], len(answer)) for place, answer in enumerate(answers)
    ]
    logits = target.logits(target.forward(Batch.of(runs, pool.groups), pool.layers(0), ())[0])
    if ruled:
        told = {}  # by what has been said: answers begin alike
        for row, said in zip(
            logits.tolist(), [answer[:at] for answer in answers for at in range(len(answer))], strict=True
        ):
            if said not in told:
                told[said] = reference(row, PROMPT, said, repetition=1.4, frequency=0.8, bias=BIAS, bad_words=BAD_WORDS)
        logits = torch.tensor([told[answer[:at]] for answer in answers for at in range(len(answer))])
    each = [list(rows) for rows in logits.double().split([len(answer) for answer in answers])]
    for rows in each:
        for row in rows[: FORBIDDEN if forbidden is not None else 0]:
            row[forbidden] = -torch.inf
    return [[row.softmax(0) for row in rows] for rows in each]


def chi_square(answers: list[Answer], laws: list[list[Tensor]]) -> tuple[float, int]:
    """The statistic and its degrees of freedom.

    Tokens are counted by place and the token before. Each is drawn from a law of its own, whose mean and covariance
    are known whatever came before: what is seen less what is expected has the sum of these covariances.
    """
    groups: dict[tuple[int, int], list[tuple[int, Tensor]]] = defaultdict(list)
    for answer, rows in zip(answers, laws, strict=True):
        for place, (token, law) in enumerate(zip(answer, rows, strict=True)):
            assert law[token] > 0
            groups[place, answer[place - 1] if place else -1].append((token, law))
    statistic, freedom = 0.0, 0
    for group in groups.values():
        law = torch.stack([law for _, law in group])
        covariance = torch.diag(law.sum(0)) - law.T @ law
        cells = _cells(covariance)
        seen = torch.bincount(torch.tensor([token for token, _ in group]), minlength=VOCABULARY)
        away = cells @ (seen - law.sum(0))
        inverse = torch.linalg.pinv(cells @ covariance @ cells.T, rtol=1e-9, hermitian=True)
        statistic += float(away @ inverse @ away)
        freedom += len(cells) - 1  # they add up to all there is
    return statistic, freedom


def critical(freedom: int) -> float:
    """The value that chi-square exceeds once in a million (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + Z * (2 / (9 * freedom)) ** 0.5) ** 3


def _cells(covariance: Tensor) -> Tensor:
    """Tokens that are counted together [n, V], zeros and ones: the rarest until their variance is LEAST."""
    cells, together = [], torch.zeros(VOCABULARY, dtype=torch.double)
    for token in covariance.diag().argsort().tolist():
        together[token] = 1
        if together @ covariance @ together >= LEAST:
            cells.append(together)
            together = torch.zeros_like(together)
    if not cells:
        return torch.ones(1, VOCABULARY, dtype=torch.double)
    cells[-1] = cells[-1] + together
    return torch.stack(cells)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random target and a random drafter of blocks of 4."""
    target, draft = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    save_tiny(target, "qwen3", vocab_size=VOCABULARY)
    options = TrainConfig("", "", mask_token_id=0, target_layer_ids=(0, 1), num_layers=1, block_size=4, markov_rank=8)
    model = draft_model(options, target, target_head(target).float(), 64)
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
    rule: str = "block",
) -> EngineCore:
    target, draft = map(str, pair)
    speculative = SpeculativeConfig(method="dspark", model=draft, selection=selection, acceptance=rule)
    config = EngineConfig(
        model=target,
        dtype=dtype,
        speculative=speculative,
        block_size=4,
        num_blocks=160,
        max_num_seqs=52,
        max_num_batched_tokens=256,
        check_invariants=True,
    )
    return EngineCore.load(config, COSTS, trace=trace, clock=still)


def run(
    pair: tuple[Path, Path],
    selection: str,
    forbidden: int | None = None,
    dtype: str = "float32",
    ruled: bool = False,
    count: int = ANSWERS,
    rule: str = "block",
) -> tuple[EngineCore, list[Answer], Counter[str]]:
    """Unseeded answers to one prompt, some forty at a time, beside a greedy request in a hundred and two with a seed.

    A step takes little longer for many requests than for few; few are left where TOGETHER of them end.

    `forbidden` is a stop token that min_tokens keeps out of the first places.
    """
    seen: Counter[str] = Counter()

    def look(step: StepTrace) -> None:
        drafted = set(step.drafting)
        for request in step.verified.requests:
            if request.is_decoding and request.remaining > 1:  # the last token is never a draft
                seen["drafted" if request in drafted else "skipped"] += 1
                seen["backed off"] += request.history.wait > 1
        if step.block:
            seen["cut"] += sum(length < 4 for length in step.block.lengths)
            seen["kept"] += sum(step.block.lengths)
            seen["favoured"] += int(step.block.copies.on.sum()) if step.block.copies else 0
            seen["alone"] += len(step.block.requests) - step.block.by_drafter

    core = load(pair, selection, look, dtype, rule)
    stop = frozenset() if forbidden is None else frozenset({forbidden})
    least = 0 if forbidden is None else FORBIDDEN
    own = SamplingParams(max_tokens=TOKENS, min_tokens=least, temperature=1.0, stop_token_ids=stop, ignore_eos=True)
    if ruled:
        own = replace(own, repetition_penalty=1.4, frequency_penalty=0.8, logit_bias=BIAS, bad_words=BAD_WORDS)
    others = [
        SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True),
        *[SamplingParams(max_tokens=30, temperature=1.0, seed=5, ignore_eos=True)] * 2,
    ]
    answers: list[Answer] = []
    for batch in range(count // TOGETHER):
        requests = [core.new_request(PROMPT, own, nonce=1000 * batch + index) for index in range(TOGETHER)]
        company = [core.new_request(PROMPT[:9], other, nonce=9) for other in others * (TOGETHER // 100)]
        for request in [*company, *requests]:
            core.batcher.add(request)
        while core.loop.has_work:
            core.loop.step()
        answers += [tuple(request.output) for request in requests]
    return core, answers, seen


@pytest.mark.parametrize(
    ("selection", "forbidden", "dtype", "ruled", "rule"),
    [
        ("causal", None, "float32", False, "block"),
        ("causal", None, "float32", False, "ratio"),
        ("lagged", None, "float32", False, "block"),
        ("causal", 3, "float32", False, "block"),
        ("causal", None, "bfloat16", False, "block"),
        ("causal", None, "float32", True, "block"),
    ],
)
def test_the_law_is_the_targets(
    pair: tuple[Path, Path], selection: str, forbidden: int | None, dtype: str, ruled: bool, rule: str
) -> None:
    """In bfloat16, the drafts of steps in which nobody has a seed come from one native call."""
    core, answers, seen = run(pair, selection, forbidden, dtype, ruled, rule=rule)
    assert len(answers) == ANSWERS
    statistic, freedom = chi_square(answers, exact_laws(core, answers, forbidden, ruled))
    assert statistic < critical(freedom)
    assert seen["drafted"] > 250
    assert seen["skipped"] > 250  # some are left out
    assert seen["backed off"] > 10  # and wait longer than a step to be tried again
    assert seen["cut"] > 250  # and of those that draft, not all is verified
    assert seen["kept"] > 250
    assert seen["favoured"] > 250  # by copies of the context, among them blocks that left their copy
    assert seen["alone"] > 5  # the greedy request's
    assert core.loop.stats.accepted_tokens > 500
    assert core.loop.stats.preemptions > 0
    assert core.loop.stats.prefix_hits > 0


def test_a_coin_shared_with_the_draft_is_seen(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: what these counts can tell apart."""
    honest = CounterStreams.uniform

    def shared(self: CounterStreams, purpose: Purpose, sampling: SamplingBatch, offsets: torch.Tensor) -> torch.Tensor:
        return honest(self, Purpose.DRAFT if purpose is Purpose.COIN else purpose, sampling, offsets)

    monkeypatch.setattr(CounterStreams, "uniform", shared)
    core, answers, _ = run(pair, "fixed", count=500, rule="ratio")
    statistic, freedom = chi_square(answers, exact_laws(core, answers))
    assert statistic > 4 / 3 * critical(freedom)  # a third of the answers: 4 times as much with all


def test_the_statistic_tells_a_law_from_its_neighbour() -> None:
    """Laws that were drawn from pass, with the mean that chi-square has; the same at another temperature do not."""
    noise = torch.Generator().manual_seed(0)
    logits = torch.randn(ANSWERS, TOKENS, VOCABULARY, generator=noise, dtype=torch.double) / 2
    logits += 2 * torch.randn(TOKENS, VOCABULARY, generator=noise, dtype=torch.double)
    logits[:, :, 4] -= 6  # rare
    laws = [list(rows) for rows in logits.softmax(-1)]
    found = []
    for sharper in (1.0, 1.0, 1.0, 1.0, 1.35):
        drawn = torch.multinomial((sharper * logits).softmax(-1).flatten(0, 1), 1, generator=noise).view(ANSWERS, -1)
        found.append(chi_square([tuple(row) for row in drawn.tolist()], laws))
    honest, freedom = [statistic for statistic, _ in found[:4]], found[0][1]
    assert all(statistic < critical(freedom) for statistic in honest)
    assert sum(honest) == pytest.approx(4 * freedom, abs=4 * (2 * 4 * freedom) ** 0.5)
    assert found[4][0] > critical(freedom)
