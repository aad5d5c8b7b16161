"""Simulated serving: closed loops of many users on a derived machine, through the production batcher and selection.

A point is one policy at one concurrency: that many users, each sending its next request when its last one ended. It is
measured from the step in which all users run to the step in which the last request was sent.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice, pairwise
from typing import NamedTuple

import numpy as np

from dspark_server.engine.batcher import Batcher
from dspark_server.engine.blocks import BlockPool, chain_root
from dspark_server.engine.request import Request, SamplingParams, Status
from dspark_server.engine.simulate import SimulatedExecutor, SurvivalModel, VirtualClock
from dspark_server.engine.stats import EngineStats
from dspark_server.engine.step import StepLoop
from dspark_server.errors import ConfigError
from dspark_server.evaluation.roofline import MAX_REQUESTS, MAX_TOKENS, Machine
from dspark_server.runtime.paging import CacheGroup
from dspark_server.speculation.cost_model import CostModel, Profile
from dspark_server.speculation.selection import POLICIES, Selection, build_selection

BLOCK_SIZE = 16
LOAD_AWARE = ("causal", "lagged")
# Beside the policies proper: one draft token of the same drafter, and of a cheaper one-layer drafter.
SYSTEMS = ("none", "mtp-1", "static-2", "fixed", "threshold", "causal", "lagged")
assert set(POLICIES) < set(SYSTEMS)


@dataclass(frozen=True)
class Workload:
    """Requests of the users, in tokens: a prompt, of which the first `shared_tokens` are common to all, and an answer.

    Shared tokens are found in the prefix cache, so that by default passes only decode, as where other machines compute
    prompts. After each user's first request at least `requests` follow, and half as many as users.
    """

    prompt_tokens: int = 129
    shared_tokens: int = 128
    output_tokens: int = 128
    requests: int = 16
    domain: str = "code"
    drafter: str = "dspark"
    seed: int = 0
    threshold: float = 0.5
    max_batched_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        if not 0 <= self.shared_tokens < self.prompt_tokens:
            raise ConfigError("A prompt needs at least one token that is not shared.")
        if self.output_tokens < 2 or self.requests < 1:
            raise ConfigError("The simulation needs answers of at least 2 tokens, and at least one request.")


@dataclass(frozen=True)
class Point:
    """One policy at one concurrency.

    `running` requests on average; tokens per second, of all users and of one while it decodes; `budget` tokens verified
    and `committed` tokens of a decoding request in a step; `acceptance` of verified draft tokens; `drafting` share of
    decoding requests; `step` in milliseconds.
    """

    machine: str
    policy: str
    concurrency: int
    running: float
    throughput: float
    user_rate: float
    budget: float
    committed: float
    acceptance: float
    drafting: float
    step: float
    steps: int
    preemptions: int
    finished: int


class Mark(NamedTuple):
    """Counts of a simulation at one moment."""

    seconds: float
    tokens: int
    passes: int


class Simulation:
    """The production step loop of one policy on a simulated machine, and its users."""

    def __init__(
        self,
        machine: Machine,
        policy: str,
        concurrency: int,
        workload: Workload,
        believed: Profile | None = None,
        selection: Callable[[CostModel, Callable[[], list[float]]], Selection] | None = None,
    ) -> None:
        """`believed`: the profile that selection starts with, instead of the true cost of passes (None).

        `selection` makes one that takes the place of the load-aware policy named, from its cost model and the true
        rates of the requests that decode.

        Raises ConfigError for an unknown policy, or requests that the machine's memory cannot hold.
        """
        if policy not in SYSTEMS:
            raise ConfigError(f"Policy {policy!r} is not known; choose from {', '.join(SYSTEMS)}.")
        self.clock = VirtualClock()
        self._machine, self._policy, self._concurrency, self._workload = machine, policy, concurrency, workload
        self._finished = 0
        costs = machine.single if policy == "mtp-1" else machine.costs
        most = workload.max_batched_tokens, max(concurrency, MAX_REQUESTS)
        self.executor = SimulatedExecutor(
            self.clock,
            CostModel(costs, *most),
            SurvivalModel.of(workload.domain, workload.drafter),
            gamma=1 if policy == "mtp-1" else machine.gamma,
            overhead=machine.overhead,
            seed=workload.seed,
        )
        # Blocks beyond all requests' needs would only take our own memory.
        each = -(-(workload.prompt_tokens + workload.output_tokens + self.executor.gamma) // BLOCK_SIZE)
        self.batcher = Batcher(
            BlockPool(
                min(machine.kv_tokens // BLOCK_SIZE, 2 * concurrency * each),
                [CacheGroup(BLOCK_SIZE)],
                prefix_caching=True,
            ),
            EngineStats(),
            max_num_seqs=concurrency,
            max_num_batched_tokens=workload.max_batched_tokens,
            gamma=self.executor.gamma,
            clock=self.clock,
        )
        self.batcher.check_fits(workload.prompt_tokens, workload.output_tokens)
        # Selection learns from the times of steps, as in serving; their true cost is the executor's own.
        cost_model = CostModel(believed or costs, *most) if policy in LOAD_AWARE else None
        name = policy if policy in POLICIES else "fixed"
        if selection and cost_model:
            self.selection = selection(cost_model, self._rates)
        else:
            self.selection = build_selection(name, cost_model, threshold=workload.threshold)
        self.loop = StepLoop(
            self.batcher,
            self.executor,
            self.selection,
            cost_model=cost_model,
            max_draft_tokens=1 if policy == "static-2" else None,
            acceptance=self.executor.accept,
            clock=self.clock,
        )
        self._queue = self._requests()

    def run(self, *, drain: bool = False) -> Point:
        """Serve until the last request has been sent, or all of them to their end. Virtual time only."""
        own, users = self._workload, self._concurrency
        queue = islice(self._queue, users + max(own.requests, users // 2))
        first = list(islice(queue, self._concurrency))
        for request in first:
            self.batcher.add(request)
        marks: list[Mark] = []
        while self.loop.has_work and (drain or len(marks) < 2):
            ended = sum(output.request.finish_reason is not None for output in self.loop.step())
            self._finished += ended
            following = list(islice(queue, ended))
            for request in following:
                request.arrival = self.clock.now
                self.batcher.add(request)
            everyone = first[-1].status is not Status.WAITING or self._finished > self._concurrency // 4
            if (not marks and everyone) or (len(marks) == 1 and len(following) < ended):
                tokens = self.loop.stats.generation_tokens
                marks.append(Mark(self.clock.now, tokens, len(self.executor.log)))
        return self._point(*marks)

    def serve(self, seconds: float) -> float:
        """Tokens per second in the next `seconds` of virtual time; all users are present, and stay for a next call."""
        began, before = self.clock.now, self.loop.stats.generation_tokens
        while self.clock.now < began + seconds:
            there = len(self.batcher.running) + len(self.batcher.waiting)
            for request in islice(self._queue, self._concurrency - there):
                request.arrival = self.clock.now
                self.batcher.add(request)
            self.loop.step()
        return (self.loop.stats.generation_tokens - before) / (self.clock.now - began)

    def _rates(self) -> list[float]:
        """The true mean chance of a next token of each decoding request."""
        numbers = [request.nonce for request in self.batcher.running if request.is_decoding]
        return self.executor.survival.rates(self.executor.effect(np.array(numbers))).tolist() if numbers else []

    def _requests(self) -> Iterator[Request]:
        """Endless requests. The first of each user has already produced part of its output, evenly spread.

        So the loop starts in its steady state.
        """
        own, users = self._workload, self._concurrency
        left = np.random.default_rng((own.seed, 3)).permutation((np.arange(users) + 0.5) / users)
        root = chain_root("simulation")
        for number in count():
            length = own.output_tokens if number >= users else 1 + int(left[number] * own.output_tokens)
            yield Request(
                id=str(number),
                prompt_length=own.prompt_tokens,
                tokens=[0] * own.shared_tokens + [number] * (own.prompt_tokens - own.shared_tokens),
                params=SamplingParams(max_tokens=length, ignore_eos=True),
                stop_ids=frozenset(),
                chain_root=root,
                nonce=number,
            )

    def _point(self, start: Mark, end: Mark) -> Point:
        """Averages over the window between two marks."""
        seconds, tokens = end.seconds - start.seconds, end.tokens - start.tokens
        log = self.executor.log[start.passes : end.passes]
        decoding, drafts = sum(p.decoding for p in log), sum(p.drafts for p in log)
        stats = self.loop.stats
        return Point(
            machine=self._machine.name,
            policy=self._policy,
            concurrency=self._concurrency,
            running=sum(p.runs for p in log) / len(log),
            throughput=tokens / seconds,
            user_rate=tokens / seconds * len(log) / decoding,
            budget=1 + drafts / decoding,
            committed=tokens / decoding,
            acceptance=stats.accepted_tokens / stats.draft_tokens if stats.draft_tokens else 0.0,
            drafting=sum(p.drafting for p in log) / decoding,
            step=1e3 * seconds / len(log),
            steps=len(log),
            preemptions=stats.preemptions,
            finished=self._finished,
        )


def sweep(
    machine: Machine,
    policies: Sequence[str],
    concurrency: Sequence[int],
    workload: Workload,
    progress: Callable[[Point], object] = lambda point: None,
) -> list[Point]:
    """All points, policy by policy; `progress` is called with each as it is done."""
    points = []
    for policy in policies:
        for users in concurrency:
            points.append(Simulation(machine, policy, users, workload).run())
            progress(points[-1])
    return points


def at_matched_throughput(points: Sequence[Point], baseline: Sequence[Point]) -> list[tuple[Point, float]]:
    """Figure 7 as numbers: for each baseline point, how many times faster a user is served at the same throughput.

    Linear between neighbouring points of the other curve, of which only the rising part counts; points of the baseline
    outside its range are left out.
    """
    ratios = []
    for own in baseline:
        for a, b in pairwise(sorted(points, key=lambda point: point.concurrency)):
            if a.throughput <= own.throughput <= b.throughput and a.throughput < b.throughput:
                share = (own.throughput - a.throughput) / (b.throughput - a.throughput)
                ratios.append((own, (a.user_rate + share * (b.user_rate - a.user_rate)) / own.user_rate))
                break
    return ratios
