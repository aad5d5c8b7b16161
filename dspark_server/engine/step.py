"""The step loop: plan, choose, draft, select, verify, accept, commit (DSpark §3; DSPARK.md "One decoding cycle")."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise

import torch
from dspark_kernels import Kernels
from torch import Tensor

from dspark_server import failpoints
from dspark_server.engine.batcher import Batcher, Plan
from dspark_server.engine.executor import DraftRequest, Executor, Rest
from dspark_server.engine.gain import StepTime, seconds_without_drafts
from dspark_server.engine.logprobs import token_logprobs
from dspark_server.engine.request import FinishReason, Request
from dspark_server.engine.stats import SURVIVAL_BINS
from dspark_server.engine.trace import Asked, Drafted, StepOutput, StepTrace, Verification, output_of
from dspark_server.runtime.batch import Run
from dspark_server.speculation.acceptance import Accepted, DraftTokens, accept
from dspark_server.speculation.admission import Load
from dspark_server.speculation.capacity import Capacity
from dspark_server.speculation.controls import Controls
from dspark_server.speculation.copying import ALONE, ALONE_WEIGHT, CopyTables, Match
from dspark_server.speculation.drafter import DraftBlock
from dspark_server.speculation.drafting import Candidate
from dspark_server.speculation.history import SurvivalHistory
from dspark_server.speculation.noise import CounterStreams, Streams
from dspark_server.speculation.sampling import GREEDY_BELOW, SamplingBatch
from dspark_server.speculation.selection import Drafts, Selection

logger = logging.getLogger(__name__)

CONTRADICTION = (
    "The request's constraints (form, allowed_token_ids, bad_words, logit_bias, min_tokens) leave no token that could "
    "follow."
)
FIRST_GUESS = 0.6  # assumed survival of a draft token before any was verified
POPULATION_MEMORY = 0.995  # as history.MEMORY, for all requests together
INDEXED_TOKENS = 4096  # of all requests, indexed for copies in one step: about 4 ms


Judge = Callable[
    [Tensor, Sequence[int], DraftTokens | None, Sequence[int], SamplingBatch, Streams], Accepted
]  # as `acceptance.accept`
Acceptance = Callable[[Verification, Drafted | None, SamplingBatch], Accepted]


class StepLoop:
    """Owns every request and block; only one thread may call it.

    `kernels` speed up acceptance; `judge` replaces `accept`. `timing` corrects the wall-clock times of draft and pass
    (seconds) for executors that return before the device is done. `acceptance` replaces the acceptance rules
    (conformance forces counts); `trace` receives every step that samples.
    """

    def __init__(
        self,
        batcher: Batcher,
        executor: Executor,
        selection: Selection,
        *,
        capacity: Capacity | None = None,
        max_draft_tokens: int | None = None,
        copying: CopyTables | None = None,
        kernels: Kernels | None = None,
        judge: Judge | None = None,
        timing: Callable[[float, float], tuple[float, float]] | None = None,
        acceptance: Acceptance | None = None,
        trace: Callable[[StepTrace], None] | None = None,
        check_invariants: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.batcher = batcher
        self.executor = executor
        self.stats = batcher.stats
        self.stats.accepted_per_position = [0] * executor.gamma
        self.capacity = capacity
        self._selection = selection
        self._everyone = SurvivalHistory(memory=POPULATION_MEMORY)
        self._max_draft_tokens = min(executor.gamma, max_draft_tokens or executor.gamma)
        self._block = min(self._max_draft_tokens, executor.block)
        self._copying = copying
        self._may_index = INDEXED_TOKENS  # tokens left to index in this step
        self._judge: Judge = judge or partial(accept, kernels=kernels)
        self._timing = timing
        self._streams = CounterStreams()
        self._acceptance = acceptance or self._lossless
        self._trace = trace
        self._check_invariants = check_invariants
        self._clock = clock

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.batcher.running or self.batcher.waiting)

    @property
    def selection(self) -> str:
        """Name of the policy in force."""
        return self._selection.name

    def select_by(self, selection: Selection) -> None:
        """Set the policy from the next step on. Between steps no draft exists whose tokens could influence it."""
        self._selection = selection

    def watch(self, trace: Callable[[StepTrace], None] | None) -> None:
        """Call `trace` with every step that samples, from the next step on; None: no more calls."""
        self._trace = trace

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Run one cycle for every scheduled request. Before commit, only a request's draft number changes."""
        began = self._clock()
        self.batcher.begin()
        failpoints.hit("step.plan")
        plan = self.batcher.plan()
        load = plan.load
        self._may_index = INDEXED_TOKENS
        asked = self._choose(plan, load)
        self._index_prompts(plan)
        chosen = self._clock()
        drafted = self._draft(plan, load, asked) if asked else None
        prefixes = drafted.prefix_of() if drafted else {}
        draft_tokens = sum(map(len, prefixes.values()))
        self.batcher.drafted(plan, draft_tokens)
        selected = self._clock()
        verified = self._verify(plan, prefixes)
        judged = self._clock()
        accepted = None
        if verified.requests:
            failpoints.hit("step.sample")
            accepted = self._acceptance(verified, drafted, sampling_batch(verified.requests))
            if self._trace:
                self._trace(StepTrace(drafted, verified, accepted, load, self.selection))
        self._count_drafting(plan, drafted)
        failpoints.hit("step.commit")
        outputs = self._commit(plan, prefixes, verified, accepted)
        if drafted:
            self._learn(drafted, outputs)
        tokens = load.tokens + draft_tokens
        self.stats.steps += 1
        self.stats.iteration_tokens.append(tokens)
        self.batcher.update_gauges()
        if self._check_invariants:
            self.batcher.check()
        draft, verify, whole = selected - chosen, judged - selected, self._clock() - began
        if self._timing:
            draft, verify = self._timing(draft, verify)
        host = whole - draft - verify
        for part, seconds in (("draft", draft), ("verify", verify), ("host", host)):
            self.stats.seconds[part] += seconds
        if self.capacity and tokens:
            took, committed = StepTime(draft, verify, host), sum(len(output.tokens) for output in outputs)
            without = seconds_without_drafts(self.capacity, load, draft_tokens, committed, took)
            self.stats.gain.observe(took.total, without)
            self.capacity.observe(
                tokens=tokens,
                context=load.context,
                pairs=load.pairs + (tokens - load.tokens) * load.per_draft,
                verify=verify,
                requests=drafted.backbone if drafted else 0,
                draft=draft,
                overhead=host,
            )
            self.stats.verify_seconds = self.capacity.verify_seconds
            self.stats.step_slowdown, self.stats.slow_steps = self.capacity.slowdown, self.capacity.slow
        return outputs

    def _choose(self, plan: Plan, load: Load) -> Asked | None:
        """Choose the requests that draft, by the policy; None if there are none."""
        candidates = plan.decoding
        matches = self._matches(request for request in candidates if may_copy_alone(request))
        alone = {request for request, match in matches.items() if match and match.length >= ALONE}
        # The last token a request may commit is never a draft: one token always comes from the target.
        limits = [min(self._allowance(r, r in alone), r.remaining - 1) for r in candidates]
        prior = self._everyone.rate(FIRST_GUESS)
        choice = self._selection.drafting(
            [
                Candidate(limit, self._copied_rate(request, matches[request]), copies=True)
                if request in alone
                else Candidate(limit, request.history.rate(prior), request.history.probe_due)
                for limit, request in zip(limits, candidates, strict=True)
            ],
            load,
        )
        drafting = set(choice.drafting)
        for index, request in enumerate(candidates):
            if index in drafting:
                request.draft_number += 1
            if request in alone:
                continue
            if index in drafting:
                request.history.drafted(probing=index in choice.probing)
            else:
                request.history.left_out()
        if not drafting:
            return None
        # Copies last: the drafter's rows come first.
        order = sorted(choice.drafting, key=lambda index: candidates[index] in alone)
        requests = [candidates[index] for index in order]
        backbone = sum(request not in alone for request in requests)
        matches |= self._matches(request for request in requests if request not in matches)
        return Asked(requests, [limits[index] for index in order], [matches.get(r) for r in requests], backbone)

    def _draft(self, plan: Plan, load: Load, asked: Asked) -> Drafted | None:
        """Draft a block for each request in `asked` and select its prefix length; None if drafting failed."""
        requests, backbone = asked.requests, asked.backbone
        count = self._selection.count(len(requests) * self.executor.gamma, load, backbone)
        rest = None if count is None else partial(self._rest, plan, requests, asked.limits, count)
        try:
            failpoints.hit("step.draft")
            block = self.executor.draft(
                [
                    DraftRequest(r.tokens[-1], len(r.tokens) - 1, r.blocks, match, row >= backbone, r.copied)
                    for row, (r, match) in enumerate(zip(requests, asked.matches, strict=True))
                ],
                sampling_batch(requests[:backbone]),
                self._streams,
                rest,
            )
        except Exception:  # a step commits tokens without a draft too, only fewer
            self.stats.failed_drafts += 1
            if self.stats.failed_drafts.bit_count() == 1:  # the 1st, 2nd, 4th, ...: permanent failure fills no disk
                logger.exception(
                    "drafting failed, for the %d. time; the step goes on without", self.stats.failed_drafts
                )
            return None
        survival = failpoints.passed("draft.survival", self._survival_of(block, requests))
        # A NaN at slot k cuts the prefix to k - 1, never shorter: earlier tokens were sampled independently of it.
        usable = [min(limit, usable) for limit, usable in zip(asked.limits, block.usable.tolist(), strict=True)]
        slots = sum(asked.limits)
        lengths = self._selection.lengths(survival, usable, load, Drafts(backbone, slots))
        return Drafted(requests, block, survival, lengths, backbone, usable, slots)

    def _allowance(self, request: Request, alone: bool) -> int:
        """Maximum number of draft tokens in the request's block. `alone`: the block is only copied."""
        most, own = self._max_draft_tokens if alone else self._block, request.params.max_draft_tokens
        return most if own is None else min(most, own)

    def _matches(self, requests: Iterable[Request]) -> dict[Request, Match | None]:
        """Earlier occurrence of the end of each request's text, as far as it is indexed; for those that may copy."""
        matches = {}
        for request in filter(self._may_copy, requests):
            self._index(request)
            matches[request] = request.context.match(request.tokens, self.executor.gamma)
        return matches

    def _may_copy(self, request: Request) -> bool:
        """Whether copies can be drafted for the request: it and the policy allow drafts."""
        if self._copying is None or self._selection.name == "none" or request.remaining <= 1:
            return False
        return self._allowance(request, may_copy_alone(request)) > 0

    def _index(self, request: Request) -> None:
        """Index the request's text, up to the number of tokens left to index in this step."""
        self._may_index -= request.context.enter(request.tokens, self._may_index)

    def _index_prompts(self, plan: Plan) -> None:
        """Index prompts during prefill, for requests that may copy as soon as their answer begins."""
        for entry in plan.scheduled:
            if not entry.request.is_decoding and may_copy_alone(entry.request) and self._may_copy(entry.request):
                self._index(entry.request)

    def _copied_rate(self, request: Request, match: Match | None) -> float:
        """Estimated probability that the first token of a copy is accepted, as in `with_copies`."""
        assert self._copying is not None
        assert match is not None
        return request.copied.rate(self._copying.chance_alone(match.length, 1)[0], ALONE_WEIGHT)

    def _survival_of(self, block: DraftBlock, requests: list[Request]) -> Tensor:
        """Survival a_k [R, gamma]: from the confidence head, and from `_recorded` for rows without one."""
        if block.survival is not None and block.told:
            return block.survival
        recorded = self._recorded(requests)
        return recorded if block.survival is None else torch.where(block.survival.isnan(), recorded, block.survival)

    def _recorded(self, requests: list[Request]) -> Tensor:
        """Survival a_k [R, gamma] estimated from the acceptance history of each request."""
        prior = self._everyone.rate(FIRST_GUESS)
        rates = torch.tensor([request.history.rate(prior) for request in requests])
        return rates.unsqueeze(1) ** torch.arange(1, self.executor.gamma + 1)

    def _rest(self, plan: Plan, requests: list[Request], limits: list[int], count: int) -> Rest:
        """Verification with a fixed budget: the pass after the draft of `requests`, with `count` draft tokens."""
        row_of = {request: row for row, request in enumerate(requests)}
        sampled = [index for index, entry in enumerate(plan.scheduled) if entry.samples]
        return Rest(
            runs=_runs(plan, {}),
            rows=[row_of.get(entry.request, -1) for entry in plan.scheduled],
            limits=limits,
            recorded=self._recorded(requests),
            count=count,
            sampling=sampling_batch([plan.scheduled[index].request for index in sampled]),
            sampled=sampled,
        )

    def _verify(self, plan: Plan, prefixes: dict[Request, list[int]]) -> Verification:
        """The one target pass: every run's committed tokens, then its draft prefix."""
        failpoints.hit("step.verify")
        for entry in plan.scheduled:
            if entry.samples and entry.request.controls is not None:
                entry.request.controls.prepare(prefixes.get(entry.request, ()))  # meanwhile
        logits, row_start = self.executor.verify(_runs(plan, prefixes))
        logits = failpoints.passed("target.logits", logits)
        if any(entry.request.scores_prompt for entry in plan.scheduled):
            logits, row_start = _score_prompts(plan, logits, row_start)
        sampled = [(entry.request, row) for entry, row in zip(plan.scheduled, row_start, strict=False) if entry.samples]
        return Verification([r for r, _ in sampled], logits, [row for _, row in sampled] + row_start[-1:])

    def _lossless(self, verified: Verification, drafted: Drafted | None, sampling: SamplingBatch) -> Accepted:
        """Apply the acceptance rules of DSPARK.md to one verification pass."""
        if drafted is None:
            none = [0] * len(verified.requests)
            return self._judge(verified.logits, verified.row_start, None, none, sampling, self._streams)
        row_of = {request: row for row, request in enumerate(drafted.requests)}
        rows = [row_of.get(request, -1) for request in verified.requests]
        lengths = [drafted.lengths[row] if row >= 0 else 0 for row in rows]
        draft = DraftTokens(drafted.block.tokens, drafted.block.q, torch.tensor(rows), drafted.block.columns)
        return self._judge(verified.logits, verified.row_start, draft, lengths, sampling, self._streams)

    def _learn(self, drafted: Drafted, outputs: list[StepOutput]) -> None:
        """Record the acceptance of drafts, in the counters and in each request's histories (of the drafter, of copies).

        Draft tokens past the end of an answer, and those of a failed request, count as neither accepted nor rejected.
        """
        accepted = {output.request: output.accepted for output in outputs}
        ended = {output.request for output in outputs if len(output.tokens) <= output.accepted}
        survival, told = drafted.survival.nan_to_num().tolist(), drafted.block.told
        rows = zip(drafted.requests, drafted.lengths, survival, strict=True)
        for row, (request, verified, chances) in enumerate(rows):
            stood = accepted[request]
            length = stood if request in ended else verified
            for position, chance in enumerate(chances[:length]):
                kind = self.stats.survival[min(int(chance * SURVIVAL_BINS), SURVIVAL_BINS - 1)]
                kind.judged += 1
                kind.predicted += chance
                kind.survived += position < stood
            if row >= drafted.backbone:
                if length:
                    request.copied.judged(length, stood)
                continue
            for record in (request.history, self._everyone):
                if told:
                    record.expected(chances[: self._block])
                else:
                    record.judged(length, stood)

    def _commit(
        self, plan: Plan, prefixes: dict[Request, list[int]], verified: Verification, accepted: Accepted | None
    ) -> list[StepOutput]:
        """Append the accepted tokens, count their KV rows, remove requests that ended."""
        counts = iter(accepted.count.tolist() if accepted else [])
        tokens = iter(accepted.token.tolist() if accepted else [])
        failed = iter(accepted.failed.tolist() if accepted else [])
        rows = iter(verified.row_start)
        outputs, ended = [], []
        for entry, finite in zip(plan.scheduled, self._finite_rows(plan), strict=True):
            request = entry.request
            failpoints.hit("commit.request")
            if not entry.samples:
                self.batcher.advance(request, entry.count, finite)
                continue
            kept, token, row = next(counts), next(tokens), next(rows)
            if next(failed):
                request.finish_reason = FinishReason.ERROR
                if bool(verified.logits[row].max().isfinite()):
                    too_costly = request.grammar.failure if request.grammar is not None else None
                    request.error, request.impossible = too_costly or CONTRADICTION, True
                else:
                    request.error = "The model produced no valid probabilities for this request (NaN in its logits)."
                    self.batcher.pool.distrust(request.blocks)  # rows that were finite may no longer be
                ended.append(request)
                outputs.append(StepOutput(request, []))
                continue
            prefix = prefixes.get(request, [])
            taken = request.commit([*prefix[:kept], token])
            kept = min(kept, len(taken))  # drafts past an early end are not committed, their rows do not count
            self.batcher.advance(request, entry.count + kept, finite)
            self._count_tokens(len(taken), len(prefix), kept)
            if request.finish_reason is not None:
                ended.append(request)
            outputs.append(output_of(request, taken, verified.logits, row, len(prefix), kept))
        # Only now: if the step fails before this, all of them still run, so all of them get the error.
        for request in ended:
            self.batcher.remove(request)
        return outputs

    def _finite_rows(self, plan: Plan) -> Sequence[int | None]:
        """Number of leading rows of each scheduled run known to be finite; None: all, as their logits show."""
        if all(entry.samples and entry.count == 1 for entry in plan.scheduled):
            return [None] * len(plan.scheduled)
        return self.executor.finite_rows()

    def _count_drafting(self, plan: Plan, drafted: Drafted | None) -> None:
        lengths = dict(zip(drafted.requests, drafted.lengths, strict=True)) if drafted else {}
        backbone = drafted.backbone if drafted else 0
        self.stats.drafting.update(
            drafted=backbone, copied=len(lengths) - backbone, skipped=len(plan.decoding) - len(lengths)
        )
        self.stats.budgets.update(1 + lengths.get(request, 0) for request in plan.decoding)

    def _count_tokens(self, committed: int, drafted: int, kept: int) -> None:
        self.stats.generation_tokens += committed
        if drafted:
            self.stats.drafts += 1
            self.stats.draft_tokens += drafted
            self.stats.accepted_tokens += kept
            for position in range(kept):
                self.stats.accepted_per_position[position] += 1


