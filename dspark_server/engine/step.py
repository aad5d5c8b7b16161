"""The step loop: plan, choose, draft, select, verify, accept, commit (DSpark §3; DSPARK.md "One decoding cycle")."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import torch
from dspark_kernels import Kernels
from torch import Tensor

from dspark_server import failpoints
from dspark_server.engine.batcher import Batcher, Plan
from dspark_server.engine.executor import Budget, Clock, Cycle, Executor
from dspark_server.engine.gain import StepTime, seconds_without_drafts
from dspark_server.engine.logprobs import token_logprobs
from dspark_server.engine.request import FinishReason, Request
from dspark_server.engine.stats import SURVIVAL_BINS
from dspark_server.engine.trace import StepOutput, StepTrace, Verification, drafting, output_of
from dspark_server.runtime.batch import Run
from dspark_server.speculation.acceptance import Accepted
from dspark_server.speculation.controls import Controls
from dspark_server.speculation.copy_drafter import Copying
from dspark_server.speculation.copying import LONG_MATCH, Match
from dspark_server.speculation.cost_model import CostModel
from dspark_server.speculation.draft_block import DraftBlock, DraftRequest, Source
from dspark_server.speculation.drafting import Candidate
from dspark_server.speculation.estimates import Correction, Estimates, Shifts
from dspark_server.speculation.noise import CounterStreams
from dspark_server.speculation.prefix_scheduler import Load
from dspark_server.speculation.sampling import GREEDY_BELOW, SamplingBatch
from dspark_server.speculation.selection import Selection

logger = logging.getLogger(__name__)

CONTRADICTION = (
    "The request's constraints (form, allowed_token_ids, bad_words, logit_bias, min_tokens) leave no token that could "
    "follow."
)
FIRST_GUESS = 0.6  # assumed survival of a draft token before any was verified


Acceptance = Callable[[Verification, DraftBlock | None, SamplingBatch], Accepted]


class StepLoop:
    """Owns every request and block; only one thread may call it.

    `copying`: the drafter, where it copies. `acceptance` replaces the acceptance rules (conformance forces counts);
    `trace` receives every step that samples.
    """

    def __init__(
        self,
        batcher: Batcher,
        executor: Executor,
        selection: Selection,
        *,
        cost_model: CostModel | None = None,
        max_draft_tokens: int | None = None,
        copying: Copying | None = None,
        acceptance: Acceptance | None = None,
        kernels: Kernels | None = None,
        trace: Callable[[StepTrace], None] | None = None,
        check_invariants: bool = False,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.batcher = batcher
        self.executor = executor
        self.stats = batcher.stats
        self.stats.accepted_per_position = [0] * executor.gamma
        self.cost_model = cost_model
        self._selection = selection
        self._estimates = Estimates()
        self._max_draft_tokens = min(executor.gamma, max_draft_tokens or executor.gamma)
        self._block = min(self._max_draft_tokens, executor.block)
        self._copying = copying
        self._streams = CounterStreams()
        self._acceptance = acceptance
        self._kernels = kernels  # of log-probabilities; None: plain ones
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
        asked = self._choose(plan, load)
        self._index_prompts(plan)
        cycle = self.executor.cycle(_runs(plan), self._streams, self._clock)
        block = self._draft(cycle, plan, load, asked) if asked else None
        draft_tokens = sum(block.lengths) if block else 0
        self.batcher.drafted(plan, draft_tokens)
        verified = self._verify(cycle, plan, block)
        accepted = None
        if verified.requests:
            failpoints.hit("step.sample")
            accepted = self._accept(cycle, verified, block)
            if self._trace:
                self._trace(StepTrace(plan, block, verified, accepted, load, self.selection))
        self._count_drafting(plan, block)
        failpoints.hit("step.commit")
        outputs = self._commit(cycle, plan, block, verified, accepted)
        if block:
            self._learn(plan, block, outputs)
        tokens = load.tokens + draft_tokens
        self.stats.steps += 1
        self.stats.iteration_tokens.append(tokens)
        self.batcher.update_gauges()
        if self._check_invariants:
            self.batcher.check()
        draft, verify = cycle.seconds
        host = self._clock() - began - draft - verify
        for part, seconds in (("draft", draft), ("verify", verify), ("host", host)):
            self.stats.seconds[part] += seconds
        if self.cost_model and tokens:
            took, committed = StepTime(draft, verify, host), sum(len(output.tokens) for output in outputs)
            backbone = block.by_drafter if block else 0
            without = seconds_without_drafts(self.cost_model, load, draft_tokens, committed, took, backbone)
            self.stats.gain.observe(took.total, without)
            self.cost_model.observe(
                tokens=tokens,
                context=load.context,
                pairs=load.pairs + (tokens - load.tokens) * load.per_draft,
                verify=verify,
                requests=backbone,
                draft=draft,
                overhead=host,
            )
            self.stats.verify_seconds = self.cost_model.verify_seconds
            self.stats.step_slowdown, self.stats.slow_steps = self.cost_model.slowdown, self.cost_model.slow
        return outputs

    def _choose(self, plan: Plan, load: Load) -> list[DraftRequest]:
        """Choose the requests that draft, by the policy: what they ask for, copies last."""
        candidates = plan.decoding
        if self._copying is not None:
            self._copying.begin_step()
        matches = self._matches(request for request in candidates if may_copy_alone(request))
        alone = {request for request, match in matches.items() if match and match.length >= LONG_MATCH}
        # The last token a request may commit is never a draft: one token always comes from the target.
        limits = [min(self._allowance(r, r in alone), r.remaining - 1) for r in candidates]
        choice = self._selection.drafting(
            [
                Candidate(limit, self._copied_rate(request, matches[request]), copies=True)
                if request in alone
                else Candidate(limit, self._rate(request), request.history.probe_due)
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
            return []
        matches |= self._matches(r for r in (candidates[index] for index in choice.drafting) if r not in matches)
        run_of = {entry.request: run for run, entry in enumerate(plan.scheduled)}

        def asked(index: int) -> DraftRequest:
            request = candidates[index]
            source = Source.COPY if request in alone else Source.DRAFTER
            place = run_of[request], request.tokens[-1], len(request.tokens) - 1, request.tables, limits[index]
            return DraftRequest(*place, matches.get(request), source, request.copied)

        return list(map(asked, sorted(choice.drafting, key=lambda index: candidates[index] in alone)))

    def _draft(self, cycle: Cycle, plan: Plan, load: Load, asked: list[DraftRequest]) -> DraftBlock | None:
        """Draft a block for each request in `asked` and select its prefix lengths; None if drafting failed."""
        requests = [plan.scheduled[each.run].request for each in asked]
        backbone = sum(each.source is Source.DRAFTER for each in asked)
        count = self._selection.count(len(asked) * self.executor.gamma, load, backbone)
        budget = None
        own = [self._correction(request, each.source) for each, request in zip(asked, requests, strict=True)]
        corrections = Shifts.of(own, self.executor.gamma)
        if count is not None:
            sampled = [entry.request for entry in plan.scheduled if entry.samples]
            budget = Budget(count, self._recorded(requests), corrections, sampling_batch(sampled))
        try:
            failpoints.hit("step.draft")
            block = cycle.draft(asked, sampling_batch(requests[:backbone]), budget)
        except Exception:  # a step commits tokens without a draft too, only fewer
            self.stats.failed_drafts += 1
            if self.stats.failed_drafts.bit_count() == 1:  # the 1st, 2nd, 4th, ...: permanent failure fills no disk
                logger.exception(
                    "drafting failed, for the %d. time; the step goes on without", self.stats.failed_drafts
                )
            return None
        stated = self._stated(block, requests)
        survival = failpoints.passed("draft.survival", corrections.applied(stated))
        lengths = self._selection.lengths(survival, block.limits, load, by_drafter=backbone, slots=block.slots)
        return replace(block, survival=survival, stated=stated, lengths=block.lengths or lengths)

    def _allowance(self, request: Request, alone: bool) -> int:
        """Maximum number of draft tokens in the request's block. `alone`: the block is only copied."""
        most, own = self._max_draft_tokens if alone else self._block, request.params.max_draft_tokens
        return most if own is None else min(most, own)

    def _matches(self, requests: Iterable[Request]) -> dict[Request, Match | None]:
        """Earlier occurrence of the end of each request's text, as far as it is indexed; for those that may copy."""
        if self._copying is None:
            return {}
        return {r: self._copying.match(r.context, r.tokens) for r in requests if self._may_copy(r)}

    def _may_copy(self, request: Request) -> bool:
        """Whether copies can be drafted for the request: it and the policy allow drafts."""
        if self._selection.name == "none" or request.remaining <= 1:
            return False
        return self._allowance(request, may_copy_alone(request)) > 0

    def _index_prompts(self, plan: Plan) -> None:
        """Index prompts during prefill, for requests that may copy as soon as their answer begins."""
        if self._copying is None:
            return
        for request in (entry.request for entry in plan.scheduled if not entry.request.is_decoding):
            if may_copy_alone(request) and self._may_copy(request):
                self._copying.index(request.context, request.tokens)

    def _copied_rate(self, request: Request, match: Match | None) -> float:
        """Estimated probability that the first token of a copy is accepted."""
        assert self._copying is not None
        assert match is not None
        return self._copying.rate(match, request.copied)

    def _stated(self, block: DraftBlock, requests: list[Request]) -> Tensor:
        """Survival a_k [R, gamma]: from the confidence head, and from `_recorded` for rows without one."""
        if block.survival is not None and (block.has_confidence or not block.by_drafter):
            return block.survival
        recorded = self._recorded(requests)
        return recorded if block.survival is None else torch.where(block.survival.isnan(), recorded, block.survival)

    def _recorded(self, requests: list[Request]) -> Tensor:
        """Survival a_k [R, gamma] estimated from the acceptance history of each request."""
        rates = torch.tensor([self._rate(request) for request in requests])
        return rates.unsqueeze(1) ** torch.arange(1, self.executor.gamma + 1)

    def _correction(self, request: Request, source: Source = Source.DRAFTER) -> Correction:
        """The correction of survival estimates for drafts like this request's."""
        return self._estimates.of(request.tenant, request.kind._replace(copied=source is Source.COPY))

    def _rate(self, request: Request) -> float:
        """Expected survival of the request's next draft token, from its record and those of requests like it."""
        return request.history.rate(self._correction(request).everyone.rate(FIRST_GUESS))

    def _verify(self, cycle: Cycle, plan: Plan, block: DraftBlock | None) -> Verification:
        """The one target pass: every run's committed tokens, then its draft prefix."""
        failpoints.hit("step.verify")
        prefixes = block.prefixes if block else {}
        for run, entry in enumerate(plan.scheduled):
            if entry.samples and entry.request.controls is not None:
                entry.request.controls.prepare(prefixes.get(run, ()))  # meanwhile
        logits, row_start = cycle.verify(block)
        logits = failpoints.passed("target.logits", logits)
        if any(entry.request.scores_prompt for entry in plan.scheduled):
            logits, row_start = _score_prompts(plan, logits, row_start, self._kernels)
        sampled = [run for run, entry in enumerate(plan.scheduled) if entry.samples]
        return Verification(
            [plan.scheduled[run].request for run in sampled],
            logits,
            [row_start[run] for run in sampled] + row_start[-1:],
            block.rows_of(sampled) if block else [-1] * len(sampled),
        )

    def _accept(self, cycle: Cycle, verified: Verification, block: DraftBlock | None) -> Accepted:
        """Apply the acceptance rules of DSPARK.md to one verification pass."""
        sampling = sampling_batch(verified.requests)
        if self._acceptance:
            return self._acceptance(verified, block, sampling)
        logits = verified.logits
        if any(request.reads_raw_logits for request in verified.requests):
            logits = logits.clone()  # acceptance writes to rows of requests with rules
        return cycle.accept(logits, verified.row_start, block, verified.rows, sampling)

    def _learn(self, plan: Plan, block: DraftBlock, outputs: list[StepOutput]) -> None:
        """Record the acceptance of drafts, in the counters and in each request's histories (of the drafter, of copies).

        Draft tokens past the end of an answer, and those of a failed request, count as neither accepted nor rejected.
        """
        accepted = {output.request: output.accepted for output in outputs}
        ended = {output.request for output in outputs if len(output.tokens) <= output.accepted}
        assert block.survival is not None
        known = (~block.survival[:, 0].isnan()).tolist() if block.has_confidence else [False] * len(block.lengths)
        assert block.stated is not None
        survival, stated = block.survival.nan_to_num().tolist(), block.stated.nan_to_num().tolist()
        rows = zip(drafting(plan, block), block.requests, block.lengths, survival, stated, known, strict=True)
        for request, asked, verified, chances, said, confident in rows:
            stood = accepted[request]
            length = stood if request in ended else verified
            for position, chance in enumerate(chances[:length]):
                kind = self.stats.survival[min(int(chance * SURVIVAL_BINS), SURVIVAL_BINS - 1)]
                kind.judged += 1
                kind.predicted += chance
                kind.survived += position < stood
            correction = self._correction(request, asked.source)
            if verified:
                correction.judged(said, length, min(stood, length))
            else:
                correction.unheard()
            if asked.source is Source.COPY:
                if length:
                    request.copied.judged(length, stood)
                continue
            if length:
                context = 1 << max(8, (asked.position - 1).bit_length())
                self.stats.judged_by_context[context] += length
                self.stats.accepted_by_context[context] += min(stood, length)
                if confident:
                    self.stats.trust.observe(sum(said[:length]), min(stood, length), length)
            for record in (request.history, correction.everyone):
                if confident:
                    record.expected(chances[: self._block])
                else:
                    record.judged(length, stood)

    def _commit(
        self, cycle: Cycle, plan: Plan, block: DraftBlock | None, verified: Verification, accepted: Accepted | None
    ) -> list[StepOutput]:
        """Append the accepted tokens, count their KV rows, remove requests that ended."""
        prefixes = block.prefixes if block else {}
        counts = iter(accepted.count.tolist() if accepted else [])
        tokens = iter(accepted.token.tolist() if accepted else [])
        failed = iter(accepted.failed.tolist() if accepted else [])
        rows = iter(verified.row_start)
        outputs, ended = [], []
        for run, (entry, finite) in enumerate(zip(plan.scheduled, _finite_rows(cycle, plan), strict=True)):
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
                    self.batcher.pool.distrust(request.keys)  # rows that were finite may no longer be
                ended.append(request)
                outputs.append(StepOutput(request, []))
                continue
            prefix = prefixes.get(run, [])
            taken = request.commit([*prefix[:kept], token])
            kept = min(kept, len(taken))  # drafts past an early end are not committed, their rows do not count
            self.batcher.advance(request, entry.count + kept, finite)
            self._count_tokens(len(taken), len(prefix), kept)
            if request.finish_reason is not None:
                ended.append(request)
            outputs.append(output_of(request, taken, verified.logits, row, len(prefix), kept, self._kernels))
        # Only now: if the step fails before this, all of them still run, so all of them get the error.
        for request in ended:
            self.batcher.remove(request)
        return outputs

    def _count_drafting(self, plan: Plan, block: DraftBlock | None) -> None:
        lengths = dict(zip(drafting(plan, block), block.lengths, strict=True)) if block else {}
        by_drafter = block.by_drafter if block else 0
        self.stats.drafting.update(
            drafted=by_drafter, copied=len(lengths) - by_drafter, skipped=len(plan.decoding) - len(lengths)
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


def _runs(plan: Plan) -> list[Run]:
    """Runs of the scheduled committed tokens."""
    runs = []
    for entry in plan.scheduled:
        request = entry.request
        committed = request.tokens[request.computed : request.computed + entry.count]
        rows = entry.count if request.scores_prompt else int(entry.samples)
        runs.append(Run(committed, request.computed, request.tables, rows))
    return runs


def _finite_rows(cycle: Cycle, plan: Plan) -> Sequence[int | None]:
    """Number of leading rows of each scheduled run known to be finite; None: all, as their logits show."""
    if all(entry.samples and entry.count == 1 for entry in plan.scheduled):
        return [None] * len(plan.scheduled)
    return cycle.finite_rows()


def _score_prompts(
    plan: Plan, logits: Tensor, row_start: list[int], kernels: Kernels | None
) -> tuple[Tensor, list[int]]:
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
            known += token_logprobs(logits[first : first + len(following)], following, count, kernels)
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