def _runs(plan: Plan, prefixes: dict[Request, list[int]]) -> list[Run]:
    """Runs of the pass: the scheduled committed tokens, then the draft tokens to verify."""
    runs = []
    for entry in plan.scheduled:
        request, prefix = entry.request, prefixes.get(entry.request, [])
        committed = request.tokens[request.computed : request.computed + entry.count]
        rows = 1 + len(prefix) if entry.samples else 0
        if request.scores_prompt:
            rows = entry.count
        runs.append(Run(committed + prefix, request.computed, request.blocks, rows))
    return runs


def _score_prompts(plan: Plan, logits: Tensor, row_start: list[int]) -> tuple[Tensor, list[int]]:
    """Store requested log-probabilities of prompt tokens; gives the logits and row starts left to sample from."""
    kept: list[int] = []
    starts = []
    for entry, (start, end) in zip(plan.scheduled, pairwise(row_start), strict=True):
        starts.append(len(kept))
        request = entry.request
        if not request.scores_prompt:
            kept += range(start, end)
            continue
        known = request.prompt_logprobs
        if not known:
            known.append(None)  # nothing comes before the first token
        first = start + len(known) - 1 - request.computed  # row i of the sequence predicts token i + 1
        following = request.tokens[len(known) : min(request.computed + entry.count + 1, request.prompt_length)]
        if following:
            count = request.params.prompt_logprobs or 0
            known += token_logprobs(logits[first : first + len(following)], following, count)
        if entry.samples:
            kept.append(end - 1)
    return logits[torch.tensor(kept, dtype=torch.int64).to(logits.device)], [*starts, len(kept)]


def may_copy_alone(request: Request) -> bool:
    """Whether a copy after a long match can be the request's whole draft: it is greedy and has no `Controls`."""
    return request.params.temperature < GREEDY_BELOW and not isinstance(request.controls, Controls)


def sampling_batch(requests: list[Request]) -> SamplingBatch:
    """Sampling parameters of each request for the tokens after its anchor."""
    return replace(
        _lasting(tuple(requests)),
        position=torch.tensor([len(request.tokens) for request in requests], dtype=torch.int64),
        draft_number=torch.tensor([request.draft_number for request in requests], dtype=torch.int64),
    )


@lru_cache(maxsize=2)  # requests that draft, and that sample: mostly the same from step to step
def _lasting(requests: tuple[Request, ...]) -> SamplingBatch:
    """The part of `sampling_batch` that is the same in every step."""
    params = [request.params for request in requests]
    return SamplingBatch.of(
        temperature=[p.temperature for p in params],
        top_k=[p.top_k for p in params],
        top_p=[p.top_p for p in params],
        min_p=[p.min_p for p in params],
        coupled=[p.seed is not None for p in params],
        key=[request.nonce if p.seed is None else p.seed for request, p in zip(requests, params, strict=True)],
        choice=[request.choice for request in requests],
        position=[0] * len(requests),
        controls=[request.controls for request in requests],
    )
